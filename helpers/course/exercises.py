"""Exercises are made from their solutions, so that the two cannot drift apart.

``notebooks/solutions/NN_exercise.ipynb`` is written by hand and runs from top to bottom. In it, a
code cell tagged ``solution`` begins with the task as comments; the next code cell calls `answered`
with the names that the task is to assign. ``python -m helpers.exercises`` writes the notebooks in
``notebooks/exercises/``: of such a cell only the task is left, and every name is ``...``; text cells
tagged ``solution`` are left out, and so are all outputs.
"""

from __future__ import annotations

import argparse
import ast
import copy
from pathlib import Path

import nbformat

from helpers.course.run import NOTEBOOKS, find_notebooks, refresh
from helpers.errors import InputError
from helpers.files import write_text

SOLUTIONS, EXERCISES = NOTEBOOKS / "solutions", NOTEBOOKS / "exercises"
SOLUTION_TAG = "solution"


def answered(**answers):
    """Refuse to go on while a task is not done.

    Parameters
    ----------
    **answers
        Name to value, of what a task asked for.

    Raises
    ------
    InputError
        Naming the answers that are still ``...``.
    """
    missing = [name for name, value in answers.items() if value is ...]
    if missing:
        raise InputError(
            f"not answered yet: {', '.join(missing)}",
            where="exercise",
            fix="do the task in the cell above and replace the ...",
        )


def exercise_from(solution):
    """Take the solution out of a notebook.

    Parameters
    ----------
    solution : nbformat.NotebookNode
        Left as it is.

    Returns
    -------
    nbformat.NotebookNode
        With the ids of the cells that it keeps, without outputs and execution counts. The same
        solution always gives the same exercise.

    Raises
    ------
    InputError
        If a solution cell has no task, or no call of `answered` follows it.
    """
    exercise = copy.deepcopy(solution)
    exercise.cells = [
        cell
        for cell in exercise.cells
        if cell.cell_type != "markdown" or SOLUTION_TAG not in tags_of(cell)
    ]
    code = [cell for cell in exercise.cells if cell.cell_type == "code"]
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if SOLUTION_TAG in tags_of(cell):
            cell.source = _unsolved(cell, following)
            cell.metadata.tags = ["exercise"]
        cell.outputs, cell.execution_count = [], None
    return exercise


def tags_of(cell):
    """Return the tags of a cell as a list."""
    return list(cell.metadata.get("tags", []))


def asked_names(cell):
    """Return the names that a cell passes to `answered`.

    Parameters
    ----------
    cell : nbformat.NotebookNode
        A code cell.

    Returns
    -------
    list of str
        Empty if it does not call it.
    """
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    called = [call for call in calls if getattr(call.func, "id", None) == answered.__name__]
    return [keyword.arg for call in called for keyword in call.keywords]


def _unsolved(cell, following):
    """Return the source of a solution cell without the solution: the task, and names to fill in."""
    lines = cell.source.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    names = [] if following is None else asked_names(following)
    if not end or not names:
        lacking = "call of answered(...) after it" if end else "task, a comment at its beginning"
        raise InputError(f"a solution has no {lacking}", where=f"cell {cell.id}")
    return "\n".join([*lines[:end], *(f"{name} = ..." for name in names)])


def exercise_text(path):
    """Make the exercise of a solution notebook as the text of its file.

    Parameters
    ----------
    path : os.PathLike
        Solution.

    Returns
    -------
    str
    """
    return nbformat.writes(exercise_from(nbformat.read(path, as_version=4))) + "\n"


def write_exercises(solutions=SOLUTIONS, exercises=EXERCISES):
    """Write the exercise of every solution.

    Parameters
    ----------
    solutions, exercises : os.PathLike
        Folders.

    Returns
    -------
    list of pathlib.Path
        The files written.
    """
    Path(exercises).mkdir(parents=True, exist_ok=True)
    texts = {path.name: exercise_text(path) for path in find_notebooks(solutions)}
    return [write_text(Path(exercises) / name, text) for name, text in texts.items()]


def main(arguments=None):
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program name.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.course.exercises", description=__doc__)
    parser.add_argument(
        "--execute", action="store_true", help="first run the solutions and store their outputs"
    )
    if parser.parse_args(arguments).execute:
        refresh(SOLUTIONS)
    for path in write_exercises():
        print(path.relative_to(NOTEBOOKS.parent))


if __name__ == "__main__":
    main()
