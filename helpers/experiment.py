"""The controlled experiment: ``python -m helpers.experiment``.

Every run of a design is a cell with a row of its own, written as soon as it is finished, so that a
run of the experiment can be killed at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

from helpers.errors import InputError
from helpers.experiment_designs import DESIGNS, SEEDS, cells_of
from helpers.experiment_run import run_base, run_cell
from helpers.files import read_json, write_json, write_text
from helpers.jobs import exit_status, run_jobs
from helpers.paths import DATA, ROOT, RUNS, WALL_CRACKS, resolve

TABLES = DATA / "experiments"
"""The committed tables, one CSV file per design and ``base.csv``."""
EXPERIMENT_RUNS = RUNS / "experiment"
DATA_DIR = str(WALL_CRACKS.relative_to(ROOT))
"""Relative, so that the hash of a config is the same on every machine."""
TEXT_COLUMNS = {"config_hash": str, "code_version": str}
"""Hashes may consist of digits, which a reader of tables would take for numbers."""
_BASE_ROW = "base.json"
_PARTIAL = ".partial-"
_RUN_AGAIN = "remove the file and run the experiment again"


def run_experiment(design, output_dir, *, profile, data_dir, seeds=SEEDS, workers=None):
    """Run all cells of a design that have no row yet.

    Parameters
    ----------
    design : str
        Key of `helpers.experiment_designs.DESIGNS`.
    output_dir : pathlib.Path
        Gets ``<design>/<cell>.json`` as cells finish, and ``<design>.csv``.
    profile : str
    data_dir : pathlib.Path
    seeds : sequence of int
    workers : int, optional
        Runs at a time, one core each; by default one per core, or one if there is a GPU.

    Returns
    -------
    pandas.DataFrame
        The table, complete.

    Raises
    ------
    InputError
        For an unknown design or unusable data.
    """
    cells = cells_of(design, seeds)
    folder = Path(output_dir) / design
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    if not (Path(output_dir) / _BASE_ROW).is_file():
        write_json(Path(output_dir) / _BASE_ROW, run_base(cells[0], profile, data_dir))
    missing = [cell for cell in cells if not _has_row(folder, cell, profile, data_dir)]
    jobs = [(cell, profile, data_dir, folder) for cell in missing]
    done = len(cells) - len(missing)
    for _ in run_jobs(_run_and_write, jobs, description=design, done=done, workers=workers):
        write_table(folder, cells)
    return write_table(folder, cells)


def write_table(folder, cells):
    """Join the finished rows of a design to ``<folder>.csv``.

    Parameters
    ----------
    folder : pathlib.Path
        Holds ``<cell>.json``.
    cells : sequence of helpers.experiment_designs.Cell
        Their order is that of the rows.

    Returns
    -------
    pandas.DataFrame
        Without the cells that have no row.
    """
    paths = [folder / f"{cell.name}.json" for cell in cells]
    table = pd.DataFrame([read_json(path, _RUN_AGAIN) for path in paths if path.is_file()])
    write_text(folder.with_suffix(".csv"), table.to_csv(index=False))
    return table


def publish(output_dir, tables=TABLES):
    """Put complete tables into the repository.

    Parameters
    ----------
    output_dir : pathlib.Path
        Of a finished experiment.
    tables : pathlib.Path

    Raises
    ------
    InputError
        If a design has fewer rows than cells.
    """
    written = {}
    for design in DESIGNS:
        path = Path(output_dir) / f"{design}.csv"
        if not path.is_file():
            raise InputError("was not run", where=path, fix="run the experiment first")
        table = pd.read_csv(path, dtype=TEXT_COLUMNS)
        wanted = len(cells_of(design, SEEDS))
        if len(table) != wanted:
            fix = "let the experiment finish"
            raise InputError(f"{len(table)} of {wanted} rows", where=path, fix=fix)
        written[design] = table
    written["base"] = pd.DataFrame([read_json(Path(output_dir) / _BASE_ROW, _RUN_AGAIN)])
    Path(tables).mkdir(parents=True, exist_ok=True)
    for name, table in written.items():
        text = table.to_csv(index=False, float_format="%.6g")
        write_text(Path(tables) / f"{name}.csv", text)


def _has_row(folder, cell, profile, data_dir):
    """Tell whether a cell was run with exactly this configuration."""
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return False
    row = read_json(path, _RUN_AGAIN)
    return row["config_hash"] == cell.config(profile, data_dir).fingerprint()


def _run_and_write(cell, profile, data_dir, folder):
    """Run one cell in a worker and write its row."""
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder) as run_folder:
        row = run_cell(cell, profile, data_dir, Path(run_folder))
    write_json(folder / f"{cell.name}.json", row)


def main(arguments=None):
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional

    Returns
    -------
    int
        0 done, 2 unusable input, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.experiment", description=__doc__)
    parser.add_argument(
        "--design", action="append", choices=DESIGNS, help="may be repeated; by default all"
    )
    parser.add_argument("--profile", default="tiny", help="tiny (default) or sam3")
    parser.add_argument("--data", default=DATA_DIR, help="dataset, by default data/wall_cracks")
    parser.add_argument("--output", type=resolve, default=EXPERIMENT_RUNS, help="where rows go")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, help="runs at a time, by default one per core")
    parser.add_argument(
        "--publish", action="store_true", help="write complete tables to data/experiments"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options):
    """Run the designs as the command line asks for."""
    for design in options.design or DESIGNS:
        table = run_experiment(
            design,
            options.output,
            profile=options.profile,
            data_dir=options.data,
            seeds=options.seeds,
            workers=options.workers,
        )
        print(f"{design}: {len(table)} rows in {options.output / design}.csv", flush=True)
    if options.publish:
        publish(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
