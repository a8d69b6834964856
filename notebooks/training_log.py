"""The log of a training, live and afterwards: losses, their terms, detection metrics, learning rate."""

import math
import time
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from transformers import TrainerCallback

from helpers.files import resolve
from helpers.show.charts import draw_lines, history_frame
from helpers.show.panels import image_html
from helpers.train.run import METRICS_FILE, read_history, read_run_file
from notebooks.gallery import figure_picture
from notebooks.still import StillBox

LOSSES = {"loss": "training loss", "eval_loss": "validation loss"}
TERMS = {
    "presence_loss": "presence",
    "loss_ce": "query score",
    "loss_bbox": "box, L1",
    "loss_giou": "box, GIoU",
    "loss_mask": "mask, focal",
    "loss_dice": "mask, dice",
}
"""Of the last decoder layer, before their weights; `aux` layers and the semantic map are left out."""
METRICS = {
    "eval_AP50": "AP50",
    "eval_cgF1": "cgF1",
    "eval_max_score_present_share_above": "detected",
}
"""Shares in [0, 1] of the validation split; what a run did not log is left out."""
SMOOTH_SHARE = 20  # terms are drawn as means over this part of the steps
RATE = {"learning_rate": "learning rate"}
_REDRAW_SECONDS, _REDRAW_SHARE = 2.0, 0.05  # at most so often, and at most this share of the time


class LiveLog(TrainerCallback):
    """Curves of training loss and validation metrics; a callback of a trainer that shows `widget`.

    Its last state is stored as a picture in the cell that shows it.
    """

    def __init__(self):
        self.log, self._shown = [], None
        self.readout, self.picture = widgets.Label(value="training has not started"), widgets.HTML()
        self.widget = StillBox(self.readout, self.picture)
        self._next_drawing = -math.inf
        self.redraw()

    def show(self):
        """Display the panel; call it once, before the training."""
        self._shown = display(self.widget, display_id=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add every logged entry with its step."""
        self.update({**(logs or {}), "step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the last state, which `update` may have left out, and put it where no kernel is."""
        self.redraw()
        figure, sentence = self.widget.still
        self.widget.still = (figure_picture(figure), sentence)
        if self._shown is not None:
            self._shown.update(self.widget)

    def update(self, log):
        """Add one entry, names to numbers, and redraw unless that would take time from the training."""
        self.log.append(dict(log))
        if time.monotonic() >= self._next_drawing:
            self.redraw()

    def redraw(self):
        """Draw everything logged so far."""
        started = time.monotonic()
        history = history_frame(self.log).rename(columns=METRICS)
        if "loss" in history:
            values = history["loss"].dropna()
            self.readout.value = f"step {values.index[-1]}: training loss {values.iloc[-1]:.3f}"
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        losses = ["loss"] if "loss" in history else []
        draw_lines(left, history, losses, xlabel="optimiser step", ylabel="training loss", log=True)
        metrics = [name for name in METRICS.values() if name in history]
        draw_lines(right, history, metrics, xlabel="optimiser step", ylabel="validation metric")
        right.set_ylim(-0.03, 1.03)
        self.picture.value = image_html(figure, self.readout.value, width="100%")
        self.widget.still = (figure, f"{self.readout.value}.") if self.log else ()
        ended = time.monotonic()
        self._next_drawing = ended + max(_REDRAW_SECONDS, (ended - started) / _REDRAW_SHARE)


def read_log(folder):
    """Read the log of a run folder, finished or not.

    Parameters
    ----------
    folder : os.PathLike
        With a ``curves.csv``.

    Returns
    -------
    pandas.DataFrame
        Index ``step``; the columns of `LOSSES`, `TERMS`, `METRICS` and `RATE` that were logged,
        under the names that they map to. ``attrs["kept_step"]`` is the step of the kept checkpoint,
        None if the run is not finished. InputError if there is no log or a damaged one.
    """
    folder = resolve(folder)
    history = history_frame(read_history(folder))
    names = {old: new for old, new in (LOSSES | TERMS | METRICS | RATE).items() if old in history}
    table = history[list(names)].rename(columns=names)
    path, kept = Path(folder) / METRICS_FILE, None
    if path.is_file():
        metrics = read_run_file(path)
        kept = metrics["best_step"] or metrics["steps"]
    table.attrs["kept_step"] = kept
    return table


def log_figure(table):
    """Draw a table of `read_log`: losses, their terms, detection metrics and the learning rate."""
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    window = max(len(table) // SMOOTH_SHARE, 1)
    panels = [
        (LOSSES, "loss", True),
        (TERMS, f"loss term, mean of {window} steps", True),
        (METRICS, "validation metric", False),
        (RATE, "learning rate", False),
    ]
    for ax, (names, ylabel, log) in zip(axes, panels, strict=True):
        present = [name for name in names.values() if name in table]
        drawn = table[present]
        if names is TERMS:
            drawn = drawn.dropna(how="all").rolling(window, min_periods=1).mean()
        draw_lines(ax, drawn, present, xlabel="optimiser step", ylabel=ylabel, log=log)
    axes[2].set_ylim(-0.03, 1.03)
    if (kept := table.attrs.get("kept_step")) is not None:
        for ax in axes:
            ax.axvline(kept, color="0.35", linestyle=":", marker="")
        axes[2].set_title(f"dotted: the kept step, {kept}", fontsize=9, loc="left")
    return figure


def log_sentence(table):
    """Say what a `log_figure` shows: first and last losses, the best of each metric, the peak rate."""
    parts = [f"{table.index[-1]} steps"]
    for name in LOSSES.values():
        values = table[name].dropna() if name in table else pd.Series(dtype=float)
        if len(values):
            parts.append(f"{name} {values.iloc[0]:.2f} to {values.iloc[-1]:.2f}")
    for name in METRICS.values():
        values = table[name].dropna() if name in table else pd.Series(dtype=float)
        if len(values):
            parts.append(f"{name} highest at step {values.idxmax()} with {values.max():.2f}")
    if "learning rate" in table:
        peak = table["learning rate"].idxmax()
        parts.append(f"learning rate highest at step {peak}")
    if (kept := table.attrs.get("kept_step")) is not None:
        parts.append(f"kept step {kept}")
    return "; ".join(parts) + "."
