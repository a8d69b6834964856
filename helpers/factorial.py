"""Factors with two levels each: what each changes, with intervals over repetitions, and in words."""

from __future__ import annotations

from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from helpers.errors import InputError

INTERACTION = "interaction"
TIMES = " x "
"""Between the factors of an interaction: ``"objects x text_lora"``."""
CONFIDENCE = 0.95
_ROUNDING = 1e-12


class Estimate(NamedTuple):
    """A mean difference and its 95 % interval.

    Attributes
    ----------
    value, low, high : float
        Mean over the repetitions and the ends of the interval; NaN ends for one repetition.
    count : int
        Repetitions.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def is_clear(self):
        """bool: True if the interval is known and does not hold 0."""
        return self.low > 0 or self.high < 0

    def __str__(self):
        """Return ``+0.123 [+0.100, +0.146]``."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(values):
    """Estimate a mean from one value per repetition.

    Parameters
    ----------
    values : sequence of float
        For example the effect of a factor in each of five seeds.

    Returns
    -------
    Estimate
        With Student's t interval. In a balanced design that is the interval of a mixed model in
        which intercept and effect vary at random from seed to seed. It covers what it promises
        with five seeds, where a percentile bootstrap of the seeds covers some 82 %. Values that
        are all the same have an interval without width.

    Raises
    ------
    InputError
        Without a value, or with one that is missing.
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or np.isnan(values).any():
        raise InputError(f"no mean of {values.tolist()}", fix="give one value per repetition")
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, np.nan, np.nan, 1)
    if np.ptp(values) <= _ROUNDING * np.abs(values).max():
        return Estimate(mean, mean, mean, len(values))
    low, high = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return Estimate(mean, float(low), float(high), len(values))


def contrasts(table, factors, outcomes, block="seed"):
    """Compute all main effects and interactions of two factors within each repetition.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per run: the factors, the block and the outcomes as columns.
    factors : dict of str to tuple
        Factor to its two levels, the reference first.
    outcomes : sequence of str
        Numeric columns without gaps.
    block : str
        Column of the repetition; each must hold every combination of levels exactly once.

    Returns
    -------
    pandas.DataFrame
        MultiIndex ``effect`` and block, columns the outcomes. A main effect is the mean over the
        factor's second level minus that over its first. An interaction, ``"a x b"``, is the
        effect of b at the second level of a minus its effect at the first.

    Raises
    ------
    InputError
        When a combination is missing or repeated, or an outcome has a gap.
    """
    outcomes = list(outcomes)
    wanted = set(product(*factors.values()))
    rows = {}
    for repetition, runs in table.groupby(block):
        cells = runs.set_index(list(factors))[outcomes].astype(float)
        cells.index = cells.index.map(lambda key: key if isinstance(key, tuple) else (key,))
        if len(cells) != len(wanted) or set(cells.index) != wanted:
            raise InputError(
                f"{len(cells)} runs are not the {len(wanted)} combinations",
                where=f"{block} {repetition}",
                fix="give every combination of the levels exactly once",
            )
        if cells.isna().any(axis=None):
            names = ", ".join(cells.columns[cells.isna().any()])
            raise InputError(f"an outcome is missing: {names}", fix="leave the column out")
        signs = _signs(cells.index, factors)
        for name, sign in signs.items():
            rows[name, repetition] = cells.mul(sign, axis=0).sum() / (len(cells) / 2)
            if TIMES in name:
                rows[name, repetition] *= 2
    return pd.DataFrame(rows).T.rename_axis(["effect", block])


def _signs(index, factors):
    """Return, for every effect, +1 or -1 per cell."""
    single = {
        name: np.array([1.0 if key[place] == levels[1] else -1.0 for key in index])
        for place, (name, levels) in enumerate(factors.items())
    }
    pairs = {f"{a}{TIMES}{b}": single[a] * single[b] for a, b in combinations(factors, 2)}
    return single | pairs


def effect_table(table, factors, outcome, block="seed"):
    """Estimate every main effect and interaction of an outcome.

    Parameters
    ----------
    table, factors, block
        See `contrasts`.
    outcome : str
        A column.

    Returns
    -------
    pandas.DataFrame
        Index ``effect``; columns ``value``, ``low``, ``high``, ``count`` and ``is_clear``.
    """
    within = contrasts(table, factors, [outcome], block)[outcome]
    rows = {}
    for effect in dict.fromkeys(within.index.get_level_values("effect")):
        one = estimate(within.loc[effect])
        rows[effect] = one._asdict() | {"is_clear": one.is_clear}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("effect")


def paired_difference(table, outcome, reference, other, block="seed"):
    """Estimate how two kinds of runs differ, pairing those of the same repetition.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per run.
    outcome : str
        A column.
    reference, other : dict
        Column to value; each must pick exactly one run per repetition.
    block : str
        Column of the repetition.

    Returns
    -------
    Estimate
        Of `other` minus `reference`.

    Raises
    ------
    InputError
        If the runs do not pair up.
    """
    sides = []
    for picked in (reference, other):
        chosen = table
        for column, value in picked.items():
            chosen = chosen[chosen[column] == value]
        sides.append(chosen.set_index(block)[outcome].astype(float).sort_index())
    if not len(sides[0]) or sides[0].index.tolist() != sides[1].index.tolist():
        raise InputError(
            f"{len(sides[0])} runs with {reference} and {len(sides[1])} with {other} do not pair up",
            fix="let each pick one run per repetition",
        )
    return estimate(sides[1] - sides[0])


def one_step_effects(table, factors, state, outcome, block="seed"):
    """Estimate what changing one factor alone does, starting from one combination.

    Parameters
    ----------
    table, factors, block
        See `contrasts`.
    state : dict
        Factor to the level it starts from.
    outcome : str
        A column.

    Returns
    -------
    pandas.DataFrame
        Index ``factor``; columns ``from``, ``to``, and ``value``, ``low``, ``high``, ``count``,
        ``is_clear`` of the change.
    """
    rows = {}
    for factor, levels in factors.items():
        other = next(level for level in levels if level != state[factor])
        one = paired_difference(table, outcome, state, state | {factor: other}, block)
        rows[factor] = {"from": state[factor], "to": other, **one._asdict()}
        rows[factor]["is_clear"] = one.is_clear
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("factor")


def main_effects(cells):
    """Compute what each of two factors changes in a single repetition, and how they interact.

    Parameters
    ----------
    cells : pandas.DataFrame
        Four rows, one per combination, with a MultiIndex of two named levels of two values each;
        the first value met is the reference. Columns are numeric outcomes without gaps.

    Returns
    -------
    pandas.DataFrame
        Index ``effect``: the names of the two factors and ``interaction``; columns as in `cells`.
        See `contrasts`.

    Raises
    ------
    InputError
        When the rows are not the four combinations, or an outcome is missing.
    """
    names = list(cells.index.names)
    if cells.index.nlevels != 2 or None in names:
        raise InputError("the cells need an index of two named factors")
    levels = {name: tuple(cells.index.get_level_values(name).unique()) for name in names}
    if any(len(values) != 2 for values in levels.values()):
        raise InputError(
            f"{len(cells)} cells are no 2 x 2",
            where=TIMES.join(names),
            fix="give every combination of two values each exactly once",
        )
    table = cells.reset_index().assign(repetition=1)
    effects = contrasts(table, levels, cells.columns, "repetition").droplevel("repetition")
    return effects.rename(index={TIMES.join(names): INTERACTION})


def word_effects(effects, outcome, *, unit=""):
    """Say which of the two factors changes an outcome more, and by how much.

    Parameters
    ----------
    effects : pandas.DataFrame
        From `main_effects`.
    outcome : str
        A column of it.
    unit : str
        Written after the outcome, for example ``"(score)"``.

    Returns
    -------
    str
        One sentence, true whichever way the numbers fall; effects are compared by size after
        rounding to three decimals, as they are written.
    """
    values = effects[outcome].drop(INTERACTION).round(3) + 0.0  # no -0.000
    larger, smaller = values.abs().sort_values(ascending=False, kind="stable").index
    subject = f"{outcome} {unit}".strip()
    if not values.any():
        return f"{subject}: neither '{larger}' nor '{smaller}' changes it (both +0.000)."
    said = f"'{larger}' changes it by {values[larger]:+.3f}"
    other = f"'{smaller}' by {values[smaller]:+.3f}"
    if abs(values[larger]) == abs(values[smaller]):
        return f"{subject}: {said} and {other}: equally much."
    if values[smaller] == 0:
        return f"{subject}: {said}, {other}: only the first makes a difference."
    ratio = abs(values[larger] / values[smaller])
    return f"{subject}: {said}, {other}: the first is {ratio:.1f} times as large."
