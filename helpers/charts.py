"""Charts of numbers: scores against the threshold, distributions, comparisons.

Lines differ in dash and marker as well as in colour, bars in hatching, and values stand beside
the bars. Curves over the steps of training are in `helpers.training_curves`, pictures of images in
`helpers.plots`.
"""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.errors import InputError

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
        `helpers.evaluation.threshold_sweep` returns them.
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
        For example the report of `helpers.adapters.adapter_report`; the index names the rows.
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
