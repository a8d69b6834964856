"""The committed tables of the experiment: loaded, checked against the designs, and drawn."""

from __future__ import annotations

from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from helpers.errors import InputError
from helpers.files import ROOT, resolve
from helpers.lab.designs import SEEDS, cells_of
from helpers.lab.experiment import DATA_DIR, RESPONSES, TABLES, TEXT_COLUMNS
from helpers.show.charts import COLOURS, MARKERS, dress

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


BASE_TABLE = "base"
FACTORS = {
    "causes": {
        "objects": ("no", "yes"),
        "prompt": ("object", "crack"),
        "text_lora": ("off", "on"),
        "negatives": (0, 3),
    },
    "schedule": {"schedule": ("failing", "fixed"), "text_lora": ("off", "on")},
}
"""Factors of the two factorial designs with their levels, the document's position first."""
LABELS = {
    "detected_share": "crack images detected at 0.3",
    "max_score": "highest score, crack present",
    "AP50": "mask AP50",
    "union_iou": "union IoU",
    "cgF1": "cgF1",
    "IL_MCC": "IL_MCC",
    "false_positive_rate": "absent prompts answered at 0.3",
    "retention_AP": "AP on the base's own concepts",
}
"""Responses as one would say them."""


def tables_folder(path):
    """Find the folder of the tables, from wherever a notebook or command runs.

    Parameters
    ----------
    path : str or os.PathLike
        A relative one is seen from the current folder, the repository or ``notebooks/``.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    InputError
        If it is no folder.
    """
    for folder in (resolve(path), ROOT / "notebooks" / path):
        if folder.is_dir():
            return folder.resolve()
    raise InputError(f"{str(path)!r} is no folder", where="tables_dir", fix="run `make experiment`")


def load_table(design, folder=TABLES, *, profile="tiny"):
    """Read a table and make sure that it is the whole design, made with the present configs.

    Parameters
    ----------
    design : str
        Key of `helpers.lab.designs.DESIGNS`.
    folder : os.PathLike
    profile : str
        Of the configs that the rows' hashes are compared with.

    Returns
    -------
    pandas.DataFrame
        One row per run: factors, ``seed``, `helpers.lab.experiment.RESPONSES` and what was run.

    Raises
    ------
    InputError
        If the table is missing, incomplete, has a gap, or was made with another configuration.
    """
    path = folder / f"{design}.csv"
    if not path.is_file():
        raise InputError("no such table", where=path, fix="run `make experiment`")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=TEXT_COLUMNS)
    cells = cells_of(design, SEEDS)
    names = list(cells[0].factors)
    levels = {
        tuple(str(value) for value in row)
        for row in table[[*names, "seed"]].itertuples(index=False)
    }
    wanted = {(*map(str, cell.factors.values()), str(cell.seed)) for cell in cells}
    if levels != wanted or len(table) != len(cells):
        raise InputError(
            f"{len(table)} rows are not the {len(cells)} runs of the design '{design}'",
            where=path,
            fix="run `make experiment` to the end",
        )
    if table[list(RESPONSES)].isna().any(axis=None):
        raise InputError("a response is missing", where=path, fix="run `make experiment` again")
    hashes = {cell.config(profile, DATA_DIR).fingerprint() for cell in cells}
    if set(table["config_hash"]) != hashes:
        raise InputError(
            "the rows were made with other configurations than the present ones",
            where=path,
            fix="run `make experiment` again, or restore the configs",
        )
    return table


def steps_table(table, outcome):
    """Show what one change does from the failing state, and one fault from the working one.

    Parameters
    ----------
    table : pandas.DataFrame
        The design ``causes``, from `load_table`.
    outcome : str
        A response.

    Returns
    -------
    pandas.DataFrame
        Index ``state`` (failing, working) and the factor that is changed; columns ``change`` (its
        levels), ``before`` and ``after`` (means over the seeds), and the ``low`` and ``high`` end
        of the 95 % interval of the difference.
    """
    factors = FACTORS["causes"]
    rows = {}
    for end, name in enumerate(("failing", "working")):
        state = {factor: levels[end] for factor, levels in factors.items()}
        steps = one_step_effects(table, factors, state, outcome)
        before = table.loc[(table[list(state)] == pd.Series(state)).all(axis=1), outcome].mean()
        for factor, step in steps.iterrows():
            rows[name, factor] = {
                "change": f"{step['from']} to {step['to']}",
                "before": before,
                "after": before + step["value"],
                "low": step["low"],
                "high": step["high"],
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["state", "changed"])


def load_base_row(folder=TABLES):
    """Read what the base answers without any adapter.

    Parameters
    ----------
    folder : os.PathLike

    Returns
    -------
    pandas.Series
        `helpers.lab.experiment.RESPONSES` by name.
    """
    path = folder / f"{BASE_TABLE}.csv"
    if not path.is_file():
        raise InputError("no such table", where=path, fix="run `make experiment`")
    return pd.read_csv(path).iloc[0][list(RESPONSES)].astype(float)


def effects_figure(table, factors, outcomes):
    """Draw the main effects and interactions on several outcomes, with their intervals.

    Parameters
    ----------
    table : pandas.DataFrame
        From `load_table`.
    factors : dict
        See `helpers.lab.statistics.contrasts`.
    outcomes : sequence of str
        One panel each.

    Returns
    -------
    matplotlib.figure.Figure
        A filled marker stands for an interval that does not hold 0.
    """
    figure = Figure(figsize=(2.4 + 2.9 * len(outcomes), 4.4), layout="constrained")
    axes = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    for number, (ax, outcome) in enumerate(zip(axes, outcomes, strict=True)):
        effects = effect_table(table, factors, outcome)
        for place, row in enumerate(effects.itertuples()):
            colour = COLOURS[number % len(COLOURS)]
            ax.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
            face = colour if row.is_clear else "white"
            ax.plot(
                row.value, place, MARKERS[number % len(MARKERS)], color=colour, markerfacecolor=face
            )
        ax.axvline(0, color="0.35", linestyle=":")
        dress(ax, f"change of\n{LABELS.get(outcome, outcome)}", "")
        ax.set_yticks(range(len(effects)), [name.replace("_", " ") for name in effects.index])
    axes[0].invert_yaxis()
    return figure


def levels_figure(table, column, outcomes, *, order=None, base=None):
    """Draw every run of every level of one factor as a dot, with the mean as a bar.

    Parameters
    ----------
    table : pandas.DataFrame
    column : str
        The factor.
    outcomes : sequence of str
        One panel each.
    order : sequence, optional
        Levels from top to bottom; by default as they come.
    base : pandas.Series, optional
        What the base answers: a dotted line.

    Returns
    -------
    matplotlib.figure.Figure
    """
    levels = list(dict.fromkeys(table[column])) if order is None else list(order)
    size = (2.6 + 2.7 * len(outcomes), 1.4 + 0.36 * len(levels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    for number, (ax, outcome) in enumerate(zip(axes, outcomes, strict=True)):
        for place, level in enumerate(levels):
            values = table.loc[table[column] == level, outcome]
            ax.barh(place, values.mean(), color=COLOURS[number % len(COLOURS)], alpha=0.35)
            ax.plot(values, [place] * len(values), "o", color="black", markersize=3)
        if base is not None:
            ax.axvline(base[outcome], color="0.35", linestyle=":")
        dress(ax, LABELS.get(outcome, outcome), "")
        ax.set_yticks(range(len(levels)), [str(level).replace("_", " ") for level in levels])
    axes[0].invert_yaxis()
    return figure
