import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.errors import InputError
from notebooks import run
from notebooks.run import (
    NotebookError,
    _setting,
    execute,
    find_notebooks,
    hidden_errors,
    main,
    refresh,
    run_course,
    strip,
)
from notebooks.score import Score
from notebooks.times import promised_duration, promises, read_times, rounded

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
def test_course_runs_what_is_read_first_and_merges_the_results(tmp_path, capsys):
    """One thread each; 01 reads the results of 02, so it waits for them."""
    folder = tmp_path / "notebooks"
    threads = "import os\nnumber = int(os.environ['OMP_NUM_THREADS'])"
    write_notebook(folder, "02_two", threads, SAVE.format(name="02_two"))
    reads = 'folder_of = lambda name: json.loads((pathlib.Path(output_dir) / name / "results.json")'
    source = f'import json, pathlib\n{reads}.read_text())\nnumber += folder_of("02_two")["number"]'
    write_notebook(folder, "01_one", source, SAVE.format(name="01_one"))
    summary = run_course(tmp_path / "out", {"number": 3}, folder=folder)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: part["results"] for name, part in summary["notebooks"].items()} == {
        "01_one": {"number": 4},
        "02_two": {"number": 1},
    }
    assert (tmp_path / "out" / "01_one.ipynb").is_file()
    *lines, last = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert last == ["card:", str(tmp_path / "out" / "card.html")]
    assert [line[0] for line in lines] == ["02_two", "02_two", "01_one", "01_one"]
    assert [line[1] for line in lines[::2]] == ["started", "started"]
    assert [line[3:] for line in lines[1::2]] == [
        ["done", "(1", "of", "2)"],
        ["done", "(2", "of", "2)"],
    ]


@pytest.mark.notebook
def test_failing_cell_is_named_and_stops_only_what_reads_it(tmp_path, capsys):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder, "00_zero", "number = 2", "1 / 0")
    write_notebook(folder, "01_one", 'print(folder_of("00_zero"))')
    write_notebook(folder, "02_two", SAVE.format(name="02_two"))
    (out / "00_zero").mkdir(parents=True)
    (out / "00_zero" / "results.json").write_text("{}")
    (out / "summary.json").write_text("{}")
    (out / "card.html").write_text("old")
    with pytest.raises(NotebookError) as failure:
        run_course(out, folder=folder, jobs=1)
    text = str(failure.value)
    assert "2 of 3 notebooks failed" in text
    assert "00_zero: failed in cell 4, In [4]: ZeroDivisionError: division by zero" in text
    assert "01_one: not run, it reads 00_zero" in text
    assert (out / "02_two" / "results.json").is_file()
    assert not (out / "00_zero" / "results.json").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["notebooks"].keys() == {"02_two"}
    assert summary["failures"].keys() == {"00_zero", "01_one"}
    page = (out / "card.html").read_text(encoding="utf-8")
    assert "1 of 3 lessons done" in page
    assert "ZeroDivisionError: division by zero" in page


@pytest.mark.notebook
def test_notebook_without_results_is_an_error(tmp_path):
    write_notebook(tmp_path, "00_zero", "pass")
    with pytest.raises(NotebookError, match="without writing"):
        run_course(tmp_path / "out", folder=tmp_path)


