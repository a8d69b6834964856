"""Every notebook executes: with its defaults, at the edge, and not at all with nonsense."""

import json
import shutil

import nbformat
import pandas as pd
import pytest
from filelock import FileLock
from source_builders import blob, write_with_supervision
from tiny_random import write_dataset

from data.experiments.cells import TABLES
from helpers.errors import InputError
from notebooks.clinic import Clinic
from notebooks.run import (
    LONGEST_FIRST,
    NOTEBOOKS,
    execute,
    find_notebooks,
    notebooks_read_by,
    parameter_names,
)
from notebooks.solutions.make_exercises import SOLUTIONS

PATHS = find_notebooks()
WITH_THRESHOLD = [path for path in PATHS if "score_threshold" in parameter_names(path)]
MARK = "# NBVAL_CHECK_OUTPUT"
CELL_TIMEOUT = 900  # seconds
LONG = ("02", "03", "04", "07", "08", "09")  # first lessons of chains that `make lessons` runs
QUICK_SOLUTION = "02"
MANY = {
    "train": {
        f"{name}.png": [("crack", blob(8 + n, 8, 16, 32)), ("joint", blob(50, 4 + n, 30, 12))]
        for n, name in enumerate("abcdefgh")
    }
}


def chains():
    """List the lessons by the runs they share, the longest first: each list is one test."""
    found = {path.stem: [path] for path in PATHS if not notebooks_read_by(path)}
    for path in PATHS:
        for name in notebooks_read_by(path):
            found[name].append(path)
    order = {number: place for place, number in enumerate(LONGEST_FIRST)}
    return sorted(found.values(), key=lambda chain: order.get(chain[0].stem[:2], len(order)))


def marked_outputs(notebook):
    """Return what the marked cells print."""
    return [
        "".join(output["text"] for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith(MARK)
    ]


@pytest.fixture
def in_process(monkeypatch):
    """Return a function that runs the code cells of a notebook in this process, without a kernel."""
    monkeypatch.chdir(NOTEBOOKS)

    def run_cells(path, parameters):
        assert set(parameters) <= parameter_names(path)
        names = {"__name__": "__main__"}
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{path.stem}, {cell.id}", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters

    return run_cells


@pytest.fixture(scope="session")
def exercises_dir(shared_folder):
    """Return the folder of all exercises, with the healthy run that they share."""
    folder = shared_folder / "exercises"
    with FileLock(folder.with_suffix(".lock")):
        Clinic(folder / "clinic")
    return folder


@pytest.mark.notebook
def test_healthy_run_of_the_exercises_detects(exercises_dir):
    """Made before the long lessons, so that no solution waits for it while another makes it."""
    clinic = Clinic(exercises_dir / "clinic")
    assert clinic.signs.found >= 0.9
    assert clinic.signs.false_alarms <= 0.2


def long_ones(values, is_long):
    """Mark the values that are left to `make lessons`, which CI runs after `make test`."""
    return [pytest.param(v, marks=pytest.mark.lesson if is_long(v) else ()) for v in values]


@pytest.mark.notebook
@pytest.mark.parametrize(
    "chain",
    long_ones(chains(), lambda chain: chain[0].stem.startswith(LONG)),
    ids=lambda chain: "-".join(p.stem for p in chain),
)
def test_runs_with_its_defaults_and_where_nothing_reaches_the_threshold(
    tmp_path, chain, in_process
):
    for path in chain:
        settings = {"output_dir": str(tmp_path)}
        notebook = execute(path, tmp_path / path.name, settings, cell_timeout=CELL_TIMEOUT)
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert json.loads((tmp_path / path.stem / "results.json").read_text())
        printed = marked_outputs(notebook)
        assert printed
        assert printed == marked_outputs(nbformat.read(path, as_version=4))
        if path in WITH_THRESHOLD:
            in_process(path, settings | {"score_threshold": 0.99})


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path",
    long_ones(find_notebooks(SOLUTIONS), lambda path: not path.stem.startswith(QUICK_SOLUTION)),
    ids=lambda path: path.stem,
)
def test_solution_mends_its_patient(path, exercises_dir):
    settings = {"output_dir": str(exercises_dir)}
    execute(path, exercises_dir / path.name, settings, cell_timeout=CELL_TIMEOUT)
    results = json.loads((exercises_dir / path.stem / "results.json").read_text(encoding="utf-8"))
    assert results["cured"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_refuses_an_impossible_value(tmp_path, path, in_process):
    impossible = {"score_threshold": 1.5} if path in WITH_THRESHOLD else {"seed": -1}
    name, value = next(iter(impossible.items()))
    with pytest.raises(InputError, match=f"{name} is {value}"):
        in_process(path, {"output_dir": str(tmp_path), **impossible})


@pytest.fixture
def own_data_run(tmp_path, in_process, capsys):
    """Return a function that runs notebook 07 on somebody's own folder: its results, what it printed."""

    def run(**parameters):
        parameters = {"output_dir": str(tmp_path / "course"), "epochs": 1, **parameters}
        in_process(NOTEBOOKS / "07_your_own_data.ipynb", parameters)
        folder = tmp_path / "course" / "07_your_own_data"
        return json.loads((folder / "results.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.notebook
def test_own_folder_with_splits_is_used_as_it_is(tmp_path, own_data_run):
    """No name is changed, and after one epoch on six pictures nothing need be detected."""
    source = write_dataset(tmp_path / "bars")
    results, printed = own_data_run(source=str(source))
    assert "the wrong way is not taken" in printed
    assert results["asked_as"] == results["found_by_word"] == {}
    assert {name: row["images"] for name, row in results["splits"].items()} == {
        "train": 6,
        "valid": 3,
        "test": 3,
    }


@pytest.mark.notebook
def test_own_folder_without_splits_in_another_format_with_a_photograph(tmp_path, own_data_run):
    source = write_with_supervision(tmp_path, "yolo", MANY)
    results, printed = own_data_run(
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
def test_own_data_that_cannot_be_used_are_refused(tmp_path, parameters, part, in_process):
    if parameters["source"] == "BARS":
        parameters = parameters | {"source": str(write_dataset(tmp_path / "bars"))}
    parameters |= {"output_dir": str(tmp_path / "course"), "epochs": 1}
    with pytest.raises(InputError, match=part):
        in_process(NOTEBOOKS / "07_your_own_data.ipynb", parameters)


def test_conclusions_fall_with_the_table_they_rest_on(tmp_path, in_process):
    """Replaced by one in which runs without objects detect, the table contradicts the text."""
    shutil.copytree(TABLES, tmp_path / "tables")
    path = tmp_path / "tables" / "causes.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[table["objects"] == "no", ["detected_share", "max_score"]] = "0.5"
    table.to_csv(path, index=False)
    parameters = {"output_dir": str(tmp_path), "tables_dir": str(tmp_path / "tables")}
    with pytest.raises(AssertionError, match="a run that read no object does not print as 0.000"):
        in_process(NOTEBOOKS / "06_root_cause.ipynb", parameters)
