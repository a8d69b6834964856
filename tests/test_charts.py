import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from helpers.errors import InputError
from helpers.show.charts import (
    draw_lines,
    history_frame,
    threshold_figure,
)
from notebooks.bars import component_bars_figure, grouped_bars_figure
from notebooks.examples import logit_heatmap_figure, score_histogram_figure

LOG = [
    {
        "step": 1,
        "loss": 30.0,
        "loss_ce": 2.0,
        "presence_loss": 0.5,
        "learning_rate": 0.1,
        "epoch": 0.5,
    },
    {"step": 2, "loss": 20.0, "loss_ce": 1.0, "presence_loss": 0.0, "grad_norm": 3.0, "epoch": 1.0},
    {
        "step": 2,
        "eval_loss": 5.0,
        "eval_AP50": 0.4,
        "eval_runtime": 2.0,
        "eval_samples_per_second": 9,
    },
    {"step": 2, "train_runtime": 9.0, "total_flos": 0.0},
]


def text_of(figure):
    figure.draw_without_rendering()
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    return texts + [text.get_text() for legend in legends for text in legend.get_texts()]


def test_history_joins_entries_of_one_step():
    history = history_frame(LOG)
    assert history.index.tolist() == [1, 2]
    assert history.loc[2, "loss"] == 20.0
    assert history.loc[2, "eval_AP50"] == 0.4
    assert np.isnan(history.loc[1, "eval_AP50"])


def test_entry_without_step_is_refused():
    with pytest.raises(InputError, match="no step"):
        history_frame([{"loss": 1.0}])


def lines_of(table, columns, **options):
    ax = Figure().subplots()
    draw_lines(ax, table, columns, xlabel="step", ylabel="loss", **options)
    return ax


def test_every_line_has_a_style_of_its_own():
    table = pd.DataFrame({f"term {number}": [1.0, 2.0] for number in range(12)})
    lines = lines_of(table, list(table)).lines
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(lines) == len(styles) == 12
    assert len({line.get_linestyle() for line in lines[:4]}) == 4


def test_zero_is_left_out_of_a_logarithmic_axis():
    history = history_frame(LOG)
    ax = lines_of(history, ["loss", "presence_loss"], log=True)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["presence_loss"].get_xdata()) == [1]
    assert list(lines["loss"].get_xdata()) == [1, 2]


def test_axes_without_a_line_say_so():
    assert [text.get_text() for text in lines_of(history_frame([]), []).texts] == [
        "nothing logged yet"
    ]


def test_threshold_figure_marks_the_threshold():
    columns = {"threshold": [0.1, 0.5], "count": [9, 0], "precision": [0.5, np.nan]}
    sweep = pd.DataFrame({**columns, "recall": [0.9, 0.0], "f1": [0.6, 0.0]})
    figure = threshold_figure(sweep, 0.3)
    assert text_of(figure) == ["precision", "recall", "f1", "threshold 0.3"]
    assert list(figure.axes[1].lines[0].get_ydata()) == [9, 0]


def test_histogram_counts_every_score_and_bears_an_empty_side():
    figure = score_histogram_figure([0.0, 1e-5, 1.0], [], 0.3)
    texts = text_of(figure)
    assert texts == ["prompt present (3 questions)", "prompt absent (0 questions)", "threshold 0.3"]
    outline = figure.axes[0].patches[0].get_path().vertices
    assert outline[:, 1].max() == 2


def test_heatmap_states_its_range():
    figure = logit_heatmap_figure([[-10.0, -11.0], [-10.5, -10.2]])
    assert figure.axes[1].get_ylabel() == "logit (-11.0 to -10.0)"


@pytest.mark.parametrize("logits", [[], [1.0, 2.0], np.zeros((0, 20))])
def test_heatmap_refuses_what_is_no_map(logits):
    with pytest.raises(InputError, match="no map"):
        logit_heatmap_figure(logits)


def test_grouped_bars_carry_their_values():
    table = pd.DataFrame(
        [[0.0, 0.001], [0.5, np.nan]], index=["not read", "read"], columns=["off", "on"]
    )
    figure = grouped_bars_figure(table, "AP50", top=1)
    assert [text for text in text_of(figure) if text not in ("off", "on")][:3] == [
        "0",
        "0.5",
        "0.001",
    ]
    hatches = {container[0].get_hatch() for container in figure.axes[0].containers}
    assert len(hatches) == 2


def test_component_bars_write_large_numbers_in_full():
    table = pd.DataFrame(
        {"modules": [128, 0], "parameters": [10092544, 0]}, index=["vision", "text"]
    )
    figure = component_bars_figure(table, ["modules", "parameters"])
    assert text_of(figure) == ["128", "0", "10,092,544", "0"]
