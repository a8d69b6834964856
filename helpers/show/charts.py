"""Charts of numbers: curves of runs and thresholds, and what all charts share."""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from helpers.errors import InputError

_STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_name("course.mplstyle"), use_default_template=False
)
_CYCLE = _STYLE["axes.prop_cycle"]
COLOURS = tuple(dict.fromkeys(_CYCLE.by_key()["color"]))
MARKERS = tuple(dict.fromkeys(_CYCLE.by_key()["marker"]))
_LINES = {"markersize": _STYLE["lines.markersize"], "linewidth": _STYLE["lines.linewidth"]}
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}


def threshold_figure(sweep, score_threshold=None):
    """Draw a table of `helpers.detect.threshold_sweep`, and mark a score threshold in [0, 1]."""
    table = sweep.set_index("threshold")
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    draw_lines(upper, table, ["precision", "recall", "f1"], xlabel="", ylabel="at IoU 0.5")
    lower.step(table.index, table["count"], where="mid", color="black", marker="D", markersize=4)
    dress(lower, "score threshold", "detections")
    upper.set_ylim(-0.03, 1.03)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    mark_threshold(lower, score_threshold)
    mark_threshold(upper, score_threshold)
    upper.legend(**BESIDE)
    return figure


def mark_threshold(ax, score_threshold):
    """Draw a score threshold, unless it is None, as a vertical line."""
    if score_threshold is not None:
        label = f"threshold {score_threshold:g}"
        ax.axvline(score_threshold, color="0.35", linestyle=":", marker="", label=label)


def dress(ax, xlabel, ylabel):
    """Label the axes, remove the frame that carries no information, and lay a faint grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)


def history_frame(log_history):
    """Return the log of a trainer as a table.

    Parameters
    ----------
    log_history : list of dict
        ``trainer.state.log_history``; each entry has ``step``.

    Returns
    -------
    pandas.DataFrame
        Index ``step``, one column per logged name; NaN where a name was not logged.
    """
    if any("step" not in entry for entry in log_history):
        raise InputError("an entry of the log has no step", fix="pass trainer.state.log_history")
    return pd.DataFrame(log_history or {"step": []}).groupby("step").last()


def draw_lines(ax, table, columns, *, xlabel, ylabel, log=False):
    """Draw columns of a table against its index, each with a dash, a marker and a colour.

    A logarithmic axis leaves out what is not positive; without a column the axes say so.
    """
    ax.set_prop_cycle(_CYCLE)
    for name in columns:
        values = table[name].dropna().astype(float)
        values = values[values > 0] if log else values
        ax.plot(values.index, values, label=name, markevery=max(len(values) // 8, 1), **_LINES)
    dress(ax, xlabel, ylabel)
    if not columns:
        ax.text(0.5, 0.5, "nothing logged yet", ha="center", transform=ax.transAxes)
        return
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "frameon": False}
    ax.legend(ncols=2, handlelength=3.5, **below)
