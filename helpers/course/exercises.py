"""Make the exercises from their solutions, so that the two cannot drift apart.

``notebooks/solutions/NN_exercise.ipynb`` is written by hand and runs from top to bottom. In it, a
code cell tagged ``solution`` begins with the task as comments; the next code cell calls `answered`
with the names that the task is to assign. ``python -m helpers.course.exercises`` writes the
notebooks in ``notebooks/exercises/``: of such a cell only the task is left, and every name is
``...``; text cells tagged ``solution`` are left out, and so are all outputs.
"""

from __future__ import annotations

import argparse
import ast
import copy
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

from helpers.course.notebook import NOTEBOOKS, answered
from helpers.course.run import find_notebooks, refresh
from helpers.errors import InputError
from helpers.files import write_text

SOLUTIONS, EXERCISES = NOTEBOOKS / "solutions", NOTEBOOKS / "exercises"
SOLUTION_TAG, EXERCISE_TAG = "solution", "exercise"


def exercise_from(solution):
    """Return a copy of a notebook without its solutions, outputs and counts; ids are kept.

    Raises `InputError` if a solution has no task, or no call of `answered` follows it.
    """
    exercise = copy.deepcopy(solution)
    code = [cell for cell in exercise.cells if cell.cell_type == "code"]
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if SOLUTION_TAG in cell.metadata.get("tags", []):
            cell.source = _task(cell, following)
            cell.metadata.tags = [EXERCISE_TAG]
    exercise, _ = TagRemovePreprocessor(remove_cell_tags=[SOLUTION_TAG]).preprocess(exercise, {})
    exercise, _ = ClearOutputPreprocessor().preprocess(exercise, {})
    return exercise


def asked_names(cell):
    """Return the names that a code cell passes to `answered`, as a list."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", None) == answered.__name__]
    return [keyword.arg for call in calls for keyword in call.keywords]


def _task(cell, following):
    """Return the source of a solution cell without the solution: the task, and names to fill in."""
    lines = cell.source.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    names = [] if following is None else asked_names(following)
    if not end or not names:
        lacking = "call of answered(...) after it" if end else "task, a comment at its beginning"
        raise InputError(f"a solution has no {lacking}", where=f"cell {cell.id}")
    return "\n".join([*lines[:end], *(f"{name} = ..." for name in names)])


def exercise_text(path):
    """Return the exercise of a solution notebook as the text of its file."""
    return nbformat.writes(exercise_from(nbformat.read(path, as_version=4))) + "\n"


def write_exercises(solutions=SOLUTIONS, exercises=EXERCISES):
    """Write the exercise of every solution in a folder; return the paths written."""
    Path(exercises).mkdir(parents=True, exist_ok=True)
    texts = {path.name: exercise_text(path) for path in find_notebooks(solutions)}
    return [write_text(Path(exercises) / name, text) for name, text in texts.items()]


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.course.exercises", description=__doc__)
    parser.add_argument(
        "--execute", action="store_true", help="first run the solutions and store their outputs"
    )
    if parser.parse_args(arguments).execute:
        refresh(SOLUTIONS, jobs=1)  # they share a healthy run, which the first one makes
    for path in write_exercises():
        print(path.relative_to(NOTEBOOKS.parent))


if __name__ == "__main__":
    main()
