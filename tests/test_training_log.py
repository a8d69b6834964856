"""The log of a training: live with a stored picture, afterwards from any run folder, and in TensorBoard."""

import sys
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
from tiny_random import tiny_run_config
from transformers.integrations import TensorBoardCallback, integration_utils

from helpers.errors import InputError
from helpers.train import train
from helpers.train.run import CURVES_FILE, METRICS_FILE
from notebooks import training_log
from notebooks.training_log import LiveLog, log_figure, log_sentence, read_log


def drawn(ax):
    """Map the label of each line of some axes to its (x, y)."""
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}


def test_a_finished_run_shows_losses_terms_metrics_and_rate(run):
    table = read_log(run.folder)
    figure = log_figure(table)
    curves = pd.read_csv(run.folder / CURVES_FILE)
    rows = curves[["step", "eval_loss"]].dropna().to_numpy().tolist()
    losses, terms, metrics, rate = map(drawn, figure.axes)
    assert losses["validation loss"] == rows
    assert {"presence", "query score", "box, L1", "box, GIoU", "mask, dice"} <= terms.keys()
    assert {"AP50", "detected"} <= metrics.keys()
    assert rate["learning rate"] == curves[["step", "learning_rate"]].dropna().to_numpy().tolist()
    assert figure.axes[2].get_ylim() == (-0.03, 1.03)


def test_the_kept_step_is_marked_if_the_run_is_finished(run, run_copy):
    kept = run.metrics["best_step"] or run.metrics["steps"]
    table = read_log(run_copy)
    assert table.attrs["kept_step"] == kept
    marks = [line.get_xdata()[0] for line in log_figure(table).axes[0].get_lines()]
    assert marks.count(kept) >= 1
    assert f"kept step {kept}." in log_sentence(table)
    (run_copy / METRICS_FILE).unlink()
    interrupted = read_log(run_copy)
    assert interrupted.attrs["kept_step"] is None
    assert len(log_figure(interrupted).axes[3].get_lines()) == 1
    assert "kept" not in log_sentence(interrupted)


def test_terms_are_drawn_as_means_over_a_part_of_the_steps():
    table = pd.DataFrame({"presence": [1.0, 3.0] * 20}, index=pd.RangeIndex(1, 41, name="step"))
    points = drawn(log_figure(table).axes[1])["presence"]
    assert [y for _, y in points] == [1.0] + [2.0] * 39
    assert log_figure(table).axes[1].get_ylabel() == "loss term, mean of 2 steps"


def test_what_was_not_logged_is_left_out():
    table = pd.DataFrame({"training loss": [3.0, 2.0]}, index=pd.Index([1, 2], name="step"))
    figure = log_figure(table)
    assert figure.axes[2].texts[0].get_text() == "nothing logged yet"
    assert log_sentence(table) == "2 steps; training loss 3.00 to 2.00."


def test_a_folder_without_a_log_and_a_damaged_one_are_refused(tmp_path, run_copy):
    with pytest.raises(InputError, match="cannot be read"):
        read_log(tmp_path)
    path = run_copy / CURVES_FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError):
        read_log(run_copy)


class Shown:
    """Stands for a display handle and remembers what it was given."""

    def __init__(self):
        self.updates = []

    def update(self, widget):
        data = widget._repr_mimebundle_()
        self.updates.append(data[0] if isinstance(data, tuple) else data)


def test_the_last_state_of_a_live_log_is_stored_as_a_picture(monkeypatch):
    shown, displayed = Shown(), []

    def display(widget, *, display_id):
        displayed.append((widget, display_id))
        return shown

    monkeypatch.setattr(training_log, "display", display)
    panel = LiveLog()
    panel.show()
    assert displayed == [(panel.widget, True)]
    state = SimpleNamespace(global_step=3)
    panel.on_log(None, state, None, logs={"loss": 1.25})
    assert shown.updates == []
    panel.on_train_end(None, state, None)
    (bundle,) = shown.updates
    assert "image/jpeg" in bundle
    assert bundle["text/plain"].startswith("A panel with sliders")
    assert panel.readout.value == "step 3: training loss 1.250"


def test_a_live_log_that_is_not_shown_ends_silently():
    panel = LiveLog()
    panel.on_log(None, SimpleNamespace(global_step=1), None, logs={"loss": 2.0})
    panel.on_train_end(None, None, None)
    assert panel.widget.still[0].size[0] > 600


class FakeWriter:
    """Stands for TensorBoard's writer, which is not among the locked packages."""

    made = []

    def __init__(self, log_dir):
        self.log_dir, self.scalars, self.closed = log_dir, {}, False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, []).append((step, value))

    def add_text(self, *_):
        pass

    add_hparams = flush = add_text

    def close(self):
        self.closed = True


def test_the_tensorboard_callback_receives_the_whole_log(base, data_dir, tmp_path, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    config = tiny_run_config(base, data_dir, "scale.num_epochs=0.02")
    folder = tmp_path / "run"
    result = train(config, output_dir=folder, progress=False, callbacks=[TensorBoardCallback()])
    (writer,) = FakeWriter.made
    assert writer.log_dir == str(tmp_path / "board")
    assert writer.closed
    losses = [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]
    assert writer.scalars["train/loss"] == losses
    assert len(losses) == result.metrics["steps"] > 0
    assert {"train/presence_loss", "train/learning_rate", "eval/AP50"} <= writer.scalars.keys()
