"""Charts of numbers: curves of runs, thresholds, scores, bars; and the schedule of a config."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from helpers.errors import InputError
from helpers.train.report import epoch_means

STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_name("course.mplstyle"), use_default_template=False
)
CYCLE = STYLE["axes.prop_cycle"]
COLOURS = tuple(dict.fromkeys(CYCLE.by_key()["color"]))
MARKERS = tuple(dict.fromkeys(CYCLE.by_key()["marker"]))
_LINES = {"markersize": STYLE["lines.markersize"], "linewidth": STYLE["lines.linewidth"]}
HATCHES = ("", "//", "..", "xx")
SMALLEST_SCORE = 1e-6
"""Left end of logarithmic score axes; smaller scores are counted there."""
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
_LABEL_CHARACTERS = 26


def threshold_figure(sweep, score_threshold=None):
    """Draw precision, recall and F1, and below them the number of detections, against the threshold.

    Parameters
    ----------
    sweep : pandas.DataFrame
        From `helpers.detect.metrics.threshold_sweep`.
    score_threshold : float, optional
        In [0, 1]; marked by a vertical line.
    """
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


def score_histogram_figure(present, absent, score_threshold=None, *, log=False):
    """Draw how the highest score of a query is distributed, for present and for absent prompts.

    Parameters
    ----------
    present, absent : array_like
        Highest scores in [0, 1]; either may be empty.
    score_threshold : float, optional
        Marked by a vertical line.
    log : bool
        Logarithmic score axis, for scores that are all near zero.
    """
    bins = np.geomspace(SMALLEST_SCORE, 1, 25) if log else np.linspace(0, 1, 21)
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    looks = ((COLOURS[0], "", 0.35), (COLOURS[1], HATCHES[2], 0))
    for name, scores, (colour, hatch, alpha) in zip(
        ("present", "absent"), (present, absent), looks, strict=True
    ):
        scores = np.clip(np.asarray(scores, dtype=float), bins[0], 1)
        label = f"prompt {name} ({len(scores)} queries)"
        style = {"edgecolor": colour, "hatch": hatch, "linewidth": 1.8}
        ax.hist(
            scores, bins, histtype="stepfilled", facecolor=(colour, alpha), label=label, **style
        )
    _mark_threshold(ax, score_threshold)
    if log:
        ax.set_xscale("log")
    dress(ax, "highest score of the query", "queries")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(**_BESIDE)
    return figure


def logit_heatmap_figure(logits, row_labels=None, *, rows="image", limits=None):
    """Draw logits as a map, one row per image or step and one column per query.

    Parameters
    ----------
    logits : array_like
        (n, Q), n and Q at least 1.
    row_labels : sequence of str, optional
        n texts; numbers by default.
    rows : str
        What a row is, for the axis.
    limits : tuple of float, optional
        Logits at the ends of the colour scale; by default the smallest and the largest.
    """
    logits = np.asarray(logits, dtype=float)
    if logits.ndim != 2 or logits.size == 0:
        raise InputError(f"logits of shape {logits.shape} are no map", fix="pass (n, Q), not empty")
    figure = Figure(figsize=(8, min(1.6 + 0.25 * len(logits), 9)), layout="constrained")
    ax = figure.subplots()
    low, high = limits or (logits.min(), logits.max())
    heatmap = ax.imshow(
        logits, cmap="cividis", aspect="auto", vmin=low, vmax=high, interpolation="nearest"
    )
    figure.colorbar(heatmap, ax=ax, label=f"logit ({logits.min():.1f} to {logits.max():.1f})")
    ax.set(xlabel="query", ylabel=rows)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if row_labels is None:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        ax.set_yticks(range(len(logits)), [_wrap(label) for label in row_labels])
    return figure


def grouped_bars_figure(table, ylabel, *, top=None):
    """Draw a table as groups of bars with their values, for example a 2 x 2 comparison.

    Parameters
    ----------
    table : pandas.DataFrame
        One group per row, one bar per column; the names of index and columns, where set, label
        the axis and the legend. A bar of NaN is missing.
    ylabel : str
        What the values are.
    top : float, optional
        Upper end of the axis, for example 1 for a score.
    """
    figure = Figure(figsize=(min(2.5 + 1.1 * table.size, 10), 4), layout="constrained")
    ax = figure.subplots()
    table.rename(index=_wrap).plot.bar(
        ax=ax, width=0.8, rot=0, edgecolor="white", color=_repeated(COLOURS, table.columns)
    )
    for bars, hatch in zip(ax.containers, _repeated(HATCHES, table.columns), strict=True):
        for bar in bars:
            bar.set_hatch(hatch)
        ax.bar_label(bars, fmt=_number, padding=2)
    dress(ax, table.index.name or "", ylabel)
    ax.set_ylim(0, top * 1.08 if top else None)
    ax.margins(y=0.12)
    ax.legend(title=table.columns.name, **_BESIDE)
    return figure


def component_bars_figure(table, columns):
    """Draw columns of a table side by side as horizontal bars, one row per component.

    Parameters
    ----------
    table : pandas.DataFrame
        For example from `helpers.model.adapter_report`; the index names the rows.
    columns : sequence of str
        Numeric columns, one panel each. A bar of NaN (no gradient yet) is missing.
    """
    size = (2.2 + 3.2 * len(columns), 1.2 + 0.45 * len(table))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    looks = zip(_repeated(COLOURS, columns), _repeated(HATCHES, columns), strict=True)
    for ax, column, (colour, hatch) in zip(axes, columns, looks, strict=True):
        labels = [_wrap(label) for label in table.index]
        bars = ax.barh(labels, table[column], color=colour, hatch=hatch, edgecolor="white")
        ax.bar_label(bars, fmt=_number, padding=3)
        dress(ax, _wrap(column), "")
        ax.margins(x=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    axes[0].invert_yaxis()
    return figure


def _repeated(looks, columns):
    """Return one look per column, from the start again where there are more columns."""
    return [looks[number % len(looks)] for number in range(len(columns))]


def _mark_threshold(ax, score_threshold):
    """Draw a vertical line at a threshold that is not None."""
    if score_threshold is not None:
        label = f"threshold {score_threshold:g}"
        ax.axvline(score_threshold, color="0.35", linestyle=":", marker="", label=label)


def _number(value):
    """Write a value beside its bar: whole thousands in full, else three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _wrap(label):
    """Break a long label over lines."""
    return textwrap.fill(str(label), _LABEL_CHARACTERS)