@pytest.mark.notebook
def test_interrupt_stops_every_kernel(tmp_path):
    """A signal to the runner alone, as `kill -INT` sends it."""
    command = (
        "import os, pathlib, time; _ = (pathlib.Path({!r}) / {!r}).write_text(str(os.getpid()))"
    )
    for name in ("00_zero", "01_one"):
        write_notebook(
            tmp_path / "in", name, command.format(str(tmp_path), name), "time.sleep(600)"
        )
    code = (
        "import pathlib, signal, sys; from notebooks import run; "
        # A shell starts what it sends to the background with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"run.NOTEBOOKS = pathlib.Path({str(tmp_path / 'in')!r}); "
        "run.run_course.__kwdefaults__['folder'] = run.NOTEBOOKS; "
        f"sys.exit(run.main(['run', '--output', {str(tmp_path / 'out')!r}, '--jobs', '2']))"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    files = [tmp_path / "00_zero", tmp_path / "01_one"]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files), seconds=240)
    runner.send_signal(signal.SIGINT)
    assert "stopped" in runner.communicate(timeout=120)[1]
    assert runner.returncode == 130
    kernels = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(map(psutil.pid_exists, kernels)), seconds=60)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def test_settings_are_read_as_the_configs_are(tmp_path):
    """YAML 1.2: `no` is a word and 5e-5 a number."""
    assert _setting("a=no") == ("a", "no")
    assert _setting("a=5e-5") == ("a", 5e-5)
    assert _setting('a={"0": crack}') == ("a", {"0": "crack"})


def test_setting_that_cannot_be_read_is_one_line(capsys):
    assert main(["run", "--set", "a=[1"]) == 2
    assert "--set a" in capsys.readouterr().err


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


PAGE = "`make course` runs independent lessons side by side.\nIt took; in seconds: 00 1.\n"
START = "| [00](notebooks/00_zero.ipynb) | what? | 1 | 1 |\n| [01](notebooks/01_one.ipynb) | ? | 1 | 1 |\n"


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """Return a folder of two lessons and pages, and let `refresh` store them without a kernel."""
    folder = tmp_path / "notebooks"
    for name, reading in (("00_zero", "15 minutes of reading, ages"), ("01_one", "20 min to read")):
        notebook = nbformat.read(write_notebook(folder, name, "1"), as_version=4)
        notebook.cells[0].source = f"# {name}\n\n**Time:** {reading}. More\nwith your data.\n\nEnd"
        nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "README.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(START)

    def copy_all(paths, output_dir, parameters=None, *, jobs=None):
        for path in paths:
            shutil.copy(path, output_dir)
        return {"01_one": 241.7, "00_zero": 28.2}, {}

    monkeypatch.setattr(run, "run_side_by_side", copy_all)
    monkeypatch.setattr(run.joblib, "cpu_count", lambda: 4)
    return folder


def test_refresh_promises_what_it_measured(lessons):
    refresh(lessons)
    times = read_times(lessons)
    assert times["seconds"] == {"00_zero": 30, "01_one": 240}
    assert times["jobs"] == 2
    first = [nbformat.read(path, as_version=4).cells[0].source for path in find_notebooks(lessons)]
    assert first[0].splitlines()[2] == (
        "**Time:** 15 minutes of reading, about half a minute of computing on one CPU core. More"
    )
    assert "20 minutes of reading, about 4 minutes of computing on one CPU core. More\n" in first[1]
    assert "in seconds: 00 30, 01 240." in (lessons / "README.md").read_text()
    rows = (lessons.parent / "README.md").read_text().splitlines()
    assert [row.split(" | ", 2)[2] for row in rows] == ["15 | 1 |", "20 | 4 |"]
    assert all(path.read_text(encoding="utf-8") == text for path, text in promises(lessons).items())
    assert strip(find_notebooks(lessons), verify=True)


def test_refresh_of_the_solutions_promises_nothing(lessons):
    refresh(lessons, timed=False)
    assert not (lessons / "times.json").exists()
    assert (lessons / "README.md").read_text() == PAGE


def test_a_lesson_without_a_promise_or_a_time_is_named_and_nothing_is_written(lessons):
    refresh(lessons)
    before = (lessons / "README.md").read_text()
    path = lessons / "01_one.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("**Time:**", "**Duration:**"))
    with pytest.raises(InputError, match="01_one.*0 sentences promise a time"):
        run.write_promises(lessons)
    path.unlink()
    with pytest.raises(InputError, match="times.json: other lessons: 01_one"):
        run.write_promises(lessons)
    assert (lessons / "README.md").read_text() == before


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"seconds": {"00_zero": -1}, "seconds_in_all": 1, "jobs": 1}']
)
def test_damaged_times_are_refused(tmp_path, content):
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(InputError, match=r"times.json: .*make notebooks"):
        read_times(tmp_path)


