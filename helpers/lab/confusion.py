"""Planted against diagnosed: ``python -m helpers.confusion``.

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
from helpers.lab.experiment import code_version, exit_status, run_jobs
from helpers.lab.faults import FAULTS
from helpers.lab.planting import LAB_EPOCHS_SETTING, planted

CONFUSION_TABLE = DATA / "experiments" / "confusion.csv"
"""The committed table: one row per planted fault and per healthy run."""
LABORATORY_RUNS = RUNS / "laboratory"
HEALTHY_SEEDS = (1, 2, 3)
HEALTHY = "healthy"
NOTHING = "no cause"


def judge_fault(name, output_dir, data_dir, profile):
    """Plant one fault, or none, and write what the diagnosis says.

    Parameters
    ----------
    name : str
        Key of `helpers.lab.faults.FAULTS`, or ``"healthy 1"`` for a healthy run with that seed.
    output_dir : pathlib.Path
        Gets ``<name>.json``; holds the healthy runs.
    data_dir : os.PathLike
    profile : str
    """
    started = time.perf_counter()
    fault, settings = FAULTS.get(name), LAB_EPOCHS_SETTING
    if fault is None:
        settings = (*settings, f"training.seed={name.split()[-1]}")
    folder = output_dir / name.replace(" ", "_")
    healthy = output_dir / f"{HEALTHY}_{HEALTHY_SEEDS[0]}" / "run"
    where = {"healthy": healthy, "settings": settings, "data_dir": data_dir, "profile": profile}
    with contextlib.redirect_stdout(io.StringIO()), planted(fault, folder, **where) as run:
        diagnosis = diagnose(run)
    causes = diagnosis.causes
    row = {
        "planted": name,
        "row": "" if fault is None else fault.row,
        "cause": NOTHING if fault is None else fault.cause,
        "first": causes[0].code if causes else NOTHING,
        "found": " ".join(cause.code for cause in causes),
        "confidences": " ".join(f"{cause.confidence:.2f}" for cause in causes),
        "failed_gates": "; ".join(gate.name for gate in diagnosis.gates if gate.status == "failed"),
        "seconds": round(time.perf_counter() - started, 1),
        "code_version": code_version(),
    }
    if fault is not None:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(output_dir / f"{folder.name}.json", row)


def run_laboratory(output_dir, *, data_dir=WALL_CRACKS, profile="tiny", workers=None):
    """Judge all healthy runs and all faults that have not been judged.

    Parameters
    ----------
    output_dir : pathlib.Path
    data_dir : os.PathLike
    profile : str
    workers : int, optional
        See `helpers.lab.experiment.run_jobs`.

    Returns
    -------
    pandas.DataFrame
        See `score`.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    healthy = [f"{HEALTHY} {seed}" for seed in HEALTHY_SEEDS]
    for names in (healthy, list(FAULTS)):  # some faults are planted into a healthy run
        missing = [n for n in names if not (output_dir / f"{n.replace(' ', '_')}.json").is_file()]
        jobs = [(name, output_dir, data_dir, profile) for name in missing]
        done = len(names) - len(missing)
        for _ in run_jobs(judge_fault, jobs, description="judged", done=done, workers=workers):
            pass
    files = [output_dir / f"{name.replace(' ', '_')}.json" for name in (*healthy, *FAULTS)]
    table = pd.DataFrame([read_json(path, "run the laboratory again") for path in files])
    for column in ("what", "signature"):
        table[column] = [getattr(FAULTS.get(name), column, "") for name in table["planted"]]
    write_text(output_dir / "confusion.csv", table.to_csv(index=False))
    return table


def score(table):
    """Count how often the diagnosis was right.

    Parameters
    ----------
    table : pandas.DataFrame
        From `run_laboratory` or the committed file.

    Returns
    -------
    dict
        ``faults``; ``named_first`` and ``among_found``, shares of the faults; ``healthy_runs`` and
        ``false_alarms``, healthy runs with a cause; ``missed`` and ``not_first``, names.
    """
    table = table.fillna("")
    faults = table[table["cause"] != NOTHING]
    healthy = table[table["cause"] == NOTHING]
    first = faults["first"] == faults["cause"]
    among = pd.Series(
        [
            cause in found.split()
            for cause, found in zip(faults["cause"], faults["found"], strict=True)
        ],
        index=faults.index,
        dtype=bool,
    )
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
    """Draw planted faults against the causes found.

    Parameters
    ----------
    table : pandas.DataFrame
        See `score`.

    Returns
    -------
    matplotlib.figure.Figure
        One row per fault, one column per cause; a large square is the cause named first, a small
        one a further cause, and a ring marks the cause that was planted.
    """
    order = [*CAUSES, NOTHING]
    table = table.fillna("").sort_values("cause", key=lambda c: c.map(order.index), kind="stable")
    table = table.reset_index(drop=True)
    columns = [code for code in CAUSES if (table["cause"] == code).any() or _found_by(table, code)]
    columns.append(NOTHING)
    figure = Figure(
        figsize=(4 + 0.26 * len(columns), 2.6 + 0.24 * len(table)), layout="constrained"
    )
    ax = figure.subplots()
    for place, row in table.iterrows():
        ax.plot(columns.index(row["cause"]), place, "o", color="0.4", markersize=9, mfc="none")
        for number, code in enumerate(row["found"].split() or [NOTHING]):
            size = 5 if number == 0 else 2.5
            ax.plot(columns.index(code), place, "s", color="#0072B2", markersize=size)
    labels = [
        f"{row.planted} ({row.row})" if row.row else row.planted for row in table.itertuples()
    ]
    ax.set_yticks(range(len(table)), labels, fontsize=8)
    ax.set_xticks(np.arange(len(columns)), columns, rotation=90, fontsize=8)
    ax.margins(0.015)
    ax.set(xlabel="cause found", ylabel="planted fault (row of the catalogue)")
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.invert_yaxis()
    return figure


def _found_by(table, code):
    """Tell whether a cause was found in any row."""
    return any(code in found.split() for found in table["found"])


def main(arguments=None):
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional

    Returns
    -------
    int
        0 if every fault is among the causes found and no healthy run has one, 1 if not, 2 for
        unusable input, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.lab.confusion", description=__doc__)
    parser.add_argument("--output", type=resolve, default=LABORATORY_RUNS, help="where rows go")
    parser.add_argument("--workers", type=int, help="runs at a time, by default one per core")
    parser.add_argument(
        "--publish", action="store_true", help="write the table to data/experiments"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options):
    """Run the laboratory as the command line asks for."""
    table = run_laboratory(options.output, workers=options.workers)
    counted = score(table)
    for name, value in counted.items():
        print(f"{name:<13}{value}")
    if options.publish:
        CONFUSION_TABLE.parent.mkdir(parents=True, exist_ok=True)
        write_text(CONFUSION_TABLE, table.to_csv(index=False))
    return 1 if counted["missed"] or counted["false_alarms"] else 0


if __name__ == "__main__":
    sys.exit(main())
