"""What helps a reader through the course: drawings, predictions, questions, glossary, links."""

import re
import xml.etree.ElementTree as ElementTree
from functools import cache

import nbformat
import numpy as np
import pytest
from PIL import Image

from data.make_drawings import (
    FIGURES,
    LESSONS,
    PLACE_OF_CAUSE,
    PLACES,
    alternative_text,
    drawings,
    places_table,
    strip_markdown,
)
from data.make_epochs import EPOCHS_GIF, MAX_BYTES, NUM_EPOCHS, THRESHOLD, write_gif
from helpers.causes import STAGES, TABLE
from helpers.errors import InputError
from notebooks.run import NOTEBOOKS, find_notebooks

NUMBERED = {path.stem[:2]: path for path in find_notebooks(NOTEBOOKS)}
PAGES = sorted(NOTEBOOKS.glob("*.md"))
READABLE = [*NOTEBOOKS.rglob("*.ipynb"), *PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
PREDICTION = re.compile(
    r"\*\*Predict before you run\.\*\* (?:(?!\n\n).)+\n\n"
    r"(?P<options>(?:- \*\*[A-D]\*\* [^\n]+\n)+)\n"
    r"<details><summary>Answer</summary>\n\n\*\*(?P<right>[A-D])\.?\*\*(?:(?!<details>).)+?\n\n</details>",
    re.S,
)
QUESTION = re.compile(r"<details><summary>(\d)\. (.+?\?)</summary>\n\n(.+?)\n\n</details>", re.S)

each_lesson = pytest.mark.parametrize("number", NUMBERED)
each_with_strip = pytest.mark.parametrize("number", LESSONS)


@cache
def read(path):
    return nbformat.read(path, as_version=4)


def prose_of(path):
    """Return the text of a page or of the Markdown cells of a notebook, fenced code left out."""
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
    else:
        cells = read(path).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors_of(path):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose_of(path), flags=re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).lower() for text in headings]
    return [re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in plain]


def output_of(number, cell_id):
    """Return what a cell of a lesson printed or showed as text."""
    [cell] = [cell for cell in read(NUMBERED[number]).cells if cell.id == cell_id]
    texts = [output.get("text", "") for output in cell.outputs]
    for output in cell.outputs:
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def test_every_cause_has_exactly_one_place():
    owners = [number for stage in STAGES for number in PLACES if stage in PLACES[number].stages]
    assert len(owners) == len(STAGES), "a stage of the catalogue has no place, or two"
    assert PLACE_OF_CAUSE.keys() == TABLE.keys()
    assert set(PLACE_OF_CAUSE.values()) == set(PLACES)


def test_every_place_has_a_lesson_and_every_lesson_a_place():
    assert set(LESSONS) == {number for number in NUMBERED if "01" <= number <= "09"}
    assert {place for lit in LESSONS.values() for place in lit} == set(PLACES)


def test_drawings_are_those_that_the_script_writes():
    for path, content in drawings().items():
        assert path.read_text(encoding="utf-8") == content, "run `python -m data.make_drawings`"
    assert set(FIGURES.glob("*.svg")) == set(drawings())


def test_drawings_are_complete_and_load_nothing():
    for path, content in drawings().items():
        root = ElementTree.fromstring(content)
        width, height = (float(root.get(side)) for side in ("width", "height"))
        assert width <= 700, path.name
        texts = [node for node in root.iter() if node.tag.endswith("text")]
        assert all(0 < float(node.get("x")) < width for node in texts)
        assert all(0 < float(node.get("y")) < height for node in texts)
        assert all(f"{number}" in content for number in PLACES)
        assert "href" not in content
        assert "url(" not in content
        sizes = re.findall(r"font-size: ([\d.]+)px", content)
        assert min(map(float, sizes)) >= 11, "too small to read"


def test_the_picture_by_epoch_is_small_and_says_what_it_shows():
    assert EPOCHS_GIF.stat().st_size < MAX_BYTES
    with Image.open(EPOCHS_GIF) as picture:
        assert picture.n_frames == NUM_EPOCHS + 1
        sentence = picture.info["comment"].decode()
    assert f"![{sentence}](figures/{EPOCHS_GIF.name})" in prose_of(NOTEBOOKS / "README.md")
    failing, fixed = (
        [float(score) for score in re.findall(r"\d\.\d+", sentence.split(f"{name} run ")[1])]
        for name in ("failing", "fixed")
    )
    failing = failing[: NUM_EPOCHS + 1]
    assert max(failing) < THRESHOLD <= fixed[-1]
    assert len(fixed) == NUM_EPOCHS + 1


@pytest.mark.parametrize("size", [(20, 30), (2000, 2000)])
def test_a_gif_keeps_its_frames_or_is_refused(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 255, (3, *size, 3), dtype=np.uint8)
    drawn, path = [Image.fromarray(one) for one in noise], tmp_path / "a.gif"
    if size[0] > 100:
        with pytest.raises(InputError, match="draw fewer or smaller frames"):
            write_gif(path, drawn, "What it shows.")
        assert not path.exists()
        return
    assert write_gif(path, drawn, "What it shows.") == path.stat().st_size
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.info["loop"]) == (3, 0)
        assert picture.info["comment"] == b"What it shows."


