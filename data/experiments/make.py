"""Run the controlled experiment of lesson 06: ``python -m data.experiments.make``.

Every run of a design is a cell with a row of its own, written as soon as it is finished, so the
command can be killed at any time and goes on where it was.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

from data.experiments.cells import (
    DATA_DIR,
    DESIGNS,
    GRADED,
    KNOWN_WORDS,
    TABLES,
    TEXT_COLUMNS,
    cells_of,
    code_version,
    judge,
    run_cell,
    usages_of,
)
from data.experiments.jobs import run_jobs
from helpers.errors import InputError
from helpers.files import RUNS, read_json, resolve, write_json, write_text
from helpers.model.sam3 import load_base

EXPERIMENT_RUNS = RUNS / "experiment"
BASE_ROWS = "base.json"
PARTIAL = ".partial-"
RUN_AGAIN = "remove the file and run the experiment again"


def run_experiment(
    design, output_dir, *, profile, data_dir, seeds=None, workers=None, scheduler=None
):
    """Run all cells of a design that have no row with their configuration yet; return the table.

    ``output_dir`` gets ``<design>/<cell>.json`` as cells finish, and ``<design>.csv``. ``workers``
    and ``scheduler`` say where the cells run, see `data.experiments.jobs.run_jobs`.
    """
    cells = cells_of(design, seeds, profile)
    folder = Path(output_dir) / design
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    missing = [cell for cell in cells if not _has_row(folder, cell, profile, data_dir)]
    # Other machines do not see this folder: their runs lie in their own.
    jobs = [(cell, profile, data_dir, None if scheduler else folder) for cell in missing]
    options = {"done": len(cells) - len(missing), "workers": workers, "scheduler": scheduler}
    for name, rows in run_jobs(_run_named, jobs, description=design, **options):
        write_json(folder / f"{name}.json", {"rows": rows})
        _write_table(folder, cells)
    base_rows = Path(output_dir) / BASE_ROWS
    judged = rows_in(base_rows) if base_rows.is_file() else []
    judged += run_bases(cells, profile, data_dir, {row["word"] for row in judged})
    write_json(base_rows, {"rows": judged})
    return _write_table(folder, cells)


def run_bases(cells, profile, data_dir, judged_words=()):
    """Judge the bases of some cells without any adapter, all but some; return a row each."""
    rows = []
    bases = {cell.factors["word"]: cell for cell in cells if "word" in cell.factors}
    for word in [word for word in bases if word not in judged_words]:
        config = bases[word].config(profile, data_dir)
        base = config.model
        model, processor = load_base(base.name, base.revision, resolution=base.resolution)
        row = judge(model, processor, config, data_dir, KNOWN_WORDS)
        rows.append({"word": word, **row, "profile": profile, "code_version": code_version()})
    return rows


def make_missing_bases():
    """Make the bases of graded knowledge that are not there yet, some minutes each."""
    from data.tiny_sam3_half_known.make import Recipe, make_grade

    for word, folder in GRADED.items():
        if not resolve(folder).is_dir():
            make_grade(word, resolve(folder), Recipe())


def rows_in(path):
    """Read the rows of a finished cell, or those of the bases."""
    return read_json(path, RUN_AGAIN)["rows"]


def _write_table(folder, cells):
    """Join the finished rows of a design to ``<folder>.csv``, in the order of the cells."""
    paths = [folder / f"{cell.name}.json" for cell in cells]
    rows = [row for path in paths if path.is_file() for row in rows_in(path)]
    table = pd.DataFrame(rows)
    write_text(folder.with_suffix(".csv"), table.to_csv(index=False))
    return table


def _has_row(folder, cell, profile, data_dir):
    """Tell whether a cell was run with exactly this configuration."""
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return False
    first = rows_in(path)[0]
    return first["config_hash"] == cell.config(profile, data_dir).fingerprint()


def _run_named(cell, profile, data_dir, folder):
    """Run one cell in a worker, in a temporary folder there; return the cell's name and its rows."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as run_folder:
        return cell.name, run_cell(cell, profile, data_dir, Path(run_folder))


def run_command(command):
    """Return the exit status of a long command: its own, 2 for unusable input, 130 if interrupted."""
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def append_rows(path, keys, jobs):
    """Do the jobs that have no row in a table yet; write their rows to it as each is done.

    ``jobs`` maps the values of ``keys`` to a function without arguments that returns rows, dicts.
    """
    table = pd.DataFrame(columns=keys)
    if path.is_file():
        table = pd.read_csv(path, dtype=TEXT_COLUMNS)
    judged = set(table[keys].itertuples(index=False, name=None))
    missing = {key: job for key, job in jobs.items() if key not in judged}
    for key, job in missing.items():
        rows = job()
        table = pd.DataFrame([*table.to_dict("records"), *rows])
        write_text(path, table.to_csv(index=False, float_format="%.6g"))
        print(f"{', '.join(map(str, key))}: detected {rows[0]['detected_share']:.0%}", flush=True)


def publish(output_dir, tables=TABLES):
    """Put complete tables into the repository; refuse a design with fewer rows than cells."""
    written = {}
    for design in DESIGNS:
        path = Path(output_dir) / f"{design}.csv"
        if not path.is_file():
            raise InputError("was not run", where=path, fix="run the experiment first")
        table = pd.read_csv(path, dtype=TEXT_COLUMNS)
        count = len(usages_of(design))
        if len(table) != count:
            fix = "let the experiment finish"
            raise InputError(f"{len(table)} of {count} rows", where=path, fix=fix)
        written[design] = table
    written["base"] = pd.DataFrame(rows_in(Path(output_dir) / BASE_ROWS))
    Path(tables).mkdir(parents=True, exist_ok=True)
    for name, table in written.items():
        text = table.to_csv(index=False, float_format="%.6g")
        write_text(Path(tables) / f"{name}.csv", text)


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.experiments.make", description=__doc__)
    parser.add_argument(
        "--design", action="append", choices=DESIGNS, help="may be repeated; by default all"
    )
    parser.add_argument("--profile", default="tiny", help="tiny (default) or sam3")
    parser.add_argument("--data", default=DATA_DIR, help="dataset, by default data/wall_cracks")
    parser.add_argument("--output", type=resolve, default=EXPERIMENT_RUNS, help="where rows go")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the design")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--workers", type=int, help="runs at a time, by default one per core")
    place.add_argument(
        "--scheduler", metavar="ADDRESS", help="run on a Dask cluster, see data/experiments"
    )
    parser.add_argument(
        "--publish", action="store_true", help="write complete tables to data/experiments"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options):
    """Run the designs as the command line asks for."""
    for design in options.design or DESIGNS:
        if design == "grades" and options.profile == "tiny":
            make_missing_bases()
        table = run_experiment(
            design,
            options.output,
            profile=options.profile,
            data_dir=options.data,
            seeds=options.seeds,
            workers=options.workers,
            scheduler=options.scheduler,
        )
        print(f"{design}: {len(table)} rows in {options.output / design}.csv", flush=True)
    if options.publish:
        publish(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
