"""Exercises and solutions are made from one another."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.course.notebook import answered
from helpers.errors import InputError
from notebooks.run import find_notebooks
from notebooks.solutions.make_exercises import (
    EXERCISES,
    SOLUTIONS,
    asked_names,
    exercise_from,
    write_exercises,
)

SOLVED = find_notebooks(SOLUTIONS)
OPEN = find_notebooks(EXERCISES)
each_solution = pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
each_exercise = pytest.mark.parametrize("path", OPEN, ids=lambda path: path.stem)


def tags_of(cell):
    return cell.metadata.get("tags", [])


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def notebook_of(*cells):
    notebook = new_notebook(cells=list(cells))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def solved_notebook():
    return notebook_of(
        new_markdown_cell("# Title"),
        new_markdown_cell("the answer", metadata={"tags": ["solution"]}),
        new_code_cell(
            "# Task: add.\n# Say why.\nhelper = 1  # secret\ntotal = helper + 1\nwhy = 'sum'",
            metadata={"tags": ["solution"]},
            outputs=[new_output("stream", text="2")],
            execution_count=1,
        ),
        new_code_cell("answered(total=total, why=why)\nprint(total)", execution_count=2),
    )


def test_of_a_solution_only_the_task_and_the_names_are_left():
    exercise = exercise_from(solved_notebook())
    assert [cell.id for cell in exercise.cells] == ["cell-0", "cell-2", "cell-3"]
    assert exercise.cells[1].source == "# Task: add.\n# Say why.\ntotal = ...\nwhy = ..."
    assert tags_of(exercise.cells[1]) == ["exercise"]
    assert exercise.cells[2].source == "answered(total=total, why=why)\nprint(total)"
    for cell in code_of(exercise):
        assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_solution_is_left_as_it_is():
    solution, untouched = solved_notebook(), solved_notebook()
    exercise_from(solution)
    assert solution == untouched


@pytest.mark.parametrize(
    ("source", "following", "lacking"),
    [
        ("total = 1", "answered(total=total)", "no task"),
        ("# Task: add.\ntotal = 1", "print(total)", "no call of answered"),
    ],
)
def test_a_solution_without_task_or_check_is_refused(source, following, lacking):
    solution = notebook_of(
        new_code_cell(source, metadata={"tags": ["solution"]}), new_code_cell(following)
    )
    with pytest.raises(InputError, match=f"cell-0.*{lacking}"):
        exercise_from(solution)


def test_a_solution_at_the_end_is_refused():
    solution = notebook_of(new_code_cell("# Task.\na = 1", metadata={"tags": ["solution"]}))
    with pytest.raises(InputError, match="no call of answered"):
        exercise_from(solution)


def test_an_open_task_stops_with_its_name():
    with pytest.raises(InputError, match="not answered yet: total"):
        answered(total=..., why="sum")
    answered(total=0, why=None)


def test_writing_twice_gives_the_same_files(tmp_path):
    (tmp_path / "solutions").mkdir()
    nbformat.write(solved_notebook(), tmp_path / "solutions" / "01_exercise.ipynb")
    texts = []
    for _ in range(2):
        [path] = write_exercises(tmp_path / "solutions", tmp_path / "exercises")
        texts.append(path.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert "secret" not in texts[0]


def test_there_is_one_exercise_per_solution():
    assert [path.name for path in OPEN] == [path.name for path in SOLVED]
    assert [path.stem for path in SOLVED] == [f"0{number}_exercise" for number in range(1, 8)]


@each_solution
def test_exercise_is_what_its_solution_gives(path):
    committed = (EXERCISES / path.name).read_text(encoding="utf-8")
    made = nbformat.writes(exercise_from(read(path))) + "\n"
    assert committed == made, "run `python -m notebooks.solutions.make_exercises`"


@each_solution
def test_exercise_holds_no_line_of_a_solution(path):
    shown = "\n".join(cell.source for cell in read(EXERCISES / path.name).cells)
    for cell in read(path).cells:
        if "solution" not in tags_of(cell):
            continue
        hidden = [line.strip() for line in cell.source.splitlines()]
        if cell.cell_type == "code":
            hidden = [line for line in hidden if not line.startswith(("#", "from ", "import "))]
        hidden = [line for line in hidden if len(line) > 12]
        assert hidden, cell.source
        assert not [line for line in hidden if line in shown]


@each_exercise
def test_exercise_has_tasks_and_no_outputs(path):
    code = code_of(read(path))
    open_cells = [cell for cell in code if "exercise" in tags_of(cell)]
    assert len(open_cells) >= 3, "a guess, a treatment and a question of the lesson"
    assert not [cell for cell in code if cell.outputs or cell.execution_count]


@each_exercise
def test_every_task_stops_the_exercise_until_it_is_done(path):
    """Each cell after a task refuses its open names before it computes anything."""
    code = code_of(read(path))
    for cell, following in zip(code, code[1:], strict=False):
        if "exercise" in tags_of(cell):
            names = re.findall(r"^(\w+) = \.\.\.$", cell.source, flags=re.M)
            assert names == asked_names(following)
            assert following.source.startswith("answered(")
