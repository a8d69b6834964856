"""The controlled experiment: ``python -m helpers.lab.experiment``.

A design lists cells, one run each. A cell's row is written as soon as it is finished, so the
experiment can be killed at any time and goes on where it was. All its results hold for a base that
never met the word it is taught.
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
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import joblib
import pandas as pd
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.detect.metrics import coco_ap, evaluate_queries
from helpers.detect.queries import predict_split
from helpers.environment import device
from helpers.errors import InputError
from helpers.files import (
    CONFIGS,
    DATA,
    ROOT,
    RUNS,
    WALL_CRACKS,
    read_json,
    resolve,
    write_json,
    write_text,
)
from helpers.lab.spoil import read_split_wrong_keys
from helpers.model.lora import COMPONENTS
from helpers.model.sam3 import load_base
from helpers.train.training import train

SEEDS = (1, 2, 3, 4, 5)
PARTS = tuple(name for name in COMPONENTS if name != "geometry_encoder")
"""Components that a text prompt passes through, in the order of the forward pass."""
EQUAL_RANK = 16
EQUAL_PARAMETERS = 36_864
"""LoRA on the text encoder of the embedded base at rank 16; other parts get the nearest rank."""
PARAMETERS_AT_RANK_1 = {
    "vision_encoder": 6144,
    "text_encoder": 2304,
    "detr_encoder": 3328,
    "detr_decoder": 6528,
    "mask_decoder": 512,
}
"""Of the embedded base, all names of the config's ``target_modules``; a test counts them."""
FULL_RANK = 64
BATCH = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
SHORTER = {("tiny", "causes"): 0.1, ("tiny", "components"): 0.06}
"""Share of the config's epochs by profile and design: 210 runs of the base then take two hours."""

TABLES = DATA / "experiments"
"""The committed tables, one CSV file per design and ``base.csv``."""
EXPERIMENT_RUNS = RUNS / "experiment"
DATA_DIR = str(WALL_CRACKS.relative_to(ROOT))
"""Relative, so that the hash of a config is the same on every machine."""
KNOWN_THINGS = DATA / "known_things"
"""32 walls with what the embedded base knows, and ``prompts.json``: what is asked on each."""
TEXT_COLUMNS = {"config_hash": str, "code_version": str}
"""Hashes may consist of digits, which a reader of tables would take for numbers."""
OF_EVALUATION = {
    "detected_share": "max_score_present_share_above",
    "max_score": "max_score_present",
    "AP50": "AP50",
    "union_iou": "union_iou",
    "cgF1": "cgF1",
    "IL_MCC": "IL_MCC",
    "false_positive_rate": "max_score_absent_share_above",
}
RESPONSES = (*OF_EVALUATION, "presence_prob", "max_query_prob", "retention_AP", "retention_AP50")
"""What is measured on the test split and, for retention, on walls with the base's own concepts."""
_BASE_ROW = "base.json"
_PARTIAL = ".partial-"
_RUN_AGAIN = "remove the file and run the experiment again"


@dataclass(frozen=True)
class Cell:
    """One run of a design.

    Attributes
    ----------
    factors : dict
        What is varied: name to level, in the order of the design.
    seed : int
        Of LoRA's start, the order of the images, and the draw of absent prompts.
    overrides : tuple of str
        Settings on top of config and profile.
    objects_read : bool
        False trains and validates on what the failing script's reader returned.
    """

    design: str
    factors: dict
    seed: int
    overrides: tuple[str, ...]
    objects_read: bool = True

    @property
    def name(self):
        """str: unique in its design, usable as a file name."""
        levels = [f"{key}-{value}" for key, value in self.factors.items()]
        return "_".join([*levels, f"seed-{self.seed}"]).replace(" ", "-")

    def config(self, profile, data_dir):
        """Return the `helpers.config.Config` of the run."""
        settings = [("data.data_dir", str(data_dir)), ("training.seed", self.seed)]
        if (profile, self.design) in SHORTER:
            settings.append(("scale.num_epochs", SHORTER[profile, self.design]))
        path = CONFIGS / "crack_detection_config.yaml"
        return load_config(path, profile, [*settings, *BATCH, *self.overrides])


def causes_design(seeds):
    """Cross the four suspects: objects read, training prompt, text LoRA, absent prompts."""
    cells = []
    for seed, read, prompt, text, negatives in product(
        seeds, ("no", "yes"), ("object", "crack"), ("off", "on"), (0, 3)
    ):
        factors = {"objects": read, "prompt": prompt, "text_lora": text, "negatives": negatives}
        overrides = (
            f"data.prompt={prompt if prompt == 'object' else 'null'}",
            _flag("text_encoder", text == "on"),
            f"data.num_negatives={negatives}",
        )
        cells.append(Cell("causes", factors, seed, overrides, objects_read=read == "yes"))
    return cells


def components_design(seeds):
    """Put LoRA on each component, on all, and on all but one, at equal rank and at equal size."""
    choices = {f"only {part}": (part,) for part in PARTS} | {"all": PARTS}
    choices |= {f"all but {part}": tuple(p for p in PARTS if p != part) for part in PARTS}
    cells = []
    for seed, equal, (choice, parts) in product(seeds, ("rank", "size"), choices.items()):
        rank = EQUAL_RANK if equal == "rank" else rank_of_equal_size(parts)
        names = ["q_proj", "k_proj", "v_proj", "out_proj"]
        if parts != ("mask_decoder",):  # its only feed-forward layers are convolutions
            names += ["fc1", "fc2"]
        overrides = (
            *(_flag(part, part in parts) for part in PARTS),
            f"lora.target_modules=[{', '.join(names)}]",
            f"lora.rank={rank}",
            f"lora.alpha={2 * rank}",
            "data.num_negatives=1",
        )
        cells.append(Cell("components", {"equal": equal, "lora_on": choice}, seed, overrides))
    return cells