def dress(ax, xlabel, ylabel):
    """Label the axes, remove the frame that carries no information, and lay a faint grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)


_NOT_A_LOSS = ("epoch", "step", "learning_rate", "grad_norm", "total_flos", "train_", "eval_")


def history_frame(log_history):
    """Return the log of a trainer, a list of dicts with ``step``, as a table indexed by step."""
    if any("step" not in entry for entry in log_history):
        raise InputError("an entry of the log has no step", fix="pass trainer.state.log_history")
    if not log_history:
        return pd.DataFrame(index=pd.Index([], name="step"))
    return pd.DataFrame(log_history).groupby("step").last()


def loss_terms(history):
    """Return the columns of a `history_frame` that are terms of the training loss."""
    return [name for name in history if not name.startswith(_NOT_A_LOSS)]


def draw_lines(ax, table, columns, *, xlabel, ylabel, log=False):
    """Draw columns of a table against its index, each with a dash, a marker and a colour.

    Without a column the axes say that nothing is logged yet; a logarithmic axis (`log`) leaves out
    values that are not positive.
    """
    ax.set_prop_cycle(CYCLE)
    for name in columns:
        values = table[name].dropna().astype(float)
        values = values[values > 0] if log else values
        every = max(len(values) // 8, 1)
        ax.plot(values.index, values, label=name, markevery=every, **_LINES)
    dress(ax, xlabel, ylabel)
    if not columns:
        ax.text(0.5, 0.5, "nothing logged yet", ha="center", transform=ax.transAxes)
        return
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, handlelength=3.5
    )


def schedule_frame(configs, num_images, num_processes=1):
    """Compute the optimiser steps of some configs, and how far their warm-up gets.

    Parameters
    ----------
    configs : dict of str to helpers.config.Config
        By name; the profile's multipliers count.
    num_images : int
        Training images with a query.
    num_processes : int
        Processes that train together; each takes a batch of its own.

    Returns
    -------
    pandas.DataFrame
        One row per config: ``images per step``, ``epochs``, ``steps``, ``warm-up steps``, ``peak``
        (learning rate the config asks for) and ``reached`` (share of it that the warm-up attains).
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
    """Draw logged numbers of several runs by epoch, on common axes.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run to its ``trainer.state.log_history``.
    names : dict of str to str
        Logged name, for example ``"eval_AP50"``, to the label of its axis; one panel each. Numbers
        are averaged over an epoch. Losses get a logarithmic axis.
    """
    figure = Figure(figsize=(1 + 3.4 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        means = {run: pd.Series(epoch_means(log, name)) for run, log in histories.items()}
        log = name.endswith("loss")
        draw_lines(ax, pd.DataFrame(means), list(means), xlabel="epoch", ylabel=label, log=log)
    return figure
