"""How often the diagnosis names a planted fault; ``data/experiments/make_confusion.py`` asks it."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from helpers.causes import CAUSES
from helpers.files import DATA

CONFUSION_TABLE = DATA / "experiments" / "confusion.csv"
"""The committed table: one row per planted fault and per healthy run."""
NOTHING = "no cause"


def score(table):
    """Count how often the diagnosis was right.

    Parameters
    ----------
    table : pandas.DataFrame
        `CONFUSION_TABLE`: ``planted``, ``cause``, ``first``, ``found``.

    Returns
    -------
    dict
        ``faults``; ``named_first`` and ``among_found``, shares of the faults; ``healthy_runs`` and
        ``false_alarms``, healthy runs with a cause; ``missed`` and ``not_first``, names.
    """
    table = table.fillna("")
    is_fault = table["cause"] != NOTHING
    faults, healthy = table[is_fault], table[~is_fault]
    first = faults["first"] == faults["cause"]
    pairs = zip(faults["cause"], faults["found"], strict=True)
    among = np.array([cause in found.split() for cause, found in pairs], dtype=bool)
    return {
        "faults": len(faults),
        "named_first": float(first.mean()),
        "among_found": float(among.mean()),
        "healthy_runs": len(healthy),
        "false_alarms": int((healthy["first"] != NOTHING).sum()),
        "not_first": faults.loc[~first, "planted"].tolist(),
        "missed": faults.loc[~among, "planted"].tolist(),
    }


def confusion_figure(table):
    """Draw planted faults (rows) against the causes found (columns), from the table of `score`.

    A large square is the cause named first, a small one a further cause; a ring marks the planted one.
    """
    order = [*CAUSES, NOTHING]
    table = table.fillna("").sort_values("cause", key=lambda c: c.map(order.index), kind="stable")
    answers = [found.split() or [NOTHING] for found in table["found"]]
    columns = [code for code in order if code in {*table["cause"], *sum(answers, []), NOTHING}]
    size = (4 + 0.26 * len(columns), 2.6 + 0.24 * len(table))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    for place, (cause, codes) in enumerate(zip(table["cause"], answers, strict=True)):
        ax.plot(columns.index(cause), place, "o", color="0.4", markersize=9, mfc="none")
        for number, code in enumerate(codes):
            size = 5 if number == 0 else 2.5
            ax.plot(columns.index(code), place, "s", color="#0072B2", markersize=size)
    ax.set_yticks(range(len(table)), table["planted"], fontsize=8)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.margins(0.015)
    ax.set(xlabel="cause found", ylabel="planted fault")
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.invert_yaxis()
    return figure
