"""Run the controlled experiment of lesson 06: ``python -m data.experiments.make``.

Every run of a design is a cell with a row of its own, written as soon as it is finished, so the
command can be killed at any time and goes on where it was.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import joblib
import pandas as pd
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from helpers.environment import device
from helpers.errors import InputError
from helpers.files import RUNS, read_json, resolve, write_json, write_text
from helpers.lab.experiment import (
    DATA_DIR,
    DESIGNS,
    TABLES,
    TEXT_COLUMNS,
    cells_of,
    code_version,
    judge,
    run_cell,
)
from helpers.model.sam3 import load_base

EXPERIMENT_RUNS = RUNS / "experiment"
BASE_ROW = "base.json"
PARTIAL = ".partial-"
RUN_AGAIN = "remove the file and run the experiment again"


def run_jobs(function, jobs, *, description, done=0, workers=None):
    """Call a function once per job in processes of their own; yield results as they finish.

    The function writes its result itself, so a kill loses only what is running. The first exception
    is raised. ``done`` jobs of an earlier attempt count for the bar. By default there is one worker
    per core, or one if there is a GPU.
    """
    workers = workers or (1 if device()["device"] != "cpu" else os.cpu_count() or 1)
    bar = {"initial": done, "total": done + len(jobs), "unit": "run", "file": sys.stderr}
    # inner_max_num_threads: one torch thread per worker, several slow one another down.
    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        pool = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        results = pool(joblib.delayed(_in_worker)(os.getpid(), function, job) for job in jobs)
        try:
            yield from tqdm(results, desc=description, **bar)
        except TerminatedWorkerError as error:
            raise InputError(
                "a worker process was killed, perhaps for want of memory",
                fix="run the same command again with fewer --workers: it goes on where it was",
            ) from error


def _in_worker(parent, function, job):
    """Call a function in a worker process, or, with a single worker, in the parent itself."""
    if os.getpid() != parent:
        _prepare_worker(parent)
    return function(*job)


@cache
def _prepare_worker(parent):
    """Set a worker up, once: one torch thread, no chatter, and no life beyond that of its parent."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    # loky ends idle workers, but not those in the middle of a job when their parent was killed.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_experiment(design, output_dir, *, profile, data_dir, seeds=None, workers=None):
    """Run all cells of a design that have no row with their configuration yet; return the table.

    ``output_dir`` gets ``<design>/<cell>.json`` as cells finish, and ``<design>.csv``.
    """
    cells = cells_of(design, seeds)
    folder = Path(output_dir) / design
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    if not (Path(output_dir) / BASE_ROW).is_file():
        write_json(Path(output_dir) / BASE_ROW, run_base(cells[0], profile, data_dir))
    missing = [cell for cell in cells if not _has_row(folder, cell, profile, data_dir)]
    jobs = [(cell, profile, data_dir, folder) for cell in missing]
    done = len(cells) - len(missing)
    for _ in run_jobs(_run_and_write, jobs, description=design, done=done, workers=workers):
        _write_table(folder, cells)
    return _write_table(folder, cells)


def run_base(cell, profile, data_dir):
    """Judge the base without any adapter by the questions of a cell; return its row."""
    config = cell.config(profile, data_dir)
    settings = config.model
    model, processor = load_base(settings.name, settings.revision, resolution=settings.resolution)
    row = judge(model, processor, config, data_dir)
    return row | {"profile": profile, "code_version": code_version()}


def _write_table(folder, cells):
    """Join the finished rows of a design to ``<folder>.csv``, in the order of the cells."""
    paths = [folder / f"{cell.name}.json" for cell in cells]
    table = pd.DataFrame([read_json(path, RUN_AGAIN) for path in paths if path.is_file()])
    write_text(folder.with_suffix(".csv"), table.to_csv(index=False))
    return table


def _has_row(folder, cell, profile, data_dir):
    """Tell whether a cell was run with exactly this configuration."""
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return False
    row = read_json(path, RUN_AGAIN)
    return row["config_hash"] == cell.config(profile, data_dir).fingerprint()


def _run_and_write(cell, profile, data_dir, folder):
    """Run one cell in a worker and write its row."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as run_folder:
        row = run_cell(cell, profile, data_dir, Path(run_folder))
    write_json(folder / f"{cell.name}.json", row)


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


def publish(output_dir, tables=TABLES):
    """Put complete tables into the repository; refuse a design with fewer rows than cells."""
    written = {}
    for design in DESIGNS:
        path = Path(output_dir) / f"{design}.csv"
        if not path.is_file():
            raise InputError("was not run", where=path, fix="run the experiment first")
        table = pd.read_csv(path, dtype=TEXT_COLUMNS)
        count = len(cells_of(design))
        if len(table) != count:
            fix = "let the experiment finish"
            raise InputError(f"{len(table)} of {count} rows", where=path, fix=fix)
        written[design] = table
    written["base"] = pd.DataFrame([read_json(Path(output_dir) / BASE_ROW, RUN_AGAIN)])
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
    parser.add_argument("--workers", type=int, help="runs at a time, by default one per core")
    parser.add_argument(
        "--publish", action="store_true", help="write complete tables to data/experiments"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options):
    """Run the designs as the command line asks for."""
    designs = [name for name in DESIGNS if options.profile == "tiny" or name != "half_known"]
    for design in options.design or designs:
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
