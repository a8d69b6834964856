"""The controlled experiment: ``python -m helpers.experiment``.

Every run of a design is a cell with a row of its own, written as soon as it is finished, so that a
run of the experiment can be killed at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from helpers.data.coco import read_split
from helpers.detect.metrics import coco_ap, evaluate_queries
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.files import DATA, ROOT, RUNS, WALL_CRACKS, read_json, resolve, write_json, write_text
from helpers.lab.designs import DESIGNS, SEEDS, cells_of
from helpers.lab.spoil import read_split_wrong_keys
from helpers.model.sam3 import load_base
from helpers.train.training import train


def run_jobs(function, jobs, *, description, done=0, workers=None):
    """Call a function once per job in processes of their own, with a progress bar.

    Parameters
    ----------
    function : callable
        Of the top level of a module; writes its result itself, so that a kill loses only what is
        running.
    jobs : sequence of tuple
        Arguments of each call.
    description : str
        For the bar.
    done : int
        Jobs finished in an earlier attempt, for the bar.
    workers : int, optional
        Processes; by default one per core, or one if there is a GPU.

    Yields
    ------
    object
        What the calls return, as they finish. The first exception is raised, and what has not
        started is not started.
    """
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    bar = {"initial": done, "total": done + len(jobs), "unit": "run", "file": sys.stderr}
    # Forking a process in which torch has started threads can hang, so each worker starts anew.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), desc=description, **bar):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def exit_status(command):
    """Run a long command that can be interrupted and started again.

    Parameters
    ----------
    command : callable
        Without arguments; returns an exit status.

    Returns
    -------
    int
        That status, 2 for unusable input, or 130 if interrupted.
    """
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def _prepare_worker():
    """Set a worker process up: one thread, no chatter, and no life beyond that of its parent."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Wait until the parent process is gone, killed perhaps, and end this one."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


KNOWN_THINGS = DATA / "known_things"
"""32 walls with what the embedded base knows, and ``prompts.json``: what is asked on each."""
_OF_EVALUATION = {
    "detected_share": "max_score_present_share_above",
    "max_score": "max_score_present",
    "AP50": "AP50",
    "union_iou": "union_iou",
    "cgF1": "cgF1",
    "IL_MCC": "IL_MCC",
    "false_positive_rate": "max_score_absent_share_above",
}
RESPONSES = (*_OF_EVALUATION, "presence_prob", "max_query_prob", "retention_AP", "retention_AP50")
"""What is measured on the test split and, for retention, on walls with the base's own concepts."""


def run_cell(cell, profile, data_dir, folder):
    """Train and judge one cell.

    Parameters
    ----------
    cell : helpers.lab.designs.Cell
    profile : str
    data_dir : os.PathLike
    folder : pathlib.Path
        Gets the run.

    Returns
    -------
    dict
        Factors, seed, `RESPONSES`, ``final_loss`` (of the last logged step), ``parameters`` (of
        LoRA), ``steps``, ``seconds``, ``config_hash``, ``code_version``, ``profile``.
    """
    started = time.perf_counter()
    config = cell.config(profile, data_dir)
    read = read_split if cell.objects_read else read_split_wrong_keys
    result = train(
        config,
        output_dir=folder,
        overwrite=True,
        train_split=read(data_dir, config.data.train_split),
        val_split=read(data_dir, config.data.val_split),
        allow_empty=not cell.objects_read,
        progress=False,
    )
    row = {"design": cell.design, **cell.factors, "seed": cell.seed}
    row |= judge(result.model, result.processor, config, data_dir)
    row |= {
        "final_loss": result.metrics["train_loss"]["last"],
        "parameters": int(result.adapter.loc["total", "parameters"]),
        "rank": config.lora.rank,
        "steps": result.metrics["steps"],
        "seconds": round(time.perf_counter() - started, 1),
        "profile": profile,
        "config_hash": config.fingerprint(),
        "code_version": code_version(),
    }
    return row


def judge(model, processor, config, data_dir):
    """Measure the responses of one model, the same questions for every model.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3 or peft.PeftModel
    processor : transformers.Sam3Processor
    config : helpers.config.Config
        Its absent prompts and thresholds are used; the prompts are the category names, whatever
        was asked in training.
    data_dir : os.PathLike

    Returns
    -------
    dict of str to float
        `RESPONSES`.
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = config.evaluation
    queries = predict_split(
        model,
        processor,
        read_split(data_dir, "test"),
        absent_prompts=settings.absent_prompts,
        mask_threshold=settings.mask_threshold,
    )
    metrics = evaluate_queries(queries, settings.score_threshold)
    row = {name: metrics[source] for name, source in _OF_EVALUATION.items()}
    present = [query for query in queries if query.is_positive]
    for name in ("presence_prob", "max_query_prob"):
        row[name] = sum(getattr(query, name) for query in present) / len(present)
    retention = coco_ap(known_queries(model, processor))
    return row | {f"retention_{name}": retention[name] for name in ("AP", "AP50")}


def known_queries(model, processor):
    """Ask for present and absent known things on the walls of `KNOWN_THINGS`."""
    prompts = read_json(KNOWN_THINGS / "prompts.json", "restore data/known_things")
    queries = predict_split(model, processor, read_split(KNOWN_THINGS, "test"))
    return [query for query in queries if query.prompt in prompts[query.image_id]]


def run_base(cell, profile, data_dir):
    """Judge the base without any adapter by the questions of a cell.

    Parameters
    ----------
    cell, profile, data_dir
        See `run_cell`.

    Returns
    -------
    dict
        `RESPONSES` and the columns that say what was measured.
    """
    config = cell.config(profile, data_dir)
    settings = config.model
    model, processor = load_base(settings.name, settings.revision, resolution=settings.resolution)
    row = judge(model, processor, config, data_dir)
    return row | {"profile": profile, "code_version": code_version()}


def code_version():
    """Return the commit the code is at, with ``-dirty`` if files differ from it.

    Returns
    -------
    str
        ``unknown`` outside a git checkout.
    """
    if not (Path(ROOT) / ".git").exists():
        return "unknown"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


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
        Key of `helpers.lab.designs.DESIGNS`.
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
    cells : sequence of helpers.lab.designs.Cell
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
    parser = argparse.ArgumentParser(prog="python -m helpers.lab.experiment", description=__doc__)
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
