"""Two factors with two levels each: what each changes, and a sentence that says so."""

from __future__ import annotations

import pandas as pd

from helpers.errors import InputError

INTERACTION = "interaction"


def main_effects(cells):
    """Compute what each of two factors changes on average, and whether they depend on each other.

    Parameters
    ----------
    cells : pandas.DataFrame
        Four rows, one per combination, with a MultiIndex of two named levels of two values each;
        the first value met is the reference. Columns are numeric outcomes without gaps.

    Returns
    -------
    pandas.DataFrame
        Index ``effect``: the names of the two factors and ``interaction``; columns as in `cells`.
        A factor's effect is the mean of its two cells minus the mean of its two reference cells.
        The interaction is the effect of the second factor in the first factor's other level minus
        its effect in the reference level.

    Raises
    ------
    InputError
        When the rows are not the four combinations, or an outcome is missing.
    """
    if cells.index.nlevels != 2 or None in cells.index.names:
        raise InputError("the cells need an index of two named factors")
    first, second = (list(dict.fromkeys(cells.index.get_level_values(n))) for n in (0, 1))
    combinations = {(a, b) for a in first for b in second}
    if len(first) != 2 or len(second) != 2 or len(cells) != 4 or set(cells.index) != combinations:
        raise InputError(
            f"{len(cells)} cells are no 2 x 2",
            where=" x ".join(cells.index.names),
            fix="give every combination of two values each exactly once",
        )
    if cells.isna().any(axis=None):
        names = ", ".join(cells.columns[cells.isna().any()])
        raise InputError(f"an outcome is missing: {names}", fix="leave the column out")
    (a, b), (c, d) = ([cells.loc[(one, other)].astype(float) for other in second] for one in first)
    rows = {
        cells.index.names[0]: (c + d - a - b) / 2,
        cells.index.names[1]: (b + d - a - c) / 2,
        INTERACTION: (d - c) - (b - a),
    }
    return pd.DataFrame(rows).T.rename_axis("effect")


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
