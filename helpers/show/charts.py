"""What a config's epochs, batches and warm-up come to on a dataset, and curves of several runs."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from helpers.errors import InputError
from helpers.train.report import epoch_means

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
"""Okabe-Ito palette, yellow left out: it is too pale for lines on white."""
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx")
SMALLEST_SCORE = 1e-6
"""Left end of logarithmic score axes; smaller scores are counted there."""
_LABEL_CHARACTERS = 26


def threshold_figure(sweep, score_threshold=None):
    """Draw precision, recall and F1, and below them the number of detections, against the threshold.

    Parameters
    ----------
    sweep : pandas.DataFrame
        Columns ``threshold``, ``count``, ``precision``, ``recall``, ``f1``, as
        `helpers.detect.metrics.threshold_sweep` returns them.
    score_threshold : float, optional
        In [0, 1]; marked by a vertical line.

    Returns
    -------
    matplotlib.figure.Figure
    """
    table = sweep.set_index("threshold")
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for number, name in enumerate(["precision", "recall", "f1"]):
        style = {"color": COLOURS[number], "linestyle": DASHES[number], "marker": MARKERS[number]}
        upper.plot(table.index, table[name], label=name, markersize=5, **style)
    lower.step(
        table.index, table["count"], where="mid", color=COLOURS[4], marker=MARKERS[3], markersize=4
    )
    dress(upper, "", "at IoU 0.5")
    dress(lower, "score threshold", "detections")
    upper.set_ylim(-0.03, 1.03)
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_locator(MaxNLocator(integer=True))
    if score_threshold is not None:
        for ax in (upper, lower):
            ax.axvline(score_threshold, color="0.35", linestyle=":")
        upper.plot([], [], color="0.35", linestyle=":", label=f"threshold {score_threshold:g}")
    upper.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=3.5)
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

    Returns
    -------
    matplotlib.figure.Figure
    """
    bins = np.geomspace(SMALLEST_SCORE, 1, 25) if log else np.linspace(0, 1, 21)
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    for number, (name, scores) in enumerate({"present": present, "absent": absent}.items()):
        scores = np.clip(np.asarray(scores, dtype=float), bins[0], 1)
        label = f"prompt {name} ({len(scores)} queries)"
        style = {"edgecolor": COLOURS[number], "hatch": HATCHES[2 * number], "linewidth": 1.8}
        face = (
            *[int(COLOURS[number][i : i + 2], 16) / 255 for i in (1, 3, 5)],
            0.35 if number == 0 else 0,
        )
        ax.hist(scores, bins, histtype="stepfilled", facecolor=face, label=label, **style)
    if score_threshold is not None:
        ax.axvline(
            score_threshold, color="0.35", linestyle=":", label=f"threshold {score_threshold:g}"
        )
    if log:
        ax.set_xscale("log")
    dress(ax, "highest score of the query", "queries")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def logit_heatmap_figure(logits, row_labels=None, *, rows="image", limits=None):
    """Draw logits as a map, one row per image or step and one column per query.

    Parameters
    ----------
    logits : array_like
        (n, Q), n and Q at least 1.
    row_labels : sequence of str, optional
        n texts for the rows; numbers by default.
    rows : str
        What a row is, for the axis.
    limits : tuple of float, optional
        Logits at the two ends of the colour scale; by default the smallest and the largest.

    Returns
    -------
    matplotlib.figure.Figure
    """
    logits = np.asarray(logits, dtype=float)
    if logits.ndim != 2 or logits.size == 0:
        raise InputError(f"logits of shape {logits.shape} are no map", fix="pass (n, Q), not empty")
    figure = Figure(figsize=(8, min(1.6 + 0.25 * len(logits), 9)), layout="constrained")
    ax = figure.subplots()
    low, high = limits or (logits.min(), logits.max())
    shown = ax.imshow(
        logits, cmap="cividis", aspect="auto", vmin=low, vmax=high, interpolation="nearest"
    )
    figure.colorbar(shown, ax=ax, label=f"logit ({logits.min():.1f} to {logits.max():.1f})")
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
        the axis and the legend. Not-a-number is shown as a missing bar.
    ylabel : str
        What the values are.
    top : float, optional
        Upper end of the axis, for example 1 for a score.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(min(2.5 + 1.1 * table.size, 10), 4), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(table.columns)
    for number, column in enumerate(table):
        places = np.arange(len(table)) + (number - (len(table.columns) - 1) / 2) * width
        style = {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}
        bars = ax.bar(
            places, table[column], width * 0.92, label=str(column), edgecolor="white", **style
        )
        ax.bar_label(bars, fmt=_number, padding=2)
    ax.set_xticks(range(len(table)), [_wrap(label) for label in table.index])
    dress(ax, table.index.name or "", ylabel)
    ax.set_ylim(0, top * 1.08 if top else None)
    ax.margins(y=0.12)
    title = table.columns.name
    ax.legend(title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def component_bars_figure(table, columns):
    """Draw columns of a table side by side as horizontal bars, one row per component.

    Parameters
    ----------
    table : pandas.DataFrame
        For example the report of `helpers.model.lora.adapter_report`; the index names the rows.
    columns : sequence of str
        Numeric columns, one panel each. Not-a-number (no gradient yet) is shown as a missing bar.

    Returns
    -------
    matplotlib.figure.Figure
    """
    size = (2.2 + 3.2 * len(columns), 1.2 + 0.45 * len(table))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for number, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        style = {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}
        bars = ax.barh(
            [_wrap(label) for label in table.index], table[column], edgecolor="white", **style
        )
        ax.bar_label(bars, fmt=_number, padding=3)
        dress(ax, _wrap(column), "")
        ax.margins(x=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(3))
    axes[0].invert_yaxis()
    return figure


def _number(value):
    """Write a value beside its bar: whole thousands in full, else three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _wrap(label):
    """Break a long label over lines."""
    return textwrap.fill(str(label), _LABEL_CHARACTERS)


def dress(ax, xlabel, ylabel):
    """Label the axes, remove the frame that carries no information, and lay a faint grid.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    xlabel, ylabel : str
    """
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)


_NOT_A_LOSS = ("epoch", "step", "learning_rate", "grad_norm", "total_flos", "train_", "eval_")
_NOT_A_METRIC = ("eval_loss", "eval_runtime", "per_second")


def history_frame(log_history):
    """Turn the log of a trainer into a table.

    Parameters
    ----------
    log_history : sequence of dict
        ``trainer.state.log_history``: each entry has ``step`` and some numbers.

    Returns
    -------
    pandas.DataFrame
        Index ``step``, one column per logged name, NaN where a step logged nothing under it;
        entries of one step are joined.

    Raises
    ------
    InputError
        When an entry has no step.
    """
    if any("step" not in entry for entry in log_history):
        raise InputError("an entry of the log has no step", fix="pass trainer.state.log_history")
    if not log_history:
        return pd.DataFrame(index=pd.Index([], name="step"))
    return pd.DataFrame(log_history).groupby("step").last()


def loss_terms(history):
    """Return the columns of a `history_frame` that are terms of the training loss."""
    return [name for name in history if not name.startswith(_NOT_A_LOSS)]


def validation_metrics(history):
    """Return the columns of a `history_frame` that are metrics of the validation split."""
    names = [name for name in history if name.startswith("eval_")]
    return [name for name in names if not any(part in name for part in _NOT_A_METRIC)]


def draw_lines(ax, table, columns, *, xlabel, ylabel, log=False):
    """Draw columns of a table against its index, each with a dash, a marker and a colour.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    table : pandas.DataFrame
    columns : sequence of str
        May be empty: then the axes say that there is nothing yet.
    xlabel, ylabel : str
    log : bool
        Logarithmic y axis; values that are not positive are left out.
    """
    for number, name in enumerate(columns):
        values = table[name].dropna().astype(float)
        values = values[values > 0] if log else values
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.4}
        ax.plot(values.index, values, markevery=max(len(values) // 8, 1), label=name, **style)
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


def curves_figure(log_history, terms=None, metrics=None):
    """Draw the terms of the training loss and the validation metrics against the step.

    Parameters
    ----------
    log_history : sequence of dict
        See `history_frame`.
    terms, metrics : sequence of str, optional
        Names to draw; by default all that `loss_terms` and `validation_metrics` find.

    Returns
    -------
    matplotlib.figure.Figure
    """
    history = history_frame(log_history)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = loss_terms(history) if terms is None else terms
    metrics = validation_metrics(history) if metrics is None else metrics
    draw_lines(left, history, terms, xlabel="optimiser step", ylabel="training loss", log=True)
    draw_lines(right, history, metrics, xlabel="optimiser step", ylabel="validation metric")
    return figure


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
        One row per config: ``images per step``, ``epochs``, ``steps`` (of the optimiser, in all),
        ``warm-up steps``, ``peak`` (learning rate the config asks for) and ``reached`` (share of
        it that the linear warm-up attains before the run ends, 1 if it ends in time).
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
    """Draw some logged numbers of several runs by epoch, on common axes.

    Parameters
    ----------
    histories : dict of str to list of dict
        Name of a run to its ``trainer.state.log_history``.
    names : dict of str to str
        Logged name, for example ``"loss"`` or ``"eval_AP50"``, to the label of its axis; one panel
        each. Numbers logged more than once in an epoch are averaged over it. Losses get a
        logarithmic axis.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(1 + 3.4 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, (name, label) in zip(axes, names.items(), strict=True):
        means = {run: pd.Series(epoch_means(log, name)) for run, log in histories.items()}
        log = name.endswith("loss")
        draw_lines(ax, pd.DataFrame(means), list(means), xlabel="epoch", ylabel=label, log=log)
    return figure
