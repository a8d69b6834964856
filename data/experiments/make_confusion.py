"""Make the confusion matrix of the diagnosis: ``python -m data.experiments.make_confusion``.

Every fault is planted, a run is made with it, the diagnosis is asked, and its answer is kept; so
are its answers on healthy runs. A fault that was judged is not judged again.
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
from helpers.diagnose.diagnosis import diagnose
from helpers.files import RUNS, WALL_CRACKS, read_json, resolve, write_json, write_text
from helpers.lab.faults import FAULTS, HEALTHY, planted
from helpers.lab.statistics import NOTHING, score

LABORATORY_RUNS = RUNS / "laboratory"
CONFUSION_TABLE = TABLES / "confusion.csv"
HEALTHY_RUNS = {f"healthy {seed}": seed for seed in (1, 2, 3)}
EPOCHS = "scale.num_epochs=0.1"  # five of 50, so that a fault is judged within a minute


def judge_fault(name, output_dir, data_dir, profile):
    """Plant a fault of `FAULTS`, or none for a key of `HEALTHY_RUNS`, and return its row."""
    started = time.perf_counter()
    fault, settings = FAULTS.get(name, HEALTHY), (EPOCHS,)
    if name in HEALTHY_RUNS:
        settings = (EPOCHS, f"training.seed={HEALTHY_RUNS[name]}")
    folder = _place(output_dir, name)
    options = {"settings": settings, "data_dir": data_dir, "profile": profile}
    healthy = _place(output_dir, next(iter(HEALTHY_RUNS))) / "run"
    with (
        contextlib.redirect_stdout(io.StringIO()),
        planted(fault, folder, healthy=healthy, **options) as run,
    ):
        diagnosis = diagnose(run)
    causes = diagnosis.causes
    row = {
        "planted": name,
        "cause": fault.cause or NOTHING,
        "first": causes[0].code if causes else NOTHING,
        "found": " ".join(cause.code for cause in causes),
        "confidences": " ".join(f"{cause.confidence:.2f}" for cause in causes),
        "failed_gates": "; ".join(gate.name for gate in diagnosis.gates if gate.status == "failed"),
        "seconds": round(time.perf_counter() - started, 1),
        "code_version": code_version(),
    }
    if name in FAULTS:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _place(output_dir, name):
    return Path(output_dir) / name.replace(" ", "_")


def run_laboratory(output_dir, *, data_dir=WALL_CRACKS, profile="tiny", workers=None):
    """Judge all healthy runs and faults that have not been judged; return the table, see `score`."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for names in (HEALTHY_RUNS, FAULTS):  # some faults are planted into a healthy run
        rows = {name: _place(output_dir, name).with_suffix(".json") for name in names}
        missing = [name for name, path in rows.items() if not path.is_file()]
        jobs = [(name, output_dir, data_dir, profile) for name in missing]
        done = len(names) - len(missing)
        for row in run_jobs(judge_fault, jobs, description="judged", done=done, workers=workers):
            write_json(rows[row["planted"]], row)
    files = [_place(output_dir, name).with_suffix(".json") for name in (*HEALTHY_RUNS, *FAULTS)]
    table = pd.DataFrame([read_json(path, "run the laboratory again") for path in files])
    write_text(Path(output_dir) / "confusion.csv", table.to_csv(index=False))
    return table


def main(arguments=None):
    """Run the command line; 1 if a fault was missed or a healthy run has a cause."""
    parser = argparse.ArgumentParser(
        prog="python -m data.experiments.make_confusion", description=__doc__
    )
    parser.add_argument("--output", type=resolve, default=LABORATORY_RUNS, help="where rows go")
    parser.add_argument("--workers", type=int, help="runs at a time, by default one per core")
    parser.add_argument(
        "--publish", action="store_true", help="write the table to data/experiments"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options):
    """Run the laboratory as the command line asks for."""
    table = run_laboratory(options.output, workers=options.workers)
    counts = score(table)
    for name, value in counts.items():
        print(f"{name:<13}{value}")
    if options.publish:
        write_text(CONFUSION_TABLE, table.to_csv(index=False))
    return 1 if counts["missed"] or counts["false_alarms"] else 0


if __name__ == "__main__":
    sys.exit(main())