def test_the_page_of_the_notebooks_has_the_table_of_the_places():
    page = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert places_table() in page, "run `python -m data.make_drawings` and copy the table"
    assert "(figures/pipeline.svg)" in page


def test_the_first_lesson_lists_the_places_of_the_drawing():
    prose = prose_of(NUMBERED["00"])
    assert "(figures/pipeline.svg)" in prose
    listed = re.findall(r"^(\d)\. \*\*(\w+): ", prose, flags=re.M)
    assert listed == [(str(number), place.name) for number, place in PLACES.items()]


@each_with_strip
def test_a_lesson_begins_with_its_strip(number):
    first = read(NUMBERED[number]).cells[0].source
    assert first.splitlines()[2] == strip_markdown(number)
    for place in LESSONS[number]:
        assert (
            len(LESSONS[number]) == len(PLACES)
            or PLACES[place].name in (alternative_text(number).rpartition(":")[2])
        )


@each_with_strip
def test_a_lesson_asks_for_a_prediction_above_a_code_cell(number):
    cells = read(NUMBERED[number]).cells
    kinds = [cell.cell_type for cell in cells]
    asked = [place for place, cell in enumerate(cells) if "Predict before" in cell.source]
    assert asked
    for place in asked:
        assert "code" in kinds[place + 1 : place + 3], "nothing to run below the question"


@each_lesson
def test_predictions_have_options_and_a_folded_answer(number):
    prose = prose_of(NUMBERED[number])
    found = list(PREDICTION.finditer(prose))
    assert len(found) == len(re.findall(r"\*\*Predict", prose)), "another form"
    for one in found:
        options = re.findall(r"^- \*\*([A-D])\*\*", one["options"], flags=re.M)
        assert options == list("ABCD"[: len(options)])
        assert 2 <= len(options) <= 4
        assert one["right"] in options


@each_lesson
def test_a_lesson_ends_with_three_questions(number):
    prose = prose_of(NUMBERED[number])
    recap, exercise = (prose.index(f"\n## {name}\n") for name in ("Recap", "Exercise"))
    assert recap < prose.index("\n### Check yourself\n") < exercise
    found = QUESTION.findall(prose[recap:exercise])
    assert [number for number, _, _ in found] == ["1", "2", "3"]
    assert prose.count("<details>") == prose.count("</details>")


ANSWERS = [
    ("01", "broken-sentence", r"intact data for 10 of them"),
    ("02", "known", r"joint +0\.[3-9]\d* +0\.[0-2]\d*"),
    ("02", "longer-sentence", r"With 50 epochs 0 of"),
    ("02", "longer-table", r"score of known things +0\.[89]\d* +0\.[5-7]\d* +0\.[01]\d*"),
    ("03", "verdict", r"text LoRA alone 0%, objects read alone 0%, both (9\d|100)%"),
    ("03", "other-base-table", r"yes +off +0\.\d+ +(0\.9|1\.)"),
    ("04", "silence-reading", r"(?s)read, early loss: the silent.*lost, native.*silent.*silent"),
    ("04", "silence-reading", r"objects read, native loss: the trained model wins"),
    ("05", "words-table", r"cracks( +\d\.\d+){2} +0\.[0-8]"),
    ("05", "words-table", r"fissure( +\d\.\d+){2} +0\.000"),
    ("06", "cells", r"^2 of 16 combinations"),
    ("06", "half-known-steps", r"failing objects +no to yes +0\.00 +1\.00"),
    ("06", "half-known-steps", r"text_lora +on to off +1\.00 +0\.9"),
    ("07", "large-table", r"in one piece +[0-2]\.0"),
    ("08", "weights", r"lora_elsewhere"),
    ("08", "live", r"no_objects"),
    ("09", "check", r"half: keeps most of what can be merged: DETR encoder and masks, replay"),
    ("09", "front-table", r"word as embedding +1\.00 +0\.4"),
]
"""What the folded answers say, in the stored output of the cell below the question."""


@pytest.mark.parametrize(("number", "cell_id", "pattern"), ANSWERS)
def test_answers_agree_with_the_stored_outputs(number, cell_id, pattern):
    assert re.search(pattern, output_of(number, cell_id), flags=re.M)


@pytest.mark.parametrize("path", READABLE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_and_anchors_resolve(path):
    for target in LINK.findall(prose_of(path)):
        if re.match(r"https?://|mailto:|attachment:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor and file.suffix in (".md", ".ipynb"):
            assert anchor in anchors_of(file), target


def test_the_glossary_explains_each_term_once():
    glossary = NOTEBOOKS / "glossary.md"
    anchors = anchors_of(glossary)
    assert len(anchors) == len(set(anchors))
    entries = re.findall(r"^### (.+)\n\n(.+(?:\n.+)*)", glossary.read_text(encoding="utf-8"), re.M)
    assert len(entries) >= 40
    for term, meaning in entries:
        assert meaning.endswith("."), term
        assert len(re.findall(r"[.?](?= |\n|$)", meaning)) <= 4, f"{term} is too long"


@each_lesson
def test_a_lesson_links_a_term_at_most_at_its_first_use(number):
    linked = [
        target.partition("#")[2]
        for target in LINK.findall(prose_of(NUMBERED[number]).split("## The words of this")[0])
        if target.startswith("glossary.md#")
    ]
    assert linked
    assert len(linked) == len(set(linked))
