"""The confusion matrix of the diagnosis: ``python -m helpers.lab.confusion``.

Every fault is planted, a run is made with it, the diagnosis is asked, and its answer is kept; so
are its answers on healthy runs. A fault that was judged is not judged again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.causes import CAUSES
from helpers.diagnose.diagnosis import diagnose
from helpers.files import DATA, RUNS, WALL_CRACKS, read_json, resolve, write_json, write_text
from helpers.lab.experiment import code_version, run_command, run_jobs
from helpers.lab.faults import FAULTS, HEALTHY, planted

CONFUSION_TABLE = DATA / "experiments" / "confusion.csv"
"""The committed table: one row per planted fault and per healthy run."""
LABORATORY_RUNS = RUNS / "laboratory"
HEALTHY_RUNS = {f"healthy {seed}": seed for seed in (1, 2, 3)}
NOTHING = "no cause"
EPOCHS = "scale.num_epochs=0.1"  # five of 50, so that a fault is judged within a minute


def judge_fault(name, output_dir, data_dir, profile):
    """Plant a fault of `FAULTS`, or none for a key of `HEALTHY_RUNS`, and write ``<name>.json``."""
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
    write_json(folder.with_suffix(".json"), row)


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
        for _ in run_jobs(judge_fault, jobs, description="judged", done=done, workers=workers):
            pass
    files = [_place(output_dir, name).with_suffix(".json") for name in (*HEALTHY_RUNS, *FAULTS)]
    table = pd.DataFrame([read_json(path, "run the laboratory again") for path in files])
    write_text(Path(output_dir) / "confusion.csv", table.to_csv(index=False))
    return table


def score(table):
    """Count how often the diagnosis was right.

    Parameters
    ----------
    table : pandas.DataFrame
        From `run_laboratory` or the committed file: ``planted``, ``cause``, ``first``, ``found``.

    Returns
    -------
    dict
        ``faults``; ``named_first`` and ``among_found``, shares of the faults; ``healthy_runs`` and
        ``false_alarms``, healthy runs with a cause; ``missed`` and ``not_first``, names.
    """
    table = table.fillna("")
    is_fault = table["cause"] != NOTHING
    faults, healthy = table[is_fault], table[~is_fault]
    first = faults["first"] == faults["cause"]
    pairs = zip(faults["cause"], faults["found"], strict=True)
    among = np.array([cause in found.split() for cause, found in pairs], dtype=bool)
    return {
        "faults": len(faults),
        "named_first": float(first.mean()),
        "among_found": float(among.mean()),
        "healthy_runs": len(healthy),
        "false_alarms": int((healthy["first"] != NOTHING).sum()),
        "not_first": faults.loc[~first, "planted"].tolist(),
        "missed": faults.loc[~among, "planted"].tolist(),
    }


def confusion_figure(table):
    """Draw planted faults (rows) against the causes found (columns), from the table of `score`.

    A large square is the cause named first, a small one a further cause; a ring marks the planted one.
    """
    order = [*CAUSES, NOTHING]
    table = table.fillna("").sort_values("cause", key=lambda c: c.map(order.index), kind="stable")
    answers = [found.split() or [NOTHING] for found in table["found"]]
    columns = [code for code in order if code in {*table["cause"], *sum(answers, []), NOTHING}]
    size = (4 + 0.26 * len(columns), 2.6 + 0.24 * len(table))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    for place, (cause, codes) in enumerate(zip(table["cause"], answers, strict=True)):
        ax.plot(columns.index(cause), place, "o", color="0.4", markersize=9, mfc="none")
        for number, code in enumerate(codes):
            size = 5 if number == 0 else 2.5
            ax.plot(columns.index(code), place, "s", color="#0072B2", markersize=size)
    ax.set_yticks(range(len(table)), table["planted"], fontsize=8)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.margins(0.015)
    ax.set(xlabel="cause found", ylabel="planted fault")
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.invert_yaxis()
    return figure


def main(arguments=None):
    """Run the command line; 1 if a fault was missed or a healthy run has a cause."""
    parser = argparse.ArgumentParser(prog="python -m helpers.lab.confusion", description=__doc__)
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
