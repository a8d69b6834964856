"""The tables of experiment and diagnosis: compared and drawn.

What they show holds for the base in the column ``word``; without it, for one that never met the word.
"""

from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes seconds, when it is first used
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers.causes import TABLE
from helpers.errors import InputError
from helpers.show.charts import COLOURS, MARKERS, dress

CONFIDENCE = 0.95
INTERACTION = "interaction"
TIMES = " x "  # between the factors of an interaction: "objects x text_lora"
SCOPE = "holds for a base that never met the word"
NOTHING = "no cause"
SHARES = {"detected_share": 26, "false_positive_rate": 90}
"""Responses that count, with what they count of: crack images and absent prompts of the test split."""
LABELS = {
    "detected_share": "crack images detected at 0.3",
    "max_score": "highest score, crack present",
    "AP50": "mask AP50",
    "union_iou": "union IoU",
    "false_positive_rate": "absent prompts answered at 0.3",
    "retention_AP": "AP on the base's own concepts",
}


class Estimate(NamedTuple):
    """A mean difference."""

    value: float
    low: float  # ends of its 95 % interval, NaN where unknown
    high: float
    count: int  # of repetitions

    @property
    def is_clear(self):
        """True if the interval is known and does not hold 0."""
        return self.low > 0 or self.high < 0

    def __str__(self):
        """Return ``+0.123 [+0.100, +0.146]``."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def wilson(share, count):
    """Return Wilson's interval of shares in [0, 1] of a count, which need not be whole: low, high."""
    z2 = scipy.stats.norm.ppf((1 + CONFIDENCE) / 2) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * share * (1 - share) / count + z2**2 / (4 * count**2)) / (1 + z2 / count)
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)