def schedule_design(seeds):
    """Cross the document's two schedules with text LoRA; a profile scales both alike."""
    schedules = {"failing": (20, 1000, 5e-5), "fixed": (50, 100, 1e-4)}
    cells = []
    for seed, name, text in product(seeds, schedules, ("off", "on")):
        epochs, warmup, rate = schedules[name]
        overrides = (
            f"training.num_epochs={epochs}",
            f"training.warmup_steps={warmup}",
            f"training.learning_rate={rate}",
            _flag("text_encoder", text == "on"),
        )
        cells.append(Cell("schedule", {"schedule": name, "text_lora": text}, seed, overrides))
    return cells


DESIGNS = {
    "causes": causes_design,
    "schedule": schedule_design,
    "components": components_design,
}
"""Name to a function that lists the cells for some seeds."""


def _flag(part, is_on):
    return f"lora.apply_to_{part}={str(is_on).lower()}"


def rank_of_equal_size(parts):
    """Return the rank at which some components have about `EQUAL_PARAMETERS`."""
    per_rank = sum(PARAMETERS_AT_RANK_1[part] for part in parts)
    return min(max(1, round(EQUAL_PARAMETERS / per_rank)), FULL_RANK)


def cells_of(design, seeds=SEEDS):
    """List the runs of a design, one seed after the other.

    Raises InputError if there is no such design in `DESIGNS`, or no seed.
    """
    if design not in DESIGNS:
        raise InputError(f"there is no design {design!r}", fix=f"use one of {', '.join(DESIGNS)}")
    if not seeds:
        raise InputError("no seed is given", fix="give at least one, better five")
    return DESIGNS[design](seeds)


def run_cell(cell, profile, data_dir, folder):
    """Train and judge one cell.

    Parameters
    ----------
    cell : Cell
    profile : str
    data_dir, folder : os.PathLike
        Dataset, and where the run goes.

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
    return row | {
        "final_loss": result.metrics["train_loss"]["last"],
        "parameters": int(result.adapter.loc["total", "parameters"]),
        "rank": config.lora.rank,
        "steps": result.metrics["steps"],
        "seconds": round(time.perf_counter() - started, 1),
        "profile": profile,
        "config_hash": config.fingerprint(),
        "code_version": code_version(),
    }


def judge(model, processor, config, data_dir):
    """Measure `RESPONSES` of one model, asking for the category names, whatever was trained."""
    model.to(device()["device"])
    settings = config.evaluation
    queries = predict_split(
        model,
        processor,
        read_split(data_dir, "test"),
        absent_prompts=settings.absent_prompts,
        mask_threshold=settings.mask_threshold,
    )
    metrics = evaluate_queries(queries, settings.score_threshold)
    row = {name: metrics[source] for name, source in OF_EVALUATION.items()}
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
    """Judge the base without any adapter by the questions of a cell; return its row."""
    config = cell.config(profile, data_dir)
    settings = config.model
    model, processor = load_base(settings.name, settings.revision, resolution=settings.resolution)
    row = judge(model, processor, config, data_dir)
    return row | {"profile": profile, "code_version": code_version()}


def code_version():
    """Return the commit the code is at, ``-dirty`` if files differ, ``unknown`` without git."""
    if not (Path(ROOT) / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


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


def run_experiment(design, output_dir, *, profile, data_dir, seeds=SEEDS, workers=None):
    """Run all cells of a design that have no row with their configuration yet; return the table.

    ``output_dir`` gets ``<design>/<cell>.json`` as cells finish, and ``<design>.csv``.
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
        _write_table(folder, cells)
    return _write_table(folder, cells)


def _write_table(folder, cells):
    """Join the finished rows of a design to ``<folder>.csv``, in the order of the cells."""
    paths = [folder / f"{cell.name}.json" for cell in cells]
    table = pd.DataFrame([read_json(path, _RUN_AGAIN) for path in paths if path.is_file()])
    write_text(folder.with_suffix(".csv"), table.to_csv(index=False))
    return table


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


def publish(output_dir, tables=TABLES):
    """Put complete tables into the repository; refuse a design with fewer rows than cells."""
    written = {}
    for design in DESIGNS:
        path = Path(output_dir) / f"{design}.csv"
        if not path.is_file():
            raise InputError("was not run", where=path, fix="run the experiment first")
        table = pd.read_csv(path, dtype=TEXT_COLUMNS)
        count = len(cells_of(design, SEEDS))
        if len(table) != count:
            fix = "let the experiment finish"
            raise InputError(f"{len(table)} of {count} rows", where=path, fix=fix)
        written[design] = table
    written["base"] = pd.DataFrame([read_json(Path(output_dir) / _BASE_ROW, _RUN_AGAIN)])
    Path(tables).mkdir(parents=True, exist_ok=True)
    for name, table in written.items():
        text = table.to_csv(index=False, float_format="%.6g")
        write_text(Path(tables) / f"{name}.csv", text)


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


def main(arguments=None):
    """Run the command line and return its exit status."""
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
    return run_command(lambda: _run(options))


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
