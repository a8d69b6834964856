"""Make the exercises from their solutions, so that the two cannot drift apart.

``python -m notebooks.solutions.make_exercises``; with ``--execute`` the solutions are run first, and
their outputs stored.
"""

import argparse
import ast
from copy import deepcopy
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

from helpers.course.notebook import NOTEBOOKS, answered
from helpers.errors import InputError
from helpers.files import write_text
from notebooks.run import find_notebooks, refresh

SOLUTIONS, EXERCISES = NOTEBOOKS / "solutions", NOTEBOOKS / "exercises"


def exercise_from(solution):
    """Return a copy of a notebook without its solutions, outputs and counts; ids are kept."""
    # A code cell tagged "solution" begins with the task as comments, and the next code cell calls
    # `answered` with the names that the task is to assign: only these are left.
    exercise = deepcopy(solution)
    code = [cell for cell in exercise.cells if cell.cell_type == "code"]
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if "solution" in cell.metadata.get("tags", []):
            cell.source = _task(cell, following)
            cell.metadata.tags = ["exercise"]
    exercise, _ = TagRemovePreprocessor(remove_cell_tags=["solution"]).preprocess(exercise, {})
    exercise, _ = ClearOutputPreprocessor().preprocess(exercise, {})
    return exercise


def asked_names(cell):
    """Return the names that a code cell passes to `answered`, as a list."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", None) == answered.__name__]
    return [keyword.arg for call in calls for keyword in call.keywords]


def _task(cell, following):
    lines = cell.source.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    names = [] if following is None else asked_names(following)
    if not end or not names:
        lacking = "call of answered(...) after it" if end else "task, a comment at its beginning"
        raise InputError(f"a solution has no {lacking}", where=f"cell {cell.id}")
    return "\n".join([*lines[:end], *(f"{name} = ..." for name in names)])


def write_exercises(solutions=SOLUTIONS, exercises=EXERCISES):
    """Write the exercise of every solution in a folder; return the paths written."""
    made = {path.name: exercise_from(nbformat.read(path, 4)) for path in find_notebooks(solutions)}
    texts = {name: nbformat.writes(exercise) + "\n" for name, exercise in made.items()}
    return [write_text(Path(exercises) / name, text) for name, text in texts.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m notebooks.solutions.make_exercises")
    parser.add_argument("--execute", action="store_true", help="first run the solutions")
    if parser.parse_args().execute:
        refresh(
            SOLUTIONS, jobs=1, timed=False
        )  # they share a healthy run, which the first one makes
    write_exercises()
