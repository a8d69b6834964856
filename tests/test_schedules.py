from helpers.config import load_config
from helpers.files import CONFIGS
from notebooks.examples import runs_figure, schedule_frame


def config(name, *overrides):
    return load_config(CONFIGS / f"{name}_config.yaml", overrides=overrides)


def test_the_failing_schedule_ends_inside_its_warm_up():
    configs = {name: config(name) for name in ("full_lora", "crack_detection")}
    table = schedule_frame(configs, 64)
    assert table["steps"].tolist() == [160, 1600]  # 64 / (2 * 4) * 20 and 64 / (1 * 2) * 50
    assert table["reached"].tolist() == [0.16, 1.0]
    assert table["images per step"].tolist() == [8, 2]


def test_incomplete_batches_count_and_no_warm_up_is_complete():
    one = config("full_lora", "training.num_epochs=1", "training.warmup_steps=0")
    table = schedule_frame({"one": one}, 9)  # 5 batches of 2, 2 steps of 4
    assert table.loc["one", "steps"] == 2
    assert table.loc["one", "reached"] == 1


def test_runs_share_their_axes_and_are_averaged_by_epoch():
    histories = {
        "long": [
            {"epoch": 0.5, "loss": 4.0},
            {"epoch": 1.0, "loss": 2.0},
            {"epoch": 2.0, "loss": 1.0},
            {"epoch": 2.0, "eval_AP50": 0.5},
        ],
        "short": [{"epoch": 1.0, "loss": 5.0}, {"epoch": 1.0, "eval_AP50": 0.1}],
    }
    figure = runs_figure(histories, {"loss": "training loss", "eval_AP50": "AP50"})
    losses, metrics = figure.axes
    assert losses.get_yscale() == "log"
    assert metrics.get_yscale() == "linear"
    assert [line.get_ydata().tolist() for line in losses.lines] == [[3.0, 1.0], [5.0]]
    assert [line.get_xdata().tolist() for line in metrics.lines] == [[2], [1]]
    assert [line.get_label() for line in metrics.lines] == ["long", "short"]
