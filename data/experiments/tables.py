"""The committed tables of the experiment, checked against its designs and the present configs."""

import pandas as pd

from data.experiments.cells import DATA_DIR, RESPONSES, TABLES, TEXT_COLUMNS, usages_of
from helpers.errors import InputError
from helpers.files import ROOT, resolve


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
