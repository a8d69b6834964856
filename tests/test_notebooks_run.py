"""Every notebook executes: with its defaults, at the edge, and not at all with nonsense."""

import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from papermill.exceptions import PapermillExecutionError
from source_builders import blob, write_with_supervision
from tiny_random import write_dataset

from helpers.course import NOTEBOOKS, execute, find_notebooks, parameter_names
from helpers.errors import InputError
from helpers.experiment import TABLES

PATHS = find_notebooks()
MARK = "# NBVAL_CHECK_OUTPUT"
CELL_TIMEOUT = 900  # seconds
MANY = {
    "train": {
        f"{name}.png": [("crack", blob(8 + n, 8, 16, 32)), ("joint", blob(50, 4 + n, 30, 12))]
        for n, name in enumerate("abcdefgh")
    }
}

pytestmark = pytest.mark.notebook


def needed_by(path):
    """List the notebooks whose runs a notebook reads."""
    names = re.findall(r'folder_of\(\\"(\w+)\\"\)', path.read_text(encoding="utf-8"))
    return [NOTEBOOKS / f"{name}.ipynb" for name in dict.fromkeys(names)]


def each(paths):
    """Parametrize by notebook; notebooks that share runs go to one process."""
    groups = {path: (needed_by(path) or [path])[0].stem for path in paths}
    marked = [
        pytest.param(path, marks=pytest.mark.xdist_group(group), id=path.stem)
        for path, group in groups.items()
    ]
    return pytest.mark.parametrize("path", marked)


WITH_THRESHOLD = [path for path in PATHS if "score_threshold" in parameter_names(path)]


class Course:
    """One pass through the course in a temporary folder, run as far as a test needs it."""

    def __init__(self, output_dir):
        self.output_dir = output_dir
        self.executed = {}

    def run(self, path):
        for one in (*needed_by(path), path):
            if one not in self.executed:
                self.executed[one] = None  # a notebook that fails is not tried again
                self.executed[one] = self.execute(one)
        assert self.executed[path] is not None, f"{path.stem} has failed before"
        return self.executed[path]

    def execute(self, path, **parameters):
        copy = self.output_dir / f"{path.stem}{'_edge' if parameters else ''}.ipynb"
        parameters = {"output_dir": str(self.output_dir), **parameters}
        return execute(path, copy, parameters, cell_timeout=CELL_TIMEOUT)


def marked_outputs(notebook):
    """Return what the marked cells print."""
    return [
        "".join(output["text"] for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith(MARK)
    ]


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    return Course(tmp_path_factory.mktemp("course"))


@each(PATHS)
def test_runs_with_its_defaults(course, path):
    notebook = course.run(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    results = json.loads((course.output_dir / path.stem / "results.json").read_text())
    assert results
    printed = marked_outputs(notebook)
    assert printed
    assert printed == marked_outputs(nbformat.read(path, as_version=4))


@each(WITH_THRESHOLD)
def test_runs_where_nothing_reaches_the_threshold(course, path):
    course.run(path)
    course.execute(path, score_threshold=0.99)


@each(PATHS)
def test_refuses_an_unknown_parameter(tmp_path, path):
    with pytest.raises(InputError, match="no parameter treshold"):
        execute(path, tmp_path / "out.ipynb", {"treshold": 0.5})


@each(PATHS)
def test_refuses_an_impossible_value(tmp_path, path):
    impossible = {"score_threshold": 1.5} if path in WITH_THRESHOLD else {"seed": -1}
    name, value = next(iter(impossible.items()))
    with pytest.raises(PapermillExecutionError) as refusal:
        execute(path, tmp_path / "out.ipynb", {"output_dir": str(tmp_path), **impossible})
    assert refusal.value.ename == "InputError"
    assert f"{name} is {value}" in refusal.value.evalue


def own_data_run(tmp_path, **parameters):
    """Execute notebook 07 on somebody's own folder; return its results and all it printed."""
    parameters = {"output_dir": str(tmp_path / "course"), "epochs": 1, **parameters}
    notebook = execute(
        NOTEBOOKS / "07_your_own_data.ipynb", tmp_path / "07.ipynb", parameters, cell_timeout=900
    )
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    printed = "".join(one.get("text", "") for one in outputs)
    folder = tmp_path / "course" / "07_your_own_data"
    return json.loads((folder / "results.json").read_text()), printed


def test_own_folder_with_splits_is_used_as_it_is(tmp_path):
    """No name is changed, and after one epoch on six pictures nothing need be detected."""
    source = write_dataset(tmp_path / "bars")
    results, printed = own_data_run(tmp_path, source=str(source))
    assert "the wrong way is not taken" in printed
    assert results["asked_as"] == results["found_by_word"] == {}
    assert {name: row["images"] for name, row in results["splits"].items()} == {
        "train": 6,
        "valid": 3,
        "test": 3,
    }


def test_own_folder_without_splits_in_another_format_with_a_photograph(tmp_path):
    source = write_with_supervision(tmp_path, "yolo", MANY)
    results, printed = own_data_run(
        tmp_path,
        source=str(source),
        nouns={"joint": "gap"},
        split_shares=[0.5, 0.25, 0.25],
        photograph=str(next(source.rglob("*.png"))),
    )
    assert "asked for 'crack, gap'" in printed
    assert results["format"] == "yolo"
    assert sum(row["images"] for row in results["splits"].values()) == len(MANY["train"])
    assert set(results["found_by_word"]) == {"crack, joint", "crack, gap"}


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"source": "no/such/folder"}, "no such file or folder"),
        ({"source": "BARS", "nouns": {"crak": "crack"}}, "did you mean 'crack'"),
    ],
)
def test_own_data_that_cannot_be_used_are_refused_before_the_training(tmp_path, parameters, part):
    if parameters["source"] == "BARS":
        parameters = parameters | {"source": str(write_dataset(tmp_path / "bars"))}
    with pytest.raises(PapermillExecutionError) as refusal:
        own_data_run(tmp_path, **parameters)
    assert refusal.value.ename == "InputError"
    assert part in refusal.value.evalue


def test_conclusions_fall_with_the_table_they_rest_on(tmp_path):
    """Replaced by one in which runs without objects detect, the table contradicts the text."""
    shutil.copytree(TABLES, tmp_path / "tables")
    path = tmp_path / "tables" / "causes.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[table["objects"] == "no", ["detected_share", "max_score"]] = "0.5"
    table.to_csv(path, index=False)
    parameters = {"output_dir": str(tmp_path), "tables_dir": str(tmp_path / "tables")}
    with pytest.raises(PapermillExecutionError) as failure:
        execute(NOTEBOOKS / "06_root_cause.ipynb", tmp_path / "out.ipynb", parameters)
    assert failure.value.ename == "AssertionError"
    assert "a run that read no object does not print as 0.000" in failure.value.evalue
