"""The committed tables of the experiment, checked against its designs and the present configs."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from data.experiments.cells import (
    DATA_DIR,
    FAILING,
    RESPONSES,
    TABLES,
    TEXT_COLUMNS,
    WORKING,
    usages_of,
)
from data.experiments.statistics import LABELS
from helpers.errors import InputError
from helpers.files import ROOT, resolve
from helpers.show.charts import COLOURS, MARKERS, dress

BASES_AS_TITLES = {"never": "never met the word", "half": "half knows the word"}

DECISIVE = {
    "failing": FAILING,
    "objects read": FAILING | {"objects": "yes"},
    "working": WORKING,
    "text encoder frozen": WORKING | {"text_lora": "off"},
    "another word": WORKING | {"prompt": "object"},
}
"""States of a training between which the answer lies: the two corners, and steps from them."""


def tables_folder(path):
    """Find the folder of the tables, seen from the current folder, the repository or ``notebooks/``."""
    for folder in (resolve(path), ROOT / "notebooks" / path):
        if folder.is_dir():
            return folder.resolve()
    raise InputError(f"{str(path)!r} is no folder", where="tables_dir", fix="run `make experiment`")


def _read(folder, name):
    """Read one of the committed tables; hashes that consist of digits stay text."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise InputError("no such table", where=path, fix="run `make experiment`")
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=TEXT_COLUMNS)


def load_table(design, folder=TABLES, *, profile="tiny", word=None):
    """Read a table and make sure that it is the whole design, made with the present configs.

    ``design`` is a key of `data.experiments.cells.DESIGNS`, ``profile`` that of the configs; ``word``
    takes the rows of one base, see `data.experiments.cells.BASES`. Returns one row per run, and in ``front`` per use of an adapter: factors, ``seed``,
    `data.experiments.cells.RESPONSES` and what was run.
    """
    table, cells = _read(folder, design), usages_of(design)
    keys = [*cells[0].factors, "seed"]
    rows = sorted(table[keys].astype(str).itertuples(index=False, name=None))
    hashes = {cell.config(profile, DATA_DIR).fingerprint() for cell in cells}
    problem = None
    if rows != sorted((*map(str, cell.factors.values()), str(cell.seed)) for cell in cells):
        problem = f"{len(table)} rows are not the {len(cells)} runs of the design '{design}'"
    elif table[list(RESPONSES)].isna().any(axis=None):
        problem = "a response is missing"
    elif set(table["config_hash"]) != hashes:
        problem = "the rows were made with other configurations than the present ones"
    if problem:
        fix = "run `make experiment` to the end, or restore the configs"
        raise InputError(problem, where=folder / f"{design}.csv", fix=fix)
    return table if word is None else table[table["word"] == word].reset_index(drop=True)


def load_base_row(folder=TABLES, word="never"):
    """Read what a base answers without any adapter: `data.experiments.cells.RESPONSES` by name."""
    table = _read(folder, "base").set_index("word")
    return table.loc[word, list(RESPONSES)].astype(float)


def undominated(means):
    """Return those rows of a table that no other row beats in one column without losing in another."""
    beaten = [
        ((means >= row).all(axis=1) & (means > row).any(axis=1)).any()
        for _, row in means.iterrows()
    ]
    return means[~np.array(beaten)]


def free_places(points, radius=0.05):
    """Return a place (n, 2) beside each point (n, 2) that is far from other points and places."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places = []
    for point in points:
        taken = np.array([*points, *places])
        candidates = np.concatenate([point + around, point + 1.7 * around])
        gaps = np.linalg.norm(candidates[:, None] - taken, axis=2).min(axis=1)
        places.append(candidates[np.minimum(gaps, 0.9 * radius).argmax()])
    return np.array(places)


def front_figure(table):
    """Draw what every recipe of the design ``front`` detects against what it keeps of the base.

    There is a panel per base. Grey dots are runs, a number stands beside their mean, and a line joins
    the recipes that none beats.
    """
    kept, outcome = "retention_AP", "AP50"
    recipes = {name: number for number, name in enumerate(dict.fromkeys(table["recipe"]), start=1)}
    words = list(dict.fromkeys(table["word"]))
    figure = Figure(figsize=(4.3 * len(words) + 2.6, 4.6), layout="constrained")
    ratios = [1.0] * len(words) + [0.6]
    *axes, legend = figure.subplots(1, len(words) + 1, sharey=True, width_ratios=ratios)
    for ax, word in zip(axes, words, strict=True):
        runs = table[table["word"] == word]
        means = runs.groupby("recipe")[[kept, outcome]].mean()
        front = undominated(means).sort_values(kept)
        ax.plot(runs[kept], runs[outcome], ".", color="0.8")
        ax.plot(front[kept], front[outcome], color=COLOURS[0], linewidth=1)
        ax.plot(means[kept], means[outcome], "o", color=COLOURS[0], markersize=4)
        ax.set(xlim=(-0.05, 0.9), ylim=(-0.05, 1.0))
        places = free_places(means.to_numpy())
        for recipe, point, place in zip(means.index, means.to_numpy(), places, strict=True):
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            aligned = {"ha": "center", "va": "center", "fontsize": 8, "arrowprops": line}
            ax.annotate(recipes[recipe], point, place, **aligned)
        ax.set_title(BASES_AS_TITLES.get(word, word))
        dress(ax, "AP on the ten known things", LABELS.get(outcome, outcome))
    listed = "\n".join(f"{number}  {name}" for name, number in recipes.items())
    legend.text(0, 0.5, listed, va="center", fontsize=8, transform=legend.transAxes)
    legend.set_axis_off()
    return figure


def runs_of_states(table):
    """Return the runs of `DECISIVE` of a table, with the column ``state``."""
    return pd.concat(
        table[(table[list(state)] == pd.Series(state)).all(axis=1)].assign(state=name)
        for name, state in DECISIVE.items()
    )


def grades_figure(table, alone):
    """Draw what runs in the states of `DECISIVE` detect, over what their base detects alone.

    ``table`` has rows of ``causes`` and ``grades``, ``alone`` maps their ``word`` to the share that the
    base detects. Lines join means over the seeds, small dots are runs.
    """
    runs = runs_of_states(table).assign(alone=lambda rows: rows["word"].map(alone))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    looks = zip(runs.groupby("state", sort=False), COLOURS, MARKERS, strict=False)
    for (state, rows), colour, marker in looks:
        means = rows.groupby(["alone", "word"])["detected_share"].mean().reset_index()
        ax.plot(rows["alone"], rows["detected_share"], ".", color=colour, alpha=0.3)
        line = means.groupby("alone")["detected_share"].mean()
        ax.plot(line.index, line, color=colour, linewidth=1.5)
        ax.plot(means["alone"], means["detected_share"], marker, color=colour, label=state)
    dress(ax, "crack images that the base alone detects", LABELS["detected_share"])
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    figure.legend(loc="outside right center", frameon=False)
    return figure
