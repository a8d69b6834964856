"""The course as a site, and the ways in: what holds without Sphinx, and the built pages in a browser."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from packaging.utils import canonicalize_name
from test_project import declared, documents, imports_of, make_targets, read

from helpers.config import parse_yaml
from helpers.files import ROOT
from notebooks.run import NOTEBOOKS, find_notebooks
from notebooks.solutions.make_exercises import EXERCISES, SOLUTIONS

SITE = NOTEBOOKS / "site"
LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


@cache
def settings():
    return runpy.run_path(str(SITE / "conf.py"))


def pages():
    return ["README.md", *(page for part in settings()["CONTENTS"].values() for page in part)]


def prose(page):
    """Return the text of a page; of a notebook, its cells that are no code."""
    path = ROOT / page
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_every_notebook_is_in_the_contents_once_and_in_order():
    parts = settings()["CONTENTS"]
    for caption, folder in (
        ("Lessons", NOTEBOOKS), ("Exercises", EXERCISES), ("Solutions", SOLUTIONS)
    ):  # fmt: skip
        assert [ROOT / page for page in parts[caption]] == find_notebooks(folder), caption
    listed = re.findall(r"^\| \[.*\]\((notebooks/\w+\.ipynb)\)", read("README.md"), flags=re.M)
    assert parts["Lessons"] == listed
    assert len(pages()) == len(set(pages()))
    directives = settings()["table_of_contents"]()
    assert [directives.count(f"/{page}") for page in pages()[1:]] == [1] * len(pages()[1:])


def test_every_page_exists_and_what_a_page_links_to_is_a_page():
    assert {"notebooks/cheat_sheet.md", "helpers/cli/README.md"} < set(pages())
    seen = 0
    for page in pages():
        for target in LINK.findall(prose(page)):
            if re.match(r"https?://", target):
                continue
            path = ((ROOT / page).parent / target).resolve()
            assert path.exists(), f"{page}: {target}"
            if path.suffix in (".md", ".ipynb"):
                assert path.relative_to(ROOT).as_posix() in pages(), f"{page}: {target}"
                seen += 1
    assert seen > 100


def test_a_link_to_a_folder_leads_to_the_page_above_it():
    link = re.compile(r"\]\(([\w./-]+)\)")

    def changed(text):
        return link.sub(
            lambda one: settings()["link_to_page"](one, ROOT / "data/experiments"), text
        )

    assert changed("[a](../known_things)") == "[a](../README.md)"
    assert changed("[a](..)") == "[a](../README.md)"
    assert changed("[a](README.md) [b](https://example.org)") == (
        "[a](README.md) [b](https://example.org)"
    )


def test_nothing_is_executed_and_no_script_comes_from_elsewhere():
    assert settings()["nb_execution_mode"] == "off"
    assert settings()["nb_ipywidgets_js"] == {}
    assert settings()["html_math_renderer"] == "mathml"
    assert "http" not in (SITE / "static" / "course.css").read_text(encoding="utf-8")


def test_a_note_stands_for_every_panel_and_every_picture_keeps_its_text():
    site, panels, texts = settings(), 0, set()
    for path in find_notebooks(NOTEBOOKS):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                panels += site["WIDGET"] in output.get("data", {})
                stored = output.get("metadata", {}).values()
                texts |= {one["alt"] for one in stored if "alt" in one}
        notes = str(site["without_panels"](notebook))
        assert site["WIDGET"] not in notes
        panels -= notes.count(repr(site["NOTE"]))
    assert panels == 0
    assert len(texts) > 30
    assert texts == set(site["alternative_texts"].values())


def test_the_target_pins_major_versions_and_keeps_to_the_lock():
    recipe = read("Makefile").split("\nsite: ")[1].split("\n\n")[0]
    assert "--constraint requirements.lock" in recipe
    assert "-W --keep-going" in recipe
    for name in ("sphinx", "myst-nb", "furo"):
        assert re.search(rf"'{name}>=[\d.]+,<\d+'", recipe), name


def test_the_workflow_builds_the_site_beside_the_tests():
    jobs = parse_yaml(read(".github/workflows/ci.yml"), where="")["jobs"]
    steps = jobs["site"]["steps"]
    assert "needs" not in jobs["site"]
    assert "make site" in [step.get("run") for step in steps]
    [upload] = [step for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    assert upload["with"]["path"] == "runs/site/html"
    [python] = [step for step in steps if "setup-python" in step.get("uses", "")]
    assert python == jobs["test"]["steps"][1]


def test_the_workflow_keeps_the_screenshots_of_the_browser_tests():
    steps = parse_yaml(read(".github/workflows/ci.yml"), where="")["jobs"]["browser"]["steps"]
    assert steps[-2]["run"] == "make browser"
    assert (steps[-1]["if"], steps[-1]["with"]["path"]) == ("always()", "runs/browser/")


def test_the_citation_names_what_the_project_names():
    citation = parse_yaml(read("CITATION.cff"), where="")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["title"].startswith(read("README.md").splitlines()[0].removeprefix("# "))
    assert f'version = "{citation["version"]}"' in read("pyproject.toml")
    assert f'license = "{citation["license"]}"' in read("pyproject.toml")
    assert not {"doi", "url", "repository-code", "identifiers"} & citation.keys()


def test_the_dev_container_calls_the_commands_of_the_readme():
    container = parse_yaml(read(".devcontainer/devcontainer.json"), where="")
    called = re.findall(r"make ([a-z]+)", str(container))
    assert {"setup", "lab"} <= set(called) <= make_targets()
    assert container["image"].endswith(":3.11")
    assert ".venv/bin:" in container["remoteEnv"]["PATH"]


# What Google Colab brings, by the names of distributions. Only these may be taken as given.
COLAB = {
    "numpy", "torch", "torchvision", "matplotlib", "pandas", "scipy", "pillow", "ipywidgets",
    "ipython", "ipykernel", "opencv-python-headless", "tqdm", "psutil", "packaging", "jinja2",
}  # fmt: skip


def colab_cell():
    section = read("notebooks/README.md").split("## In the browser")[1].split("\n## ")[0]
    [block] = re.findall(r"```ipython3\n(.*?)```", section, flags=re.S)
    return section, block


def test_the_cell_for_colab_installs_what_the_lessons_import_and_keeps_torch():
    section, block = colab_cell()
    assert len(section.strip().splitlines()) <= 10  # 12 with its heading
    [line] = [line for line in block.splitlines() if line.startswith("%pip install")]
    words = shlex.split(line.replace("{kept}", "KEPT"))
    # The project itself, so that the ranges are those of pyproject.toml, with its tools, because
    # the second cell of a lesson asks for everything that is declared.
    assert words[words.index("-e") + 1] == ".[dev]"
    assert words[-1] == "KEPT"
    kept = set(re.search(r'in "([\w ]+)"\.split', block)[1].split())
    assert {"torch", "torchvision", "numpy"} <= kept <= COLAB
    assert kept <= declared().keys()
    installed = declared("dev").keys() | COLAB
    providers = {"PIL": "pillow", "ruamel": "ruamel.yaml", "cv2": "opencv-python-headless"}
    own = {"helpers", "data", "notebooks"} | sys.stdlib_module_names
    for path in [*find_notebooks(NOTEBOOKS), *(ROOT / "helpers").rglob("*.py")]:
        for module in set(imports_of(path)) - own:
            assert canonicalize_name(providers.get(module, module)) in {
                canonicalize_name(name) for name in installed
            }, f"{path.name}: {module}"


def test_the_cell_for_colab_installs_from_the_clone_and_a_restart_follows():
    section, block = colab_cell()
    lines = block.splitlines()
    assert lines[0].startswith("!git clone")
    assert lines[1] == f"%cd {shlex.split(lines[0])[-1]}"
    assert lines[-1].startswith("%pip install")
    # IPython 7 of a running session cannot show the pictures of the lessons, see
    # `helpers.show.describe`; and an editable install needs a new kernel to be seen.
    assert "restart the session" in " ".join(section.split())


def test_no_document_points_to_an_address_that_nobody_knows():
    for path in documents():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"colab\.research|mybinder\.org/v2|codespaces\.new", text), path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if find_spec("sphinx") is None or find_spec("myst_nb") is None:
        pytest.skip("Sphinx is not installed: run `make site` first")
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", SITE, "-d", folder / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, ROOT, folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield folder / "html"
    shutil.rmtree(folder)


@pytest.mark.browser
def test_the_site_opens_from_a_file_and_every_link_resolves(site, browser):
    context = browser.new_context(offline=True, viewport={"width": 420, "height": 1000})
    page, problems, places, links = context.new_page(), [], {}, {}
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
    page.on("requestfailed", lambda one: problems.append(one.url))
    page.on("request", lambda one: problems.append(one.url) if one.url[:4] == "http" else None)
    for name in ["index", *(str(Path(page).with_suffix("")) for page in pages()), "search"]:
        path = site / f"{name}.html"
        page.goto(path.as_uri())
        places[path] = set(page.evaluate("[...document.querySelectorAll('[id]')].map((x) => x.id)"))
        links[path] = set(page.evaluate("[...document.links].map((x) => x.href)"))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
        assert page.evaluate(
            "[...document.images].every((x) => x.loading === 'lazy' || x.naturalWidth > 0)"
        ), name
    page.goto((site / "search.html").as_uri() + "?q=softplus")
    page.wait_for_selector("#search-results li a[href*='02_reproduce']")
    context.close()
    assert not problems
    own = 0
    for path, targets in links.items():
        for target in map(urlsplit, targets):
            if target.scheme != "file":
                assert target.scheme == "https", target
                continue
            aim = Path(unquote(target.path))
            assert aim.is_file(), f"{path.name}: {aim}"
            if target.fragment and aim in places:
                assert unquote(target.fragment) in places[aim], f"{path.name}: {target.fragment}"
            own += 1
    assert own > 1000
    lesson = (site / "notebooks" / "02_reproduce_zero_detections.html").read_text(encoding="utf-8")
    assert "<math" in lesson
    assert "panel to move" in lesson
    assert not [path for path in links if "widget-view" in path.read_text(encoding="utf-8")]