def effective_count(shares, count):
    """Return how many independent cases shares (repetitions, cells) are worth, at most ``count``."""
    # Shares that scatter over the repetitions are worth fewer (Korn and Graubard 1998). All
    # repetitions see the same images, so together they are not worth more.
    repetitions, mean = len(shares), shares.mean(axis=0)
    if repetitions < 2:
        return np.full(mean.shape, float(count))
    variance = shares.var(axis=0, ddof=1) / repetitions
    tail = (1 + CONFIDENCE) / 2
    few = (scipy.stats.norm.ppf(tail) / scipy.stats.t.ppf(tail, repetitions - 1)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = few * mean * (1 - mean) / variance
    return np.where(variance > 1e-12, np.minimum(worth, count), count)


def contrast(values, weights, count=None):
    """Estimate the weighted sum of values (repetitions, cells); ``count`` is what shares are of."""
    values, weights = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    if not len(values) or np.isnan(values).any():
        raise InputError(f"no mean of {values.tolist()}", fix="give one value per repetition")
    sums = values @ weights
    mean = float(sums.mean())
    if count is not None:
        # Wilson's intervals of the cells, joined as Newcombe joins two (1998; any sum: Zou and
        # Donner 2008): a width where all repetitions agree, and no end beyond what is possible.
        shares = values.mean(axis=0)
        ends = np.stack(wilson(shares, effective_count(values, count))) * weights
        below, above = weights * shares - ends.min(axis=0), ends.max(axis=0) - weights * shares
        low, high = mean - np.sqrt((below**2).sum()), mean + np.sqrt((above**2).sum())
    elif len(sums) == 1:
        low = high = np.nan
    elif np.ptp(sums) <= 1e-12 * np.abs(values).max():
        low = high = mean
    else:  # Student's covers what it promises with five repetitions, a bootstrap some 82 %
        low, high = scipy.stats.ttest_1samp(sums, 0.0).confidence_interval(CONFIDENCE)
    return Estimate(mean, float(low), float(high), len(sums))


def effect_weights(cells, factors):
    """Map each main effect, and each interaction ``"a x b"`` of two, to its weights (cells,)."""
    signs = {
        name: np.array([1.0 if cell[place] == levels[1] else -1.0 for cell in cells])
        for place, (name, levels) in enumerate(factors.items())
    }
    half = len(cells) / 2
    effects = {name: sign / half for name, sign in signs.items()}
    for a, b in combinations(factors, 2):
        effects[f"{a}{TIMES}{b}"] = 2 * signs[a] * signs[b] / half
    return effects


def effect_table(table, factors, outcome):
    """Estimate every main effect and interaction of an outcome.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per run; each ``seed`` holds every combination of levels exactly once.
    factors : dict of str to tuple
        Factor to its two levels, the reference first.
    outcome : str
        A numeric column without gaps.

    Returns
    -------
    pandas.DataFrame
        One row per ``effect``: ``value``, 95 % interval ``low``, ``high``, ``count`` of seeds,
        ``is_clear``. An interaction, ``"a x b"``, is the effect of b at the second level of a
        minus that at its first.
    """
    cells = list(product(*factors.values()))
    values = []
    for seed, runs in table.groupby("seed"):
        by_cell = runs.set_index(list(factors))[outcome]
        if len(runs) != len(cells) or set(by_cell.index) != set(cells):
            raise InputError(
                f"{len(runs)} runs are not the {len(cells)} combinations",
                where=f"seed {seed}",
                fix="give every combination of the levels exactly once",
            )
        values.append(by_cell.loc[cells])
    rows = {}
    for effect, weights in effect_weights(cells, factors).items():
        estimate = contrast(values, weights, SHARES.get(outcome))
        rows[effect] = estimate._asdict() | {"is_clear": estimate.is_clear}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("effect")


def _runs_of(table, levels):
    return table[(table[list(levels)] == pd.Series(levels)).all(axis=1)]


def paired_difference(table, outcome, reference, other):
    """Estimate how an outcome of two kinds of runs differs at the same seed.

    Parameters
    ----------
    table : pandas.DataFrame
    outcome : str
        A numeric column.
    reference, other : dict
        Column to value; each must pick exactly one run per ``seed``.

    Returns
    -------
    Estimate
        Of other minus reference, with its 95 % interval.
    """
    runs = [_runs_of(table, levels).set_index("seed") for levels in (reference, other)]
    sides = [chosen[outcome].astype(float).sort_index() for chosen in runs]
    if not len(sides[0]) or sides[0].index.tolist() != sides[1].index.tolist():
        raise InputError(
            f"{len(sides[0])} runs with {reference} and {len(sides[1])} with {other} do not pair up",
            fix="let each pick one run per seed",
        )
    return contrast(np.stack(sides, axis=1), [-1, 1], SHARES.get(outcome))


def main_effects(cells):
    """Compute what each of two factors changes in a single repetition, and how they interact.

    Parameters
    ----------
    cells : pandas.DataFrame
        Four rows with a MultiIndex of two named levels of two values each, the reference first;
        numeric outcomes without gaps.

    Returns
    -------
    pandas.DataFrame
        Index ``effect``: the two factors and ``interaction``; columns as in ``cells``.
    """
    names = list(cells.index.names)
    levels = {name: tuple(cells.index.get_level_values(name).unique()) for name in names}
    is_whole = set(cells.index) == set(product(*levels.values())) and len(cells) == 4
    if len(names) != 2 or None in names or not is_whole:
        raise InputError(
            f"{len(cells)} cells with the index {names} are no 2 x 2",
            fix="name two factors and give every combination of two values each exactly once",
        )
    if cells.isna().any(axis=None):
        gaps = ", ".join(cells.columns[cells.isna().any()])
        raise InputError(f"an outcome is missing: {gaps}", fix="leave the column out")
    weights = pd.DataFrame(effect_weights(cells.index, levels), index=cells.index)
    effects = weights.T @ cells.astype(float)
    return effects.rename(index={TIMES.join(names): INTERACTION}).rename_axis("effect")


def word_effects(effects, outcome):
    """Say which of the two factors of `main_effects` changes an outcome more, and by how much."""
    values = effects[outcome].drop(INTERACTION).round(3) + 0.0  # as written, but no -0.000
    larger, smaller = values.abs().sort_values(ascending=False, kind="stable").index
    if not values.any():
        return f"{outcome}: neither '{larger}' nor '{smaller}' changes it (both +0.000)."
    first = f"'{larger}' changes it by {values[larger]:+.3f}"
    second = f"'{smaller}' by {values[smaller]:+.3f}"
    if abs(values[larger]) == abs(values[smaller]):
        return f"{outcome}: {first} and {second}: equally much."
    if values[smaller] == 0:
        return f"{outcome}: {first}, {second}: only the first makes a difference."
    ratio = abs(values[larger] / values[smaller])
    return f"{outcome}: {first}, {second}: the first is {ratio:.1f} times as large."


def steps_table(table, factors, outcome):
    """Show what one change does from the failing state, and one fault from the working one.

    ``table`` and ``factors`` are those of `effect_table`, a factor's failing level first.

    Returns one row per ``state`` (failing, working) and factor ``changed``: ``change`` (the levels),
    ``before`` and ``after`` (means over the seeds), and the 95 % interval of their difference.
    """
    rows = {}
    for end, name in enumerate(("failing", "working")):
        state = {factor: levels[end] for factor, levels in factors.items()}
        before = _runs_of(table, state)[outcome].mean()
        for factor, levels in factors.items():
            other = levels[1 - end]
            step = paired_difference(table, outcome, state, state | {factor: other})
            rows[name, factor] = {
                "change": f"{state[factor]} to {other}",
                "before": before,
                "after": before + step.value,
                "low": step.low,
                "high": step.high,
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["state", "changed"])


def effects_figure(table, factors, outcomes):
    """Draw the main effects and interactions on several outcomes, with their intervals.

    ``table`` and ``factors`` are those of `effect_table`; each outcome has a panel. A filled marker
    stands for an interval that does not hold 0.
    """
    tables = [effect_table(table, factors, outcome) for outcome in outcomes]
    names = [effect.replace("_", " ") for effect in tables[0].index]
    labels = [f"change of\n{LABELS.get(outcome, outcome)}" for outcome in outcomes]
    figure, axes = _panels((2.4 + 2.9 * len(outcomes), 4.4), names, labels)
    for number, (ax, effects) in enumerate(zip(axes, tables, strict=True)):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for place, row in enumerate(effects.itertuples()):
            ax.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
            face = colour if row.is_clear else "white"
            ax.plot(row.value, place, marker, color=colour, markerfacecolor=face)
        ax.axvline(0, color="0.35", linestyle=":")
    return figure


def levels_figure(table, column, outcomes, *, base=None):
    """Draw every run of every level of one factor as a dot, with the mean as a bar.

    Each outcome has a panel; a dotted line is what ``base``, a row of responses, answers.
    """
    levels = list(dict.fromkeys(table[column]))
    names = [str(level).replace("_", " ") for level in levels]
    size = (2.6 + 2.7 * len(outcomes), 1.4 + 0.36 * len(levels))
    figure, axes = _panels(size, names, [LABELS.get(outcome, outcome) for outcome in outcomes])
    for number, (ax, outcome) in enumerate(zip(axes, outcomes, strict=True)):
        for place, level in enumerate(levels):
            values = table.loc[table[column] == level, outcome]
            ax.barh(place, values.mean(), color=COLOURS[number % len(COLOURS)], alpha=0.35)
            ax.plot(values, [place] * len(values), "o", color="black", markersize=3)
        if base is not None:
            ax.axvline(base[outcome], color="0.35", linestyle=":")
    return figure


def _panels(size, names, labels):
    """Return a figure and a panel per label, side by side, with one named row per name."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(SCOPE, fontsize="small", color="0.35")
    for ax, label in zip(axes, labels, strict=True):
        dress(ax, label, "")
    return figure, axes


def score(table):
    """Count how often the diagnosis was right in a table of planted faults.

    Returns a dict. Of the rows whose fault can be seen from their ``view``: ``faults``, their number;
    ``named_first`` and ``among_found``, shares; ``not_first`` and ``missed``, "fault (view)".
    ``unseen``: rows whose fault cannot be seen; ``healthy_runs``; ``false_alarms``, of these with a
    cause.
    """
    table = table.fillna("")
    is_fault, is_seen = table["cause"] != NOTHING, table["seen"].astype(str) == "True"
    faults, healthy = table[is_fault & is_seen], table[~is_fault]
    names = faults["planted"] + " (" + faults["view"] + ")"
    first = faults["first"] == faults["cause"]
    pairs = zip(faults["cause"], faults["found"], strict=True)
    among = np.array([cause in found.split() for cause, found in pairs], dtype=bool)
    return {
        "faults": len(faults),
        "named_first": float(first.mean()),
        "among_found": float(among.mean()),
        "unseen": int((is_fault & ~is_seen).sum()),
        "healthy_runs": len(healthy),
        "false_alarms": int((healthy["first"] != NOTHING).sum()),
        "not_first": names[~first].tolist(),
        "missed": names[~among].tolist(),
    }


RIGHT, LATE = "named first; healthy: no cause", "named, but not first"
BLIND, MISLED = (
    "cannot be seen from there, nothing named",
    "cannot be seen from there, another named",
)
WRONG = "missed; healthy: a cause named"
MARKS = {
    RIGHT: {"marker": "o", "color": COLOURS[0]},
    LATE: {"marker": "s", "color": COLOURS[1], "mfc": "none"},
    BLIND: {"marker": ".", "color": "0.6"},
    MISLED: {"marker": "^", "color": COLOURS[2], "mfc": "none"},
    WRONG: {"marker": "X", "color": COLOURS[3]},
}
"""How an examination may end, and its mark in a figure."""


def outcomes_of(table):
    """Say of each row of the table of `score` how the examination ended: a series of keys of `MARKS`."""
    table = table.fillna("")

    def outcome(row):
        codes = row["found"].split()
        if row["cause"] == NOTHING:
            return WRONG if codes else RIGHT
        if row["cause"] in codes:
            return RIGHT if codes[0] == row["cause"] else LATE
        if str(row["seen"]) == "True":
            return WRONG
        return MISLED if codes else BLIND

    return table.apply(outcome, axis=1)


def confusion_figure(table, *, blocks=3):
    """Draw how each examination of the table of `score` ended, one row per planted fault.

    Rows are in the order of the causes in the catalogue; each block has a column per view.
    """
    order = [*TABLE, NOTHING]
    table = table.assign(outcome=outcomes_of(table))
    table = table.sort_values("cause", key=lambda c: c.map(order.index), kind="stable")
    rows, views = list(dict.fromkeys(table["planted"])), list(dict.fromkeys(table["view"]))
    height = -(-len(rows) // blocks)
    figure = Figure(figsize=(10, 1.2 + 0.21 * height), layout="constrained")
    axes = figure.subplots(1, blocks, squeeze=False)[0]
    for row in table.itertuples():
        block, place = divmod(rows.index(row.planted), height)
        axes[block].plot(views.index(row.view), place, ls="none", ms=6, **MARKS[row.outcome])
    for block, ax in enumerate(axes):
        own = rows[block * height : (block + 1) * height]
        ax.set_yticks(range(len(own)), own, fontsize=8)
        ax.set_xticks(range(len(views)), views, fontsize=8)
        ax.set(xlim=(-0.5, len(views) - 0.5), ylim=(height - 0.5, -0.5))
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
    present = [name for name in MARKS if (table["outcome"] == name).any()]
    handles = [Line2D([], [], ls="none", label=name, **MARKS[name]) for name in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure
