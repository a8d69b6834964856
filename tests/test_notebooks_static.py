"""What can be said of the committed notebooks without running them."""

import ast
import re
from functools import cache

import nbformat
import pytest
from test_story import ANSWERS

from notebooks.run import NOTEBOOKS, find_notebooks, parameter_names, strip
from notebooks.solutions.make_exercises import EXERCISES, SOLUTIONS
from notebooks.times import PROMISE, promises, read_times

LESSONS = find_notebooks(NOTEBOOKS)
SOLVED, OPEN = find_notebooks(SOLUTIONS), find_notebooks(EXERCISES)
REQUIRED_PARAMETERS = {"profile", "data_dir", "seed", "output_dir", "fast_run"}
MAX_CODE_LINES = 20
MAX_BYTES = 500_000
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|mnt|opt)/\w|\b[A-Z]:\\\\?\w")
MARKDOWN_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
HTML_IMAGE = re.compile(r"<img\b[^>]*>")
WIDGET = "application/vnd.jupyter.widget-view+json"


def each(*paths):
    """Parametrise a test by notebooks."""
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: f"{path.parent.name}/{path.stem}"
    )


each_notebook, each_lesson = each(*LESSONS, *SOLVED, *OPEN), each(*LESSONS)
each_executed, each_exercise = each(*LESSONS, *SOLVED), each(*SOLVED, *OPEN)


@cache
def read(path):
    return nbformat.read(path, as_version=4)


