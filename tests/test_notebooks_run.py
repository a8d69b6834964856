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

from helpers.course.run import NOTEBOOKS, execute, find_notebooks, parameter_names
from helpers.errors import InputError
from helpers.lab.experiment import TABLES

PATHS = find_notebooks()
WITH_THRESHOLD = [path for path in PATHS if "score_threshold" in parameter_names(path)]
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


def chains():
    """List the notebooks by the runs they share: each list is one test, in one process."""
    found = {path: [path] for path in PATHS if not needed_by(path)}
    for path in PATHS:
        for needed in needed_by(path):
            found[needed].append(path)
    return list(found.values())


def marked_outputs(notebook):
    """Return what the marked cells print."""
    return [
        "".join(output["text"] for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith(MARK)
    ]


@pytest.mark.parametrize("chain", chains(), ids=lambda chain: "-".join(p.stem for p in chain))
def test_runs_with_its_defaults_and_where_nothing_reaches_the_threshold(tmp_path, chain):
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
            settings["score_threshold"] = 0.99
            execute(path, tmp_path / "edge.ipynb", settings, cell_timeout=CELL_TIMEOUT)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_refuses_an_unknown_parameter(tmp_path, path):
    with pytest.raises(InputError, match="no parameter treshold"):
        execute(path, tmp_path / "out.ipynb", {"treshold": 0.5})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
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
