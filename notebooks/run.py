"""Run the notebooks: the whole course, or a refresh of the outputs stored in the repository.

``python -m notebooks.run run`` executes every notebook into ``runs/course/`` and writes
``summary.json`` and ``card.html`` there, ``card`` only the latter; ``refresh`` stores fresh outputs in
``notebooks/``, and how long they took; ``times`` only writes the minutes that pages promise;
``verify`` says whether the stored notebooks have the form that ``refresh`` leaves.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import papermill
import torch
from papermill.exceptions import PapermillExecutionError

from helpers.config import parse_yaml
from helpers.course.notebook import NOTEBOOKS, RESULTS_FILE
from helpers.environment import versions_line
from helpers.errors import InputError
from helpers.files import RUNS, read_json, resolve, write_json
from notebooks.card import CARD_FILE, SUMMARY_FILE, write_card
from notebooks.kernel import Manager
from notebooks.times import write_promises, write_times

COURSE_RUN = RUNS / "course"
LONGEST_FIRST = ("04", "03", "09", "02", "07", "08", "06", "05")  # the order only saves time
# Settings of nbstripout: outputs, counts and ids stay; widget state and timings go.
_TIMINGS = "metadata.papermill cell.metadata.papermill"
STRIP_ARGUMENTS = ("--keep-output", "--keep-count", "--keep-id", "--extra-keys", _TIMINGS)
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


class NotebookError(RuntimeError):
    """A notebook of the course failed while it was executed."""


def find_notebooks(folder=NOTEBOOKS):
    """Return the paths of the notebooks in a folder, in the order they are meant to be read."""
    paths = sorted(Path(folder).glob("*.ipynb"))
    if not paths:
        raise InputError("no notebook found", where=folder, fix="run this in a complete checkout")
    return paths


def parameter_names(path):
    """Return the names in the parameters cell of a notebook as a set."""
    return set(papermill.inspect_notebook(path))


def notebooks_read_by(path):
    """Return the stems of the notebooks whose results a notebook reads, as a set."""
    return set(re.findall(r'folder_of\(\\"(\w+)\\"\)', Path(path).read_text(encoding="utf-8")))


def execute(path, output_path, parameters=None, *, cell_timeout=None):
    """Execute a notebook in its own folder into a copy; an error that a widget hid is raised, too."""
    parameters = dict(parameters or {})
    # papermill would only log an unknown one.
    _refuse_unknown(parameters, parameter_names(path), "no parameter", path)
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    settings = {"kernel_name": "python3", "cwd": Path(path).parent, "progress_bar": False}
    settings |= {"execution_timeout": cell_timeout, "kernel_manager_class": Manager}
    notebook = papermill.execute_notebook(path, output_path, parameters, **settings)
    if errors := hidden_errors(notebook):
        listed = "; ".join(f"{error['ename']}: {error['evalue']}" for error in errors)
        raise NotebookError(f"{path}: a widget hid {listed}")
    return notebook


def _refuse_unknown(parameters, known, message, where):
    if unknown := sorted(set(parameters) - known):
        fix = f"choose from {', '.join(sorted(known))}"
        raise InputError(f"{message} {', '.join(unknown)}", where=where, fix=fix)


def hidden_errors(notebook):
    """Return the outputs of type ``error`` that ``Output`` widgets caught, as a list of dicts."""
    widgets = notebook.metadata.get("widgets", {}).get(_WIDGET_STATE, {}).get("state", {})
    outputs = [output for model in widgets.values() for output in model["state"].get("outputs", [])]
    return [output for output in outputs if output.get("output_type") == "error"]


def run_side_by_side(paths, output_dir, parameters=None, *, jobs=None):
    """Execute notebooks, each once those that it reads are done.

    Return two dicts: name to seconds of those that are done, and name to reason of those that failed.
    """
    waiting = sorted(paths, key=_place_in_line)
    names = {path.stem for path in waiting}
    jobs = _num_at_a_time(jobs, waiting)
    running, seconds, failures = {}, {}, {}
    with ProcessPoolExecutor(jobs, initializer=_use_one_thread) as pool:
        try:
            while waiting or running:
                for path in waiting.copy():
                    needed = notebooks_read_by(path) & names
                    if broken := needed & set(failures):
                        failures[path.stem] = f"not run, it reads {', '.join(sorted(broken))}"
                        waiting.remove(path)
                    elif needed <= set(seconds) and len(running) < jobs:
                        copy = Path(output_dir) / path.name
                        running[pool.submit(_attempt, path, copy, parameters)] = path.stem
                        waiting.remove(path)
                        print(f"{path.stem:<32} started", flush=True)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    duration, failure = future.result()
                    (failures if failure else seconds)[name] = failure or duration
                    done = f"{len(seconds) + len(failures)} of {len(names)}"
                    print(f"{name:<32} {duration:7.1f} s  {failure or 'done'} ({done})", flush=True)
        except BaseException as error:  # Ctrl-C too: a kernel ends with the process it belongs to
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise NotebookError("a process was killed; --jobs 1 needs less memory") from error
            raise
    return seconds, failures


def _raise_failures(failures, total):
    if failures:
        listed = "\n".join(f"{name}: {reason}" for name, reason in sorted(failures.items()))
        raise NotebookError(f"{len(failures)} of {total} notebooks failed\n{listed}")


def _place_in_line(path):
    number = path.stem[:2]
    return (LONGEST_FIRST.index(number) if number in LONGEST_FIRST else len(LONGEST_FIRST), path)


def _use_one_thread():
    """Let the kernels of this process compute with one thread, unless the user chose a number."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _attempt(path, output_path, parameters):
    """Execute a notebook with its own parameters; return seconds, and a line if it failed."""
    started, failure = time.perf_counter(), None
    try:
        known = parameter_names(path)
        own = {name: value for name, value in (parameters or {}).items() if name in known}
        execute(path, output_path, own)
    except PapermillExecutionError as error:
        place = f"cell {error.cell_index}, In [{error.exec_count}]"
        failure = f"failed in {place}: {error.ename}: {error.evalue}"
    except Exception as error:  # a dead kernel, a full disk: the other notebooks go on
        failure = f"failed: {type(error).__name__}: {error}"
    return round(time.perf_counter() - started, 1), failure


