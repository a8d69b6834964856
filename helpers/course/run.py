"""Run the notebooks: the whole course, or a refresh of the outputs stored in the repository.

``python -m helpers.course run`` executes every notebook into ``runs/course/`` and writes
``summary.json`` there; ``refresh`` stores fresh outputs in ``notebooks/``; ``verify`` says whether
the stored notebooks have the form that ``refresh`` leaves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

from helpers.config import parse_yaml
from helpers.course.notebook import RESULTS_FILE
from helpers.environment import versions_line
from helpers.errors import InputError
from helpers.files import ROOT, RUNS, resolve

NOTEBOOKS = ROOT / "notebooks"
COURSE_RUN = RUNS / "course"
SUMMARY_FILE = "summary.json"
STRIP_ARGUMENTS = (
    "--keep-output",
    "--keep-count",
    "--keep-id",
    "--extra-keys",
    "metadata.papermill cell.metadata.papermill",
)
"""Settings of nbstripout: outputs, counts and ids stay; widget state and timings go."""
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


class NotebookError(RuntimeError):
    """A notebook of the course failed while it was executed."""


def find_notebooks(folder=NOTEBOOKS):
    """Return the notebooks of the course in the order they are meant to be run.

    Parameters
    ----------
    folder : pathlib.Path

    Returns
    -------
    list of pathlib.Path
        Sorted by name: the numbered lessons, then the appendices.

    Raises
    ------
    InputError
        When there is none.
    """
    paths = sorted(Path(folder).glob("*.ipynb"))
    if not paths:
        raise InputError("no notebook found", where=folder, fix="run this in a complete checkout")
    return paths


def parameter_names(path):
    """Return the names in the parameters cell of a notebook as a set."""
    return set(papermill.inspect_notebook(path))


def execute(path, output_path, parameters=None, *, cell_timeout=None):
    """Execute one notebook in the folder of the notebooks, with papermill.

    Parameters
    ----------
    path, output_path : pathlib.Path
        Where it is and where the executed copy goes; a failed one is kept too.
    parameters : dict, optional
        Values for the parameters cell.
    cell_timeout : float, optional
        Seconds a single cell may take; no limit by default.

    Returns
    -------
    nbformat.NotebookNode

    Raises
    ------
    InputError
        When the notebook has no parameter of a given name; papermill would only log that.
    papermill.exceptions.PapermillExecutionError
        When a cell raises.
    NotebookError
        When a widget swallowed an error, which papermill takes for success.
    """
    parameters = dict(parameters or {})
    known = parameter_names(path)
    if unknown := sorted(set(parameters) - known):
        raise InputError(
            f"no parameter {', '.join(unknown)}",
            where=path,
            fix=f"choose from {', '.join(sorted(known))}",
        )
    Path(output_path).parent.mkdir(parents=True, exist_ok=True)
    notebook = papermill.execute_notebook(
        path,
        output_path,
        parameters,
        kernel_name="python3",
        cwd=Path(path).parent,
        progress_bar=False,
        execution_timeout=cell_timeout,
    )
    if errors := hidden_errors(notebook):
        named = "; ".join(f"{error['ename']}: {error['evalue']}" for error in errors)
        raise NotebookError(f"{path}: a widget hid {named}")
    return notebook


def hidden_errors(notebook):
    """Return the errors that ``Output`` widgets caught, which no cell output shows.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        Executed, with its widget state.

    Returns
    -------
    list of dict
        nbformat outputs of type ``error``.
    """
    widgets = notebook.metadata.get("widgets", {}).get(_WIDGET_STATE, {}).get("state", {})
    outputs = [output for model in widgets.values() for output in model["state"].get("outputs", [])]
    return [output for output in outputs if output.get("output_type") == "error"]


def run_course(output_dir=COURSE_RUN, parameters=None, *, folder=NOTEBOOKS):
    """Execute every notebook in order into one folder and write the summary.

    Parameters
    ----------
    output_dir : pathlib.Path
        Gets ``<name>.ipynb``, ``<name>/results.json`` and ``summary.json``.
    parameters : dict, optional
        Given to every notebook that has a parameter of that name.
    folder : pathlib.Path
        Where the notebooks are.

    Returns
    -------
    dict
        What `summarise` wrote.

    Raises
    ------
    InputError
        When no notebook has a parameter of a given name.
    NotebookError
        When a notebook wrote no results, or see `execute`.
    """
    output_dir, paths = Path(output_dir), find_notebooks(folder)
    parameters = {"output_dir": str(output_dir), **(parameters or {})}
    known = {path: parameter_names(path) for path in paths}
    if unknown := set(parameters) - set().union(*known.values()):
        raise InputError(f"no notebook has a parameter {', '.join(sorted(unknown))}", where=folder)
    seconds = {}
    for path in paths:
        (output_dir / path.stem / RESULTS_FILE).unlink(missing_ok=True)
        own = {name: value for name, value in parameters.items() if name in known[path]}
        started = time.perf_counter()
        execute(path, output_dir / path.name, own)
        seconds[path.stem] = round(time.perf_counter() - started, 1)
        print(f"{path.stem:<32} {seconds[path.stem]:7.1f} s", flush=True)
    return summarise(output_dir, seconds)


def summarise(output_dir, seconds):
    """Merge the results of the notebooks into ``summary.json``.

    Parameters
    ----------
    output_dir : pathlib.Path
        Folder of one pass through the course.
    seconds : dict
        Seconds each notebook took, by its name; these notebooks are merged.

    Returns
    -------
    dict
        ``versions``, ``seconds`` (the sum) and ``notebooks``: name to ``seconds`` and ``results``.

    Raises
    ------
    NotebookError
        When a notebook left no results.
    """
    notebooks = {}
    for name, duration in seconds.items():
        path = Path(output_dir) / name / RESULTS_FILE
        if not path.is_file():
            raise NotebookError(f"{name} finished without writing {path}")
        results = json.loads(path.read_text(encoding="utf-8"))
        notebooks[name] = {"seconds": duration, "results": results}
    total = round(sum(seconds.values()), 1)
    summary = {"versions": versions_line(), "seconds": total, "notebooks": notebooks}
    text = json.dumps(summary, indent=2) + "\n"
    (Path(output_dir) / SUMMARY_FILE).write_text(text, encoding="utf-8")
    return summary


def refresh(folder=NOTEBOOKS):
    """Execute the notebooks with their defaults and store the outputs in place, all or none.

    Parameters
    ----------
    folder : pathlib.Path
    """
    paths = find_notebooks(folder)
    with tempfile.TemporaryDirectory() as temporary:
        executed = [Path(temporary) / path.name for path in paths]
        for path, copy in zip(paths, executed, strict=True):
            execute(path, copy)
            print(f"{path.stem} executed", flush=True)
        strip(executed)
        for path, copy in zip(paths, executed, strict=True):
            shutil.copyfile(copy, path)


def strip(paths, *, verify=False):
    """Remove widget state and timings from notebooks, keeping outputs, counts and ids.

    Parameters
    ----------
    paths : iterable of pathlib.Path
    verify : bool
        Change nothing and only say whether something would change.

    Returns
    -------
    bool
        With `verify`, whether the notebooks are already in this form; else True.
    """
    command = [sys.executable, "-m", "nbstripout", *STRIP_ARGUMENTS]
    command += ["--verify"] if verify else []
    done = subprocess.run([*command, *map(str, paths)], check=not verify)
    return done.returncode == 0


def _setting(text):
    """Split ``name=value`` for argparse; the value is read as YAML, like papermill's ``-p``."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, parse_yaml(value, where=f"--set {name}")


def main(arguments=None):
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program name.

    Returns
    -------
    int
        0 done, 1 a notebook failed or is not in its stored form, 2 unusable input.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.course.run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the course and write summary.json")
    run.add_argument(
        "--output", type=resolve, default=COURSE_RUN, help="folder (default runs/course)"
    )
    run.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE")
    commands.add_parser("refresh", help="store fresh outputs in notebooks/")
    commands.add_parser("verify", help="check the form of the stored notebooks")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            return 0 if strip(find_notebooks(), verify=True) else 1
        if options.command == "refresh":
            refresh()
        else:
            summary = run_course(options.output, dict(options.set))
            print(f"{summary['seconds']:.0f} s in all; see {options.output / SUMMARY_FILE}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (NotebookError, PapermillExecutionError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