def test_times_are_rounded_and_promised_upwards():
    assert [rounded(seconds) for seconds in (0.4, 28.2, 57.6, 63, 241.7)] == [5, 30, 60, 60, 240]
    spoken = [promised_duration(seconds) for seconds in (30, 35, 60, 70, 240, 250)]
    expected = ["half a minute", "a minute", "a minute", "2 minutes", "4 minutes", "5 minutes"]
    assert spoken == expected


NAMES = [path.stem for path in find_notebooks()]


def write_summary(folder, failures=None):
    failures = failures or {}
    done = {name: {"seconds": 60.0, "results": {}} for name in NAMES if name not in failures}
    summary = {"versions": "torch 1 <2>", "seconds": 60.0 * len(done), "notebooks": done}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary | {"failures": failures}))
    for path in find_notebooks():
        shutil.copy(path, folder)


def card_of(folder, capsys):
    """Write the card by the command and return its text without tags."""
    assert main(["card", "--output", str(folder)]) == 0
    assert capsys.readouterr().out == f"card: {folder / 'card.html'}\n"
    page = (folder / "card.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|url\(|src=", page), "a card loads nothing"
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", page.split("</style>")[1]).split()))


def test_card_of_a_finished_course(tmp_path, capsys):
    write_summary(tmp_path)
    text = card_of(tmp_path, capsys)
    assert "11 of 11 lessons done in 11 minutes of computing" in text
    lessons = re.findall(r"(\w+) done 60\.0 (\d+) (\d+)", text)
    assert [name for name, _, _ in lessons] == NAMES
    assert {questions for _, _, questions in lessons} == {"3"}
    predictions = [int(number) for _, number, _ in lessons]
    assert all(predictions[1:-1]), "every lesson from 01 to 09 asks for one"
    assert f"{sum(predictions)} predictions and 33 answers" in text
    assert "0 patients treated" in text
    assert "How to go on: `make lab`, and the patient of notebooks/exercises/01_exercise" in text
    assert "torch 1 <2>" in text


def test_card_of_a_course_in_which_a_lesson_failed(tmp_path, capsys):
    failures = {"04_train": "failed in cell 7: ValueError: 1 < 2", "05_inference": "not run"}
    write_summary(tmp_path, failures)
    (tmp_path / "04_train.ipynb").unlink()
    text = card_of(tmp_path, capsys)
    assert "9 of 11 lessons done" in text
    assert "minutes of computing" not in text
    assert "04_train failed in cell 7: ValueError: 1 < 2 0 0" in text
    assert "How to go on: open 04_train.ipynb beside this page" in text


def test_card_shows_the_score_of_the_clinic_and_leads_on(tmp_path, capsys):
    write_summary(tmp_path)
    score = Score(tmp_path / "clinic")
    score.note("01/1", treatment="no_objects", outcome="cured")
    text = card_of(tmp_path, capsys)
    assert "1 patient treated, 1 cured at the first attempt" in text
    assert "01 1 1 cured" in text
    assert "exercises/02_exercise" in text
    for number in range(2, 8):
        score.note(f"0{number}/0", treatment="no_objects")
    assert "How to go on: your own run" in card_of(tmp_path, capsys)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"versions": "", "seconds": 1, "notebooks": {"a": 1}, "failures": {}}',
    ],
)
def test_a_damaged_summary_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert main(["card", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "summary.json: " in error
    assert "make course" in error
    assert not (tmp_path / "card.html").exists()


def test_a_damaged_score_is_one_line_of_the_card_too(tmp_path, capsys):
    write_summary(tmp_path)
    (tmp_path / "clinic").mkdir()
    (tmp_path / "clinic" / "score.json").write_text("[1]")
    assert main(["card", "--output", str(tmp_path)]) == 2
    assert "score.json: is a JSON without keys" in capsys.readouterr().err