def run_course(output_dir=COURSE_RUN, parameters=None, *, folder=NOTEBOOKS, jobs=None):
    """Execute the notebooks of a folder, each with the parameters that it has; return the summary.

    Summary and card are also written if a notebook fails, before `NotebookError` names it.
    """
    output_dir, paths = Path(output_dir), find_notebooks(folder)
    parameters = {"output_dir": str(output_dir), **(parameters or {})}
    known = set().union(*map(parameter_names, paths))
    _refuse_unknown(parameters, known, "no notebook has a parameter", folder)
    for name in (SUMMARY_FILE, CARD_FILE):
        (output_dir / name).unlink(missing_ok=True)
    for path in paths:
        (output_dir / path.stem / RESULTS_FILE).unlink(missing_ok=True)
    seconds, failures = run_side_by_side(paths, output_dir, parameters, jobs=jobs)
    notebooks = {}
    for name, duration in sorted(seconds.items()):
        path = output_dir / name / RESULTS_FILE
        if path.is_file():
            results = read_json(path, fix="run the notebook again")
            notebooks[name] = {"seconds": duration, "results": results}
        else:
            failures[name] = f"finished without writing {path}"
    total = round(sum(seconds.values()), 1)
    summary = {"versions": versions_line(), "seconds": total, "notebooks": notebooks}
    summary["failures"] = failures
    write_json(output_dir / SUMMARY_FILE, summary)
    print(f"card: {write_card(output_dir)}")
    _raise_failures(failures, len(paths))
    return summary


def refresh(folder=NOTEBOOKS, *, jobs=None, timed=True):
    """Execute notebooks with their defaults and store the outputs in place, all or none.

    With `timed`, the seconds go to ``times.json``, and what the pages promise follows them.
    """
    paths, started = find_notebooks(folder), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        seconds, failures = run_side_by_side(paths, temporary, jobs=jobs)
        _raise_failures(failures, len(paths))
        wall_seconds = time.perf_counter() - started
        copies = [Path(temporary) / path.name for path in paths]
        strip(copies)
        for path, copy in zip(paths, copies, strict=True):
            shutil.copyfile(copy, path)
    if timed:
        write_times(seconds, wall_seconds, _num_at_a_time(jobs, paths), folder)
        write_promises(folder)


def _num_at_a_time(jobs, paths):
    """Return how many notebooks are executed side by side."""
    cores = 1 if torch.accelerator.is_available() else joblib.cpu_count()  # a GPU is shared
    return min(jobs or cores, len(paths))


def strip(paths, *, verify=False):
    """Remove widget state and timings from notebooks; with `verify`, only say if there are none."""
    command = [sys.executable, "-m", "nbstripout", *STRIP_ARGUMENTS, *map(str, paths)]
    command += ["--verify"] if verify else []
    return subprocess.run(command, check=not verify).returncode == 0


def _setting(text):
    """Split ``name=value`` for argparse; the value is read as the configs are, as YAML 1.2."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, parse_yaml(value, where=f"--set {name}")


def main(arguments=None):
    """Return 0 if done, 1 if a notebook failed or is not in its stored form, 2 for unusable input."""
    form = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", **form)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the course and write summary.json")
    card = commands.add_parser("card", help="write card.html again, from summary.json")
    for command in (run, card):
        command.add_argument(
            "--output", type=resolve, default=COURSE_RUN, help="(default runs/course)"
        )
    run.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE")
    refresh_parser = commands.add_parser("refresh", help="store fresh outputs in notebooks/")
    for command in (run, refresh_parser):
        command.add_argument("--jobs", type=int, help="notebooks at a time (default: one per core)")
    commands.add_parser("times", help="write the minutes that pages promise, from times.json")
    commands.add_parser("verify", help="check the form of the stored notebooks")
    try:
        options = parser.parse_args(arguments)
        if options.command == "verify":
            return 0 if strip(find_notebooks(), verify=True) else 1
        if options.command == "times":
            write_promises()
            return 0
        if options.command == "card":
            print(f"card: {write_card(options.output)}")
            return 0
        started = time.perf_counter()
        if options.command == "refresh":
            refresh(jobs=options.jobs)
        else:
            run_course(options.output, dict(options.set), jobs=options.jobs)
            print(f"summary: {options.output / SUMMARY_FILE}")
        print(f"{time.perf_counter() - started:.0f} s in all")
    except (InputError, NotebookError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("stopped; the notebooks that had finished are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
