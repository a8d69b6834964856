"""Charts of numbers: curves of runs, thresholds, scores, bars; and the schedule of a config."""

import math
import textwrap
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from helpers.errors import InputError
from helpers.train.report import epoch_means

_STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_name("course.mplstyle"), use_default_template=False
)
_CYCLE = _STYLE["axes.prop_cycle"]
COLOURS = tuple(dict.fromkeys(_CYCLE.by_key()["color"]))
MARKERS = tuple(dict.fromkeys(_CYCLE.by_key()["marker"]))
_LINES = {"markersize": _STYLE["lines.markersize"], "linewidth": _STYLE["lines.linewidth"]}
_HATCHES = ("", "//", "..", "xx")
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}


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
    _mark_threshold(lower, score_threshold)
    _mark_threshold(upper, score_threshold)
    upper.legend(**_BESIDE)
    return figure


def score_histogram_figure(present, absent, score_threshold=None):
    """Draw the highest scores in [0, 1], (n,) each, of queries with present and with absent prompts."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    for name, scores, colour, hatch, alpha in (
        ("present", present, COLOURS[0], "", 0.35),
        ("absent", absent, COLOURS[1], "..", 0),
    ):
        label = f"prompt {name} ({len(scores)} queries)"
        look = {"edgecolor": colour, "facecolor": (colour, alpha), "hatch": hatch, "linewidth": 1.8}
        ax.hist(scores, np.linspace(0, 1, 21), histtype="stepfilled", label=label, **look)
    _mark_threshold(ax, score_threshold)
    dress(ax, "highest score of the query", "queries")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(**_BESIDE)
    return figure


def logit_heatmap_figure(logits, *, rows="image", limits=None):
    """Draw logits, (n, Q) with n and Q at least 1, as a map of images or steps by queries.

    The colour scale ends at `limits`, by default the smallest and the largest logit.
    """
    logits = np.asarray(logits, dtype=float)
    if logits.ndim != 2 or logits.size == 0:
        raise InputError(f"logits of shape {logits.shape} are no map", fix="pass (n, Q), not empty")
    figure = Figure(figsize=(8, min(1.6 + 0.25 * len(logits), 9)), layout="constrained")
    ax = figure.subplots()
    low, high = limits or (logits.min(), logits.max())
    look = {"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"}
    heatmap = ax.imshow(logits, vmin=low, vmax=high, **look)
    figure.colorbar(heatmap, ax=ax, label=f"logit ({logits.min():.1f} to {logits.max():.1f})")
    ax.set(xlabel="query", ylabel=rows)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
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
    ax.legend(title=table.columns.name, **_BESIDE)
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


def _mark_threshold(ax, score_threshold):
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


def schedule_frame(configs, num_images, num_processes=1):
    """Compute the optimiser steps of some configs, and how far their warm-up gets.

    Parameters
    ----------
    configs : dict of str to helpers.config.Config
    num_images : int
        Training images with a query.
    num_processes : int

    Returns
    -------
    pandas.DataFrame
        A row per config; ``reached`` is the share of the ``peak`` that the warm-up attains.
    """
    rows = {}
    for name, config in configs.items():
        training = config.training
        per_step = training.batch_size * training.gradient_accumulation_steps * num_processes
        per_epoch = math.ceil(num_images / per_step)
        steps, warmup = per_epoch * config.effective_num_epochs, config.effective_warmup_steps
        rows[name] = {
            "images per step": per_step,
            "epochs": config.effective_num_epochs,
            "steps": steps,
            "warm-up steps": warmup,
            "peak": config.effective_learning_rate,
            "reached": min(steps / warmup, 1.0) if warmup else 1.0,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("config")


def runs_figure(histories, names):
    """Draw logged numbers of several runs by epoch; losses on a logarithmic axis.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run to its ``trainer.state.log_history``.
    names : dict of str to str
        Logged name, for example ``"eval_AP50"``, to the label of its axis; one panel each.
    """
    figure = Figure(figsize=(1 + 3.4 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        means = {run: pd.Series(epoch_means(log, name)) for run, log in histories.items()}
        log = name.endswith("loss")
        draw_lines(ax, pd.DataFrame(means), list(means), xlabel="epoch", ylabel=label, log=log)
    return figure
