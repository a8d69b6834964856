"""Lessons in a real JupyterLab, driven by a real browser: `make browser`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import numpy as np
import pytest
from started_runs import copy_walls
from test_browser import MOVE_AND_WAIT, SEEN, keep_screenshot

from helpers.config import load_config, parse_yaml
from helpers.data import read_split
from helpers.detect import predict_split, threshold_sweep
from helpers.files import CONFIGS, DATA, write_json
from helpers.train import load_run, train
from notebooks.run import NOTEBOOKS, find_notebooks, parameter_names

pytestmark = pytest.mark.browser
LESSONS = find_notebooks()
SHORT = ("02_reproduce_zero_detections", "04_train")
"""Lessons that train: here one or two epochs on some pictures."""
RUN = ("00_start_here", "01_data_checks", *SHORT, "05_inference", "A1_how_the_base_was_made")
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
OPEN = """async (path) => {
  const app = window.jupyterapp;
  await app.restored;
  const widget = await app.commands.execute("docmanager:open", { path });
  await widget.context.ready;
  await widget.sessionContext.ready;
  await widget.sessionContext.session?.kernel?.info;
}"""
RUN_ALL = """async () => { await window.jupyterapp.commands.execute("notebook:run-all-cells"); }"""
CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"
ASK = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code });
  let text = "";
  future.onIOPub = (one) => { if (one.header.msg_type === "stream") text += one.content.text; };
  await future.done;
  return text;
}"""
RUN_CELL = """async (index) => {
  window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
  await window.jupyterapp.commands.execute("notebook:run-cell");
}"""
RESTART = """async () => {
  await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart();
}"""


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Return a folder with copies of the lessons that write into it, and a run of lesson 04."""
    root = tmp_path_factory.mktemp("lab")
    runs, short = root / "runs", root / "short.yaml"
    profile = parse_yaml((CONFIGS / "profiles" / "tiny.yaml").read_text(), where="")
    profile["scale"] |= {"num_epochs": 0.04, "warmup_steps": 0.01}
    write_json(short, profile)
    walls = copy_walls(root / "walls", (("train", 24), ("valid", 6), ("test", 6)))
    settings = {"profile": short, "data_dir": walls, "output_dir": root / "short_runs"}
    for path in LESSONS:
        notebook = nbformat.read(path, as_version=4)
        (cell,) = [one for one in notebook.cells if "parameters" in one.metadata.get("tags", [])]
        if "output_dir" in parameter_names(path):
            cell.source += f"\noutput_dir = {str(runs)!r}"
        if path.stem in SHORT:
            cell.source += "".join(f"\n{name} = {str(own)!r}" for name, own in settings.items())
        nbformat.write(notebook, root / path.name)
    for name in ("figures", "glossary.md", "cheat_sheet.md", "by_hand.md", "the_document.md"):
        source = NOTEBOOKS / name
        if source.is_dir():
            shutil.copytree(source, root / name)
        elif source.is_file():
            shutil.copy(source, root / name)
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile=str(short))
    folder = runs / "04_train"
    train(config, output_dir=folder / "adapter", progress=False)
    write_json(folder / "results.json", {})
    return root


@pytest.fixture(scope="module")
def address(course):
    """Start a JupyterLab on the copies and return its address."""
    with lab_at(course) as address:
        yield address


@contextmanager
def lab_at(course):
    """Start a JupyterLab on a folder and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = course / "settings"
    for name, content in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    options += [f"--ServerApp.root_dir={course}", "--LabApp.expose_app_in_browser=True"]
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(settings)}
    with (course / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyter", "lab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


SMALL = [
    "from helpers.data import read_split\n"
    "from helpers.train import load_run\n"
    "from notebooks.prompt_bench import PromptBench\n"
    "run = load_run({run!r})\n"
    "split = read_split({data!r}, 'test')\n"
    "bench = PromptBench(run.model, run.processor, split, asked=run.prompts)\n"
    "panel = bench.panel('crack')\n"
    "panel.widget",
    "from helpers.checks import check_dataset\n"
    "from helpers.data import load_dataset\n"
    "from helpers.show import describe\n"
    "from notebooks.gallery import exhibits_figure, finding_exhibits\n"
    "report = check_dataset(load_dataset(run.config, {data!r}))\n"
    "exhibits = finding_exhibits(report)\n"
    "describe(exhibits_figure(exhibits), f'{{len(exhibits)}} places with a finding.')",
]
"""Cells with the panels that ask a model, on the run that all tests share."""


@pytest.fixture(scope="module")
def small_lab(tmp_path_factory, run_folder, data_dir):
    """Start a JupyterLab on a notebook of two cells, ``small.ipynb``, and return its address."""
    root = tmp_path_factory.mktemp("small_lab")
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    places = {"run": str(run_folder), "data": str(data_dir)}
    notebook.cells = [nbformat.v4.new_code_cell(cell.format(**places)) for cell in SMALL]
    nbformat.write(notebook, root / "small.ipynb")
    with lab_at(root) as address:
        yield address


def wait_for(url, server, seconds=60):
    for _ in range(4 * seconds):
        assert server.poll() is None, "JupyterLab did not start"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(url)


@pytest.fixture
def opened(browser, address, request):
    """Return a function that opens a lesson in JupyterLab; a screenshot is kept at the end."""
    context = browser.new_context(viewport={"width": 1250, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(120_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))

    def open_lesson(name):
        page.goto(f"{address}/lab/workspaces/auto-{name}/tree/{name}.ipynb?reset")
        page.wait_for_function("window.jupyterapp !== undefined")
        page.evaluate(OPEN, f"{name}.ipynb")
        return page

    yield open_lesson
    page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    keep_screenshot(page, request)
    context.close()
    assert not problems


def errors_of(page):
    """List the errors that cells show."""
    outputs = [one for cell in page.evaluate(CELLS) for one in cell.get("outputs", [])]
    return [f"{one['ename']}: {one['evalue']}" for one in outputs if one["output_type"] == "error"]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_opens_with_its_outputs_and_pictures(opened, path):
    page = opened(path.stem)
    assert page.locator(".jp-Notebook .jp-Cell").count() == len(page.evaluate(CELLS))
    assert not errors_of(page)
    page.wait_for_timeout(500)
    broken = "[...document.images].filter((one) => one.complete && !one.naturalWidth).map((one) => one.src)"
    assert page.evaluate(broken) == []
    assert page.locator("text=VBox(children").count() == 0


@pytest.mark.parametrize("name", RUN)
def test_a_lesson_runs_cell_by_cell_without_an_error(opened, name):
    page = opened(name)
    page.evaluate(RUN_ALL)
    assert errors_of(page) == []
    cells = [cell for cell in page.evaluate(CELLS) if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells if cell["source"].strip())
    panels = page.locator(".explorer, .jp-OutputArea .widget-vbox")
    assert panels.count() >= 1
    panels.last.scroll_into_view_if_needed()
    if name == "04_train":  # the curves of the training, which came while it ran
        assert panels.last.locator("img").evaluate("(one) => one.naturalWidth") > 200


def test_the_explorer_and_its_kernel_agree(opened, course):
    page = opened("05_inference")
    page.evaluate(RUN_ALL)
    assert errors_of(page) == []
    explorer = page.locator(".explorer").first
    explorer.scroll_into_view_if_needed()
    seen = []
    run = load_run(course / "runs" / "04_train" / "adapter")
    split = read_split(DATA / "wall_cracks", "test")
    absent = run.config.evaluation.absent_prompts
    queries = predict_split(run.model, run.processor, split, absent_prompts=absent)
    for threshold in (0.05, 0.2, 0.5, 0.7, 0.99):
        seen.append(page.evaluate(MOVE_AND_WAIT, str(threshold)))
        row = threshold_sweep(queries, [threshold]).iloc[0]
        assert (
            f": {int(row['count'])} detections"
            in explorer.locator(".numbers p").first.text_content()
        )
        assert float(page.evaluate(ASK, "print(panel.score_threshold)")) == threshold
    print(
        f"from the keyboard to the picture: {np.median(seen):.0f} ms at the median, {max(seen):.0f} at most"
    )
    assert np.median(seen) < SEEN
    slider = explorer.locator("input.score")
    slider.scroll_into_view_if_needed()
    place = slider.bounding_box()
    middle = place["y"] + place["height"] / 2
    page.mouse.move(place["x"] + 0.9 * place["width"], middle)
    page.mouse.down()
    page.mouse.move(place["x"] + 0.6 * place["width"], middle, steps=10)
    page.mouse.up()
    dragged = float(page.evaluate(ASK, "print(panel.score_threshold)"))
    assert 0.05 < dragged < 0.08  # 0.6 of the way from 0.001 to 1, by its logarithm
    assert explorer.locator(".score-value").input_value() == f"{dragged:.3g}"
    count = int(threshold_sweep(queries, [dragged]).iloc[0]["count"])
    assert f": {count} detections" in explorer.locator(".numbers p").first.text_content()
    page.evaluate(ASK, "panel.score_threshold = 0.4")
    page.wait_for_function("document.querySelector('.explorer .score-value').value === '0.4'")
    refused = page.evaluate(
        ASK, "try:\n    panel.score_threshold = 7\nexcept Exception as error:\n    print(error)"
    )
    assert "score_threshold is 7" in refused


def test_a_panel_cell_twice_and_a_restart_leave_no_error(opened):
    page = opened("00_start_here")
    page.evaluate(RUN_ALL)
    sources = [cell["source"] for cell in page.evaluate(CELLS)]
    [index] = [n for n, source in enumerate(sources) if "threshold_panel(" in source]
    for _ in range(2):
        page.evaluate(RUN_CELL, index)
        cell = page.locator(".jp-Notebook .jp-Cell").nth(index)
        cell.locator(".explorer .numbers p").wait_for()
        assert (cell.locator(".explorer").count(), errors_of(page)) == (1, [])
    page.evaluate(RESTART)
    page.evaluate(RUN_ALL)
    assert errors_of(page) == []
    assert page.locator(".explorer").count() >= 1


def test_a_narrow_window_cuts_nothing_off(opened):
    page = opened("00_start_here")
    page.set_viewport_size({"width": 700, "height": 900})
    page.evaluate(RUN_ALL)
    explorer = page.locator(".explorer").first
    explorer.scroll_into_view_if_needed()
    wider = "(one) => one.scrollWidth > one.clientWidth + 1"
    assert not explorer.evaluate(wider)


def test_a_typed_word_is_asked_and_a_bad_one_gets_a_message(browser, small_lab, request):
    context = browser.new_context(viewport={"width": 1250, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(120_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{small_lab}/lab/workspaces/auto-small/tree/small.ipynb?reset")
    page.wait_for_function("window.jupyterapp !== undefined")
    page.evaluate(OPEN, "small.ipynb")
    page.evaluate(RUN_ALL)
    assert errors_of(page) == []
    field = page.get_by_placeholder("a noun, then Enter")
    assert page.locator('img[alt^="test_0.png, asked for crack: "]').count() == 1
    field.fill("moss")
    field.press("Enter")
    page.wait_for_selector('img[alt^="test_0.png, asked for moss: "]')
    assert page.get_by_text("only where it is absent").count() == 1
    field.fill("")
    field.press("Enter")
    alert = page.wait_for_selector('[role="alert"]')
    assert "empty" in alert.text_content()
    assert page.locator('img[alt*="asked for"]').count() == 0
    field.fill("<b>dog</b>")
    field.press("Enter")
    page.wait_for_selector('img[alt*="asked for <b>dog</b>"]')
    assert page.locator(".widget-vbox td b, .widget-vbox p b").count() == 0
    page.locator(".widget-hslider .noUi-handle").press("ArrowRight")
    page.wait_for_selector('img[alt^="test_1.png, asked for <b>dog</b>"]')
    pictures = "[...document.querySelectorAll('.jp-OutputArea img')].map((one) => one.naturalWidth)"
    assert min(page.evaluate(pictures)) > 200
    assert errors_of(page) == []
    keep_screenshot(page, request)
    context.close()
    assert not problems