def cells_of(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def tags_of(cell):
    return set(cell.metadata.get("tags", []))


def outputs_of(path):
    return [output for cell in cells_of(path, "code") for output in cell.outputs]


def headings_of(path):
    """Return (level, text) of all headings, leaving fenced code out."""
    prose = "\n".join(
        re.sub(r"```.*?```", "", cell.source, flags=re.S) for cell in cells_of(path, "markdown")
    )
    return [
        (len(marks), text.strip())
        for marks, text in re.findall(r"^(#+)\s+(.+)$", prose, flags=re.M)
    ]


def parameters_cell(path):
    tagged = [cell for cell in cells_of(path, "code") if "parameters" in tags_of(cell)]
    assert len(tagged) == 1, f"{len(tagged)} cells are tagged 'parameters'"
    return tagged[0]


def text_outputs(path):
    for output in outputs_of(path):
        yield output.get("text", "")
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield data


@each_notebook
def test_is_a_valid_python_notebook(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python"


@each_notebook
def test_is_small(path):
    assert path.stat().st_size < MAX_BYTES


@each_executed
def test_was_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in cells_of(path, "code") if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


@each_executed
def test_holds_no_error_that_is_not_meant(path):
    for cell in cells_of(path, "code"):
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        assert not errors or "raises-exception" in tags_of(cell), errors


@each_executed
def test_holds_no_noise_of_libraries(path):
    noise = [output.text for output in outputs_of(path) if output.get("name") == "stderr"]
    assert not noise, noise


@each_executed
def test_holds_no_state_of_widgets(path):
    assert "widgets" not in read(path).metadata, "GitHub may refuse to show it"


def test_all_are_in_the_stored_form():
    assert strip([*LESSONS, *SOLVED], verify=True), "run `make notebooks`"


@each_lesson
def test_first_cell_says_what_why_and_how_long(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    number = path.stem.split("_")[0]
    assert re.match(rf"# {number} · \S", first.source)
    for part in ("**You will**", "**You need**", "**Time"):
        assert part in first.source, part
    assert any(target.endswith(".ipynb") for _, _, target in MARKDOWN_LINK.findall(first.source))


def test_promised_minutes_are_the_measured_ones():
    assert read_times()["seconds"].keys() == {path.stem for path in LESSONS}
    for path, text in promises().items():
        assert path.read_text(encoding="utf-8") == text, "run `python -m notebooks.run times`"


@each_lesson
def test_a_lesson_promises_minutes_once_and_in_one_form(path):
    [found] = PROMISE.finditer(read(path).cells[0].source)
    assert re.search(r"about (?:(?:half )?a minute|\d+ minutes) of computing", found[0])


@each_exercise
def test_first_cell_of_an_exercise_says_what_and_how_long(path):
    first = read(path).cells[0].source
    assert re.match(rf"# Exercise {path.stem[:2]} · \S", first)
    assert "**You need**" in first
    assert "**Time" in first


@each_lesson
def test_ends_with_recap_exercise_next(path):
    assert [text for level, text in headings_of(path) if level == 2][-3:] == [
        "Recap",
        "Exercise",
        "Next",
    ]


@each_lesson
def test_headings_do_not_skip_a_level(path):
    levels = [level for level, _ in headings_of(path)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@each_notebook
def test_parameters_cell_only_assigns_annotated_literals_with_help(path):
    source = parameters_cell(path).source
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)
    for line in source.splitlines():
        assert not line.strip() or "  # " in line or line.startswith("#"), f"no help: {line}"


@each_notebook
def test_has_the_required_parameters(path):
    assert parameter_names(path) >= REQUIRED_PARAMETERS
    assert "score_threshold" in parameter_names(path) or path.stem != "05_inference"
    assert "case" in parameter_names(path) or path in LESSONS


@each_notebook
def test_cell_after_the_parameters_validates_them_all(path):
    code = cells_of(path, "code")
    following = code[code.index(parameters_cell(path)) + 1]
    calls = [node for node in ast.walk(ast.parse(following.source)) if isinstance(node, ast.Call)]
    start = next(call for call in calls if getattr(call.func, "id", None) == "start")
    assert ast.literal_eval(start.args[0]) == path.stem
    given = {keyword.arg for keyword in start.keywords}
    thresholds = {name for name in parameter_names(path) if name.endswith("_threshold")}
    assert given >= REQUIRED_PARAMETERS | thresholds


@each_notebook
def test_saves_results(path):
    assert any(".save_results(" in cell.source for cell in cells_of(path, "code"))


def is_plumbing(cell):
    """Say if a cell only imports, calls `start` for ``run``, or saves results."""
    for one in ast.parse(cell.source).body:
        names = [node.id for node in getattr(one, "targets", []) if isinstance(node, ast.Name)]
        is_plain = isinstance(one, ast.Import | ast.ImportFrom) or names in (["run"], ["results"])
        if not is_plain and ".save_results(" not in ast.unparse(one):
            return False
    return True


@each_notebook
def test_only_plumbing_is_folded_and_nothing_that_is_asked_about(path):
    cells = read(path).cells
    for above, cell in zip(cells, cells[1:], strict=False):
        is_folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert is_folded == ("hide-input" in tags_of(cell)), "JupyterLab and the site fold together"
        if is_folded:
            assert cell.cell_type == "code"
            assert path in LESSONS, "a reader of an exercise works with every cell"
            assert is_plumbing(cell), cell.source
            assert not tags_of(cell) & {"parameters", "raises-exception"}
            assert "NBVAL_CHECK_OUTPUT" not in cell.source
            assert "Predict before" not in above.source
            assert (path.stem[:2], cell.id) not in {(number, name) for number, name, _ in ANSWERS}
            assert {output.output_type for output in cell.outputs} <= {"stream"}
            assert sum(len(output.text.splitlines()) for output in cell.outputs) <= 1


def test_every_lesson_folds_its_plumbing():
    for path in LESSONS:
        folded = [cell for cell in cells_of(path, "code") if "hide-input" in tags_of(cell)]
        assert folded, path.stem
        starts = [cell for cell in cells_of(path, "code") if cell.id == "start"]
        assert all(is_plumbing(cell) == (cell in folded) for cell in starts), path.stem


@each_lesson
def test_has_numbers_that_nbval_compares(path):
    marked = [cell for cell in cells_of(path, "code") if "# NBVAL_CHECK_OUTPUT" in cell.source]
    assert marked
    assert all(cell.outputs for cell in marked)


@each_notebook
def test_panels_are_not_compared(path):
    for cell in cells_of(path, "code"):
        if re.search(r"(threshold_panel|explorer_panel|LiveLog)\(", cell.source):
            assert "nbval-ignore-output" in tags_of(cell), cell.source
            assert "NBVAL_CHECK_OUTPUT" not in cell.source


@each_notebook
def test_code_cells_are_short_and_plain(path):
    for cell in cells_of(path, "code"):
        lines = cell.source.splitlines()
        assert len(lines) <= MAX_CODE_LINES, cell.source
        assert not any(re.match(r"\s*[!%]", line) for line in lines), "no shell or magic commands"
        assert not cell.source.rstrip().endswith(";"), "assign to _ instead"


@each_notebook
def test_shows_no_path_of_a_machine(path):
    texts = [cell.source for cell in read(path).cells] + list(text_outputs(path))
    assert not [found.group(0) for text in texts for found in MACHINE_PATH.finditer(text)]


@each_notebook
def test_links_and_images_resolve(path):
    for cell in cells_of(path, "markdown"):
        for _, text, target in MARKDOWN_LINK.findall(cell.source):
            if not re.match(r"https?://|mailto:|#|attachment:", target):
                assert (path.parent / target.split("#")[0]).exists(), f"[{text}]({target})"


@each_notebook
def test_images_have_alternative_text(path):
    for cell in cells_of(path, "markdown"):
        assert all(text.strip() for mark, text, _ in MARKDOWN_LINK.findall(cell.source) if mark)
        assert all(re.search(r'alt="[^"]+"', image) for image in HTML_IMAGE.findall(cell.source))


@each_executed
def test_figures_have_alternative_text_and_a_printed_sentence(path):
    for cell in cells_of(path, "code"):
        printed = " ".join("".join(output.get("text", "") for output in cell.outputs).split())
        for output in cell.outputs:
            data = output.get("data", {})
            if WIDGET in data and "image/jpeg" in data:  # the text beside a still
                text = data["text/plain"]
                assert text.startswith("A panel with sliders")
                # Outputs of an older `make notebooks` have no alternative text yet.
                assert output.metadata.get("image/jpeg", {"alt": text})["alt"] == text
                continue
            for kind in [kind for kind in data if kind.startswith("image/")]:
                alt = output.metadata.get(kind, {}).get("alt")
                assert alt, "show figures with helpers.show.pictures.describe"
                assert alt in printed, alt
