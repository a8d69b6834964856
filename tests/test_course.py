import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError

from helpers.course.run import (
    NotebookError,
    execute,
    find_notebooks,
    hidden_errors,
    run_course,
    strip,
)
from helpers.errors import InputError

HIDDEN = """
import ipywidgets
with ipywidgets.Output():
    raise RuntimeError("swallowed")
"""
SAVE = """
import json, pathlib
folder = pathlib.Path(output_dir) / {name!r}
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "results.json").write_text(json.dumps({{"number": number}}))
"""


def write_notebook(folder, name, *sources, parameters='number: int = 1\noutput_dir: str = "."'):
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = new_notebook(
        cells=[new_markdown_cell("# Test"), first, *map(new_code_cell, sources)]
    )
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def test_notebooks_come_in_the_order_of_the_course(tmp_path):
    for name in ("A1_how", "02_two", "00_zero"):
        write_notebook(tmp_path, name)
    assert [path.stem for path in find_notebooks(tmp_path)] == ["00_zero", "02_two", "A1_how"]


def test_no_notebook_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no notebook"):
        find_notebooks(tmp_path)


def test_unknown_parameter_is_refused_before_anything_runs(tmp_path):
    path = write_notebook(tmp_path, "00_zero", "1 / 0")
    with pytest.raises(InputError, match="no parameter nmber.*number"):
        execute(path, tmp_path / "out.ipynb", {"nmber": 2})
    assert not (tmp_path / "out.ipynb").exists()


def test_unknown_setting_of_the_course_is_refused(tmp_path):
    write_notebook(tmp_path, "00_zero")
    with pytest.raises(InputError, match="no notebook has a parameter nmber"):
        run_course(tmp_path / "out", {"nmber": 2}, folder=tmp_path)


def test_hidden_errors_are_read_from_the_widget_state():
    error = {
        "output_type": "error",
        "ename": "RuntimeError",
        "evalue": "swallowed",
        "traceback": [],
    }
    state = {"a": {"state": {"outputs": [error]}}, "b": {"state": {"value": 1}}}
    kind = "application/vnd.jupyter.widget-state+json"
    notebook = new_notebook(metadata={"widgets": {kind: {"state": state}}})
    assert [found["evalue"] for found in hidden_errors(notebook)] == ["swallowed"]
    assert hidden_errors(new_notebook()) == []


@pytest.mark.notebook
def test_error_that_a_widget_swallows_fails(tmp_path):
    path = write_notebook(tmp_path, "00_zero", HIDDEN)
    with pytest.raises(NotebookError, match="swallowed"):
        execute(path, tmp_path / "out.ipynb")


@pytest.mark.notebook
def test_course_runs_in_order_and_merges_the_results(tmp_path, capsys):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "00_zero", SAVE.format(name="00_zero"))
    write_notebook(
        folder,
        "01_one",
        SAVE.format(name="01_one"),
        parameters='output_dir: str = "."\nnumber: int = 5',
    )
    summary = run_course(tmp_path / "out", {"number": 3}, folder=folder)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: part["results"] for name, part in summary["notebooks"].items()} == {
        "00_zero": {"number": 3},
        "01_one": {"number": 3},
    }
    assert (tmp_path / "out" / "01_one.ipynb").is_file()
    assert capsys.readouterr().out.index("00_zero") == 0


@pytest.mark.notebook
def test_failing_cell_stops_the_course_and_leaves_no_stale_results(tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "00_zero", "1 / 0")
    (out / "00_zero").mkdir(parents=True)
    (out / "00_zero" / "results.json").write_text("{}")
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        run_course(out, folder=folder)
    assert not (out / "00_zero" / "results.json").exists()
    assert not (out / "summary.json").exists()


@pytest.mark.notebook
def test_notebook_without_results_is_an_error(tmp_path):
    write_notebook(tmp_path, "00_zero", "pass")
    with pytest.raises(NotebookError, match="without writing"):
        run_course(tmp_path / "out", folder=tmp_path)


def test_strip_keeps_outputs_counts_and_ids_and_drops_the_rest(tmp_path):
    path = write_notebook(tmp_path, "00_zero", "1 + 1")
    notebook = nbformat.read(path, as_version=4)
    cell = notebook.cells[-1]
    cell.execution_count = 2
    cell.outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=2)]
    cell.metadata = {
        "papermill": {"duration": 1.0},
        "execution": {"iopub": "now"},
        "tags": ["kept"],
    }
    notebook.metadata |= {"widgets": {"state": {}}, "papermill": {"input_path": "here"}}
    nbformat.write(notebook, path)
    assert not strip([path], verify=True)
    strip([path])
    assert strip([path], verify=True)
    stripped = nbformat.read(path, as_version=4)
    assert not {"widgets", "papermill"} & set(stripped.metadata)
    after = stripped.cells[-1]
    assert after.metadata == {"tags": ["kept"]}
    assert (after.outputs, after.execution_count, after.id) == (cell.outputs, 2, cell.id)
