"""Charts of bars: groups of numbers, and columns of a table by component."""

import textwrap
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.show.charts import BESIDE, COLOURS, dress

_HATCHES = ("", "//", "..", "xx")


def grouped_bars_figure(table, ylabel, *, top=None):
    """Draw a table as a group of bars per row, with their values; NaN leaves a bar out.

    The axis ends at `top`, for example 1 for a score.
    """
    figure = Figure(figsize=(min(2.5 + 1.1 * table.size, 10), 4), layout="constrained")
    ax = figure.subplots()
    turned = 90 if table.shape[1] > 3 else 0  # numbers of narrow bars would run into one another
    look = {"color": COLOURS, "edgecolor": "white", "width": 0.8, "rot": 0}
    table.rename(index=_wrap).plot.bar(ax=ax, **look)
    for bars, hatch in zip(ax.containers, cycle(_HATCHES)):
        for bar in bars:
            bar.set_hatch(hatch)
        ax.bar_label(bars, fmt=lambda value: _number(round(value, 3)), padding=2, rotation=turned)
    dress(ax, table.index.name or "", ylabel)
    ax.set_ylim(0, top * (1.2 if turned else 1.08) if top else None)
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


def _number(value):
    # whole thousands in full, else three significant digits
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _wrap(label):
    return textwrap.fill(str(label), 26)
