"""Pages in a real browser: `make browser`. They are opened from a file, with the network cut off."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from helpers.data.coco import read_split
from helpers.data.masks import mask_to_rle
from helpers.detect import threshold_sweep
from helpers.detect.queries import Query
from helpers.diagnose import diagnose
from helpers.files import DATA, TINY_BASE, WALL_CRACKS, write_text
from helpers.show import explorer_panel

pytestmark = pytest.mark.browser
REDRAW = 100  # milliseconds, at the median, of a hundred pictures


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that opens a text as a page; any error in it fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1250, "height": 1000})
    problems = []

    def open_page(text):
        path = write_text(tmp_path / "page.html", text)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert not problems


def questions(split):
    """Answer 'crack' with its own mask, moved by some pixels, and 'moss' with a blot, at random scores."""
    random, queries = np.random.default_rng(0), []
    for record in split.records:
        gt, pred = [item.rle for item in record.objects], []
        for rle in gt:
            for step in (1, 3, 12):
                moved = np.roll(coco_mask.decode(rle), step, axis=1)
                pred.append({"rle": mask_to_rle(moved), "score": random.uniform(0.02, 1)})
        blot = np.zeros((record.height, record.width), np.uint8)
        blot[40:80, 50:120] = 1
        blots = [{"rle": mask_to_rle(blot), "score": random.uniform(0.01, 0.9)}]
        size, factors = (record.height, record.width), {"presence_prob": 0.9, "max_query_prob": 0.8}
        queries.append(Query(record.image_id, "crack", *size, gt, pred, **factors))
        queries.append(Query(record.image_id, "moss", *size, [], blots, **factors))
    return queries


@pytest.fixture(scope="module")
def walls():
    split = read_split(WALL_CRACKS, "test")
    return split, questions(split)


def shown_numbers(page):
    """Return what the page says: count, precision and recall."""
    text = page.text_content("#numbers")
    count = int(text.split(": ")[1].split(" ")[0])
    precision, recall = (text.split(f"{name} ")[1][:4] for name in ("precision", "recall"))
    return count, precision, recall


def expected_numbers(queries, threshold):
    row = threshold_sweep(queries, [threshold]).iloc[0]
    return int(row["count"]), f"{row['precision']:.2f}", f"{row['recall']:.2f}"


def test_the_explorer_counts_as_the_sweep_does(opened, walls):
    split, queries = walls
    page = opened(explorer_page(queries, split, 0.3))
    assert shown_numbers(page) == expected_numbers(queries, 0.3)
    for threshold in (0.0123, 0.5, 0.9):
        page.fill("#value", str(threshold))
        assert shown_numbers(page) == expected_numbers(queries, threshold)
    page.select_option("#prompt", "crack")
    own = [query for query in queries if query.prompt == "crack"]
    assert shown_numbers(page) == expected_numbers(own, 0.9)


def test_a_slider_moves_what_is_drawn_and_a_bad_number_is_marked(opened, walls):
    split, queries = walls
    page = opened(explorer_page(queries, split, 0.001))
    everything = page.locator("#pictures .hit").count()
    assert everything == sum(len(query.pred) for query in queries)
    page.focus("#slider")
    for _ in range(6):
        page.keyboard.press("PageUp")
    assert 0 < page.locator("#pictures .hit").count() < everything
    below = page.locator("#pictures .below")
    assert page.locator("#pictures .hit").count() + below.count() == everything
    assert not below.first.is_visible()
    page.check("#below")
    assert below.first.is_visible()
    before = page.text_content("#numbers")
    page.fill("#value", "7")
    assert "bad" in page.get_attribute("#value", "class")
    assert page.text_content("#numbers") == before


def test_a_goal_is_reached_or_said_to_be_out_of_reach(opened, walls):
    split, queries = walls
    page = opened(explorer_page(queries, split, 0.3))
    page.click("text=recall ≥ 0.9")
    assert float(shown_numbers(page)[2]) >= 0.9
    page.click("text=best F1")
    threshold = float(page.input_value("#value"))
    f1 = threshold_sweep(queries, [threshold, 0.3, 0.7])["f1"]
    assert f1[0] >= f1[1:].max() - 0.02
    page.select_option("#prompt", "moss")
    page.click("text=recall ≥ 0.9")
    assert "no threshold reaches recall 0.9" in page.text_content("#numbers")


def test_the_worst_picture_is_first(opened, walls):
    split, queries = walls
    page = opened(explorer_page(queries, split, 0.3))
    faults = page.evaluate("data.images.map(faults)")
    orders = page.evaluate("figures.map((one) => Number(one.figure.style.order))")
    assert orders == [-fault for fault in faults]
    assert max(faults) > min(faults)


def test_a_hundred_pictures_are_redrawn_in_a_blink(opened, walls):
    split, queries = walls
    many = [(n, record) for n in range(4) for record in split.records]
    records = tuple(replace(one, image_id=f"{n}_{one.image_id}") for n, one in many)
    asked = [replace(q, image_id=f"{n}_{q.image_id}") for n in range(4) for q in queries]
    page = opened(explorer_page(asked, replace(split, records=records), 0.3))
    assert page.locator("figure").count() == len(records) > 100
    times = []
    for threshold in np.linspace(0.05, 0.95, 20):
        page.evaluate(f"move({threshold})")
        times.append(float(page.evaluate("document.body.dataset.milliseconds")))
    print(
        f"{len(records)} pictures redrawn: median {np.median(times):.0f} ms, at most {max(times):.0f}"
    )
    assert np.median(times) < REDRAW


def test_a_diagnosis_is_a_page(opened):
    patient = DATA / "patients" / "no_detections"
    found = diagnose(patient, base=TINY_BASE)
    page = opened(found.to_html())
    assert page.text_content("h2") == f"1. {found.causes[0].title}"
    assert page.locator("tr").count() == 1 + len(found.gates)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
