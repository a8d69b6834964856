"""Charts of numbers: curves of runs, thresholds, scores, bars; and the schedule of a config."""

import textwrap
from itertools import cycle
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
_HATCHES = ("", "//", "..", "xx")
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


def grouped_bars_figure(table, ylabel, *, top=None):
    """Draw a table as a group of bars per row, with their values; NaN leaves a bar out.

    The axis ends at `top`, for example 1 for a score.
    """
    figure = Figure(figsize=(min(2.5 + 1.1 * table.size, 10), 4), layout="constrained")
    ax = figure.subplots()
    look = {"color": COLOURS, "edgecolor": "white", "width": 0.8, "rot": 0}
    table.rename(index=_wrap).plot.bar(ax=ax, **look)
    for bars, hatch in zip(ax.containers, cycle(_HATCHES)):
        for bar in bars:
            bar.set_hatch(hatch)
        ax.bar_label(bars, fmt=lambda value: _number(round(value, 3)), padding=2)
    dress(ax, table.index.name or "", ylabel)
    ax.set_ylim(0, top * 1.08 if top else None)
    ax.margins(y=0.12)
    ax.legend(title=table.columns.name, **BESIDE)
    return figure


def component_bars_figure(table, columns):
    """Draw numeric columns side by side as horizontal bars, a row per component; NaN leaves a bar out."""
    size = (2.2 + 3.2 * len(columns), 1.2 + 0.45 * len(table))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    table = table.rename(index=_wrap)
    looks = zip(axes, cycle(COLOURS), cycle(_HATCHES))
    for column, (ax, colour, hatch) in zip(columns, looks, strict=True):
        bars = ax.barh(table.index, table[column], color=colour, hatch=hatch, edgecolor="white")
        ax.bar_label(bars, fmt=_number, padding=3)
        dress(ax, _wrap(column), "")
        ax.margins(x=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    axes[0].invert_yaxis()
    return figure


def mark_threshold(ax, score_threshold):
    """Draw a score threshold, unless it is None, as a vertical line."""
    if score_threshold is not None:
        label = f"threshold {score_threshold:g}"
        ax.axvline(score_threshold, color="0.35", linestyle=":", marker="", label=label)


def _number(value):
    # whole thousands in full, else three significant digits
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _wrap(label):
    return textwrap.fill(str(label), 26)


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
