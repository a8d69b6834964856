"""The committed tables of the experiment: loaded, checked against the designs, and drawn."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from helpers.charts import COLOURS, MARKERS, dress
from helpers.errors import InputError
from helpers.experiment import DATA_DIR, TABLES, TEXT_COLUMNS
from helpers.experiment_designs import SEEDS, cells_of
from helpers.experiment_run import RESPONSES
from helpers.factorial import effect_table, one_step_effects
from helpers.paths import ROOT, resolve

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
        Key of `helpers.experiment_designs.DESIGNS`.
    folder : os.PathLike
    profile : str
        Of the configs that the rows' hashes are compared with.

    Returns
    -------
    pandas.DataFrame
        One row per run: factors, ``seed``, `helpers.experiment_run.RESPONSES` and what was run.

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
        `helpers.experiment_run.RESPONSES` by name.
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
        See `helpers.factorial.contrasts`.
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
