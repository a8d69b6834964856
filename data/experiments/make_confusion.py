"""Make the confusion matrix of the diagnosis: ``python -m data.experiments.make_confusion``.

The script of the lab is run with every fault, and the diagnosis is asked twice: about the files that
it left, and about the objects in its kernel. Healthy runs of the script and of this project are
asked about, too. A run that was judged is not judged again.
"""

import argparse
import contextlib
import io
import shutil
import sys
import time
from pathlib import Path

import pandas as pd

from data.experiments.cells import TABLES, code_version
from data.experiments.jobs import run_jobs
from data.experiments.make import run_command
from data.experiments.statistics import NOTHING, score
from helpers.config import load_config
from helpers.diagnose import diagnose, open_patient
from helpers.files import CONFIGS, RUNS, WALL_CRACKS, read_json, resolve, write_json, write_text
from helpers.lab.careless import CONFIG_FILE, LOG_FILE, WEIGHTS_FILE
from helpers.lab.faults import FAULTS, HEALTHY, RUN_FOLDER, alive, planted
from helpers.train.training import train

LABORATORY_RUNS = RUNS / "laboratory"
CONFUSION_TABLE = TABLES / "confusion.csv"
HEALTHY_RUNS = {f"healthy {seed}": seed for seed in (1, 2, 3, 4, 5)}
OWN_RUNS = {f"own run {seed}": seed for seed in (1, 2, 3)}
OWN_EPOCHS = "scale.num_epochs=0.2"  # ten of 50: after five, one of three seeds detects too little


def left_in(folder, script):
    """Return what the script left in a folder as a patient; the dataset if it left nothing."""
    if not (folder / WEIGHTS_FILE).is_file():
        return open_patient(script.data_dir)
    given = {"config": folder / CONFIG_FILE, "log": folder / LOG_FILE}
    words = tuple(dict.fromkeys(script.words.values()))
    return open_patient(folder, data_dir=script.data_dir, words=words, **given)


VIEWS = {"files": left_in, "alive": lambda folder, script: alive(script)}


def judge(name, output_dir, data_dir):
    """Make a run, with a fault of `FAULTS` or without any, and return its rows: list of dict."""
    folder, fault = _place(output_dir, name), FAULTS.get(name, HEALTHY)
    if name in OWN_RUNS:
        rows = [_row(name, fault, "files", lambda: _own_run(folder, OWN_RUNS[name], data_dir))]
    else:
        healthy = _place(output_dir, next(iter(HEALTHY_RUNS))) / RUN_FOLDER
        seed = HEALTHY_RUNS.get(name, 1)
        script = planted(fault, folder, healthy=healthy, data_dir=data_dir, seed=seed)
        rows = [
            _row(name, fault, view, lambda make=make: make(folder / RUN_FOLDER, script))
            for view, make in VIEWS.items()
        ]
    if name in FAULTS:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _own_run(folder, seed, data_dir):
    """Train this project's own run and return its folder."""
    overrides = [("data.data_dir", data_dir), OWN_EPOCHS, f"training.seed={seed}"]
    config = load_config(CONFIGS / "crack_detection_config.yaml", "tiny", overrides)
    train(config, output_dir=folder, overwrite=True, progress=False)
    return folder


def _row(name, fault, view, make):
    """Ask the diagnosis about what ``make`` returns."""
    started = time.perf_counter()
    row = {"planted": name, "view": view, "cause": fault.cause or NOTHING}
    row |= {"seen": fault.seen in ("both", view), "shown_by": fault.shown_by}
    with contextlib.redirect_stdout(io.StringIO()):
        diagnosis = diagnose(make())
    causes = diagnosis.causes
    return row | {
        "first": causes[0].code if causes else NOTHING,
        "found": " ".join(cause.code for cause in causes),
        "confidences": " ".join(f"{cause.confidence:.2f}" for cause in causes),
        "failed_gates": "; ".join(gate.name for gate in diagnosis.gates if gate.status == "failed"),
        "asked": diagnosis.asked,
        "seconds": round(time.perf_counter() - started, 1),
        "code_version": code_version(),
    }


def _place(output_dir, name):
    return Path(output_dir) / name.replace(" ", "_")


def run_laboratory(output_dir, *, names=None, data_dir=WALL_CRACKS, photographs=(), workers=None):
    """Judge all runs that were not judged, or those named, and return the table, see `score`.

    ``photographs`` are further datasets, of which a healthy run of the script is judged, too.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    healthy = [*HEALTHY_RUNS, *OWN_RUNS]
    places = dict.fromkeys([*healthy, *FAULTS], data_dir)
    places |= {f"healthy {Path(folder).name}": folder for folder in photographs}
    first = next(iter(HEALTHY_RUNS))  # what acts after a training is planted into this one
    chosen = [name for name in places if names is None or name in (first, *names)]
    rows = {name: _place(output_dir, name).with_suffix(".json") for name in chosen}
    for part in (chosen[:1], chosen[1:]):
        missing = [name for name in part if not rows[name].is_file()]
        jobs = [(name, output_dir, places[name]) for name in missing]
        for judged in run_jobs(judge, jobs, description="judged", workers=workers):
            write_json(rows[judged[0]["planted"]], {"rows": judged})
    found = [row for path in rows.values() for row in read_json(path, "run it again")["rows"]]
    table = pd.DataFrame(found)
    write_text(Path(output_dir) / "confusion.csv", table.to_csv(index=False))
    return table


def main(arguments=None):
    """Run the command line; 1 if a fault that can be seen was missed, or a healthy run has a cause."""
    parser = argparse.ArgumentParser(
        prog="python -m data.experiments.make_confusion", description=__doc__
    )
    parser.add_argument("--output", type=resolve, default=LABORATORY_RUNS, help="where rows go")
    parser.add_argument("--only", nargs="+", help="judge these faults or healthy runs only")
    parser.add_argument(
        "--photographs", nargs="+", default=[], type=resolve, help="datasets for healthy runs"
    )
    parser.add_argument("--workers", type=int, help="runs at a time, by default one per core")
    parser.add_argument(
        "--publish", action="store_true", help="write the table to data/experiments"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options):
    """Run the laboratory as the command line asks for."""
    table = run_laboratory(
        options.output,
        names=options.only,
        photographs=options.photographs,
        workers=options.workers,
    )
    counts = score(table)
    for name, value in counts.items():
        print(f"{name:<13}{value}")
    if options.publish:
        write_text(CONFUSION_TABLE, table.to_csv(index=False))
    return 1 if counts["missed"] or counts["false_alarms"] else 0


if __name__ == "__main__":
    sys.exit(main())
