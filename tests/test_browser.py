"""Pages in a real browser: `make browser`. They are opened from a file, with the network cut off."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import supervision as sv
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from helpers.__main__ import main
from helpers.data.coco import read_split
from helpers.data.masks import mask_to_rle
from helpers.detect import threshold_sweep
from helpers.detect.queries import Query
from helpers.diagnose import diagnose
from helpers.files import DATA, ROOT, TINY_BASE, WALL_CRACKS, write_text
from helpers.show import explorer_panel
from helpers.show.page import PAGES

pytestmark = pytest.mark.browser
PHONE = 375  # pixels
REDRAW, SEEN = 100, 250  # milliseconds at the median, of a hundred pictures: computed, and painted
# Types a threshold and waits until the browser has painted twice: milliseconds.
MOVE_AND_WAIT = """(value) => new Promise((done) => {
  const field = document.querySelector(".score-value"), started = performance.now();
  field.value = value;
  field.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - started)));
})"""


def keep_screenshot(page, request, number=1):
    """Keep what a page shows where a person may look at it: `runs/browser/`."""
    name = re.sub(r"[^\w.]+", "_", request.node.name.removeprefix("test_"))
    page.screenshot(path=ROOT / "runs" / "browser" / f"{name}_{number}.png")


def is_far(url):
    return not url.startswith(("file:", "data:"))


@pytest.fixture
def opened(browser, tmp_path, request):
    """Return a function that opens a text as a page; any error in it fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1250, "height": 1000})
    problems = []

    def open_page(text):
        path = write_text(tmp_path / "page.html", text)
        page = context.new_page()
        page.on("request", lambda one: problems.append(one.url) if is_far(one.url) else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda one: problems.append(one.text) if one.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for number, page in enumerate(context.pages, 1):
        keep_screenshot(page, request, number)
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
def run_here(run_folder, tmp_path_factory):
    """Return a copy of the run that all tests share."""
    return shutil.copytree(run_folder, tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture(scope="module")
def report(run_here, data_dir):
    """Return the text of the report on the shared run, beside its base."""
    return report_of(run_here, data_dir)


def report_of(run, data_dir, *options):
    path = run.with_name("report.html")
    arguments = ["report", "--adapter", run, "--data", data_dir, "--html", path, *options]
    assert main([str(argument) for argument in arguments]) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def walls():
    split = read_split(WALL_CRACKS, "test")
    return split, questions(split)


def page_of(panel):
    return panel.to_html("Thresholds")


def shown_numbers(page, number=0):
    """Return what the page says of a model: count, precision and recall."""
    text = page.text_content(f".numbers p:nth-child({number + 1})")
    count = int(text.split(": ")[1].split(" ")[0])
    precision, recall = (text.split(f"{name} ")[1][:4] for name in ("precision", "recall"))
    return count, precision, recall


def expected_numbers(queries, threshold):
    row = threshold_sweep(queries, [threshold]).iloc[0]
    return int(row["count"]), f"{row['precision']:.2f}", f"{row['recall']:.2f}"


def test_the_explorer_counts_as_the_sweep_does(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split)))
    assert shown_numbers(page) == expected_numbers(queries, 0.3)
    for threshold in (0.0123, 0.5, 0.9):
        page.fill(".score-value", str(threshold))
        assert shown_numbers(page) == expected_numbers(queries, threshold)
    page.select_option("select.prompt", "crack")
    own = [query for query in queries if query.prompt == "crack"]
    assert shown_numbers(page) == expected_numbers(own, 0.9)


def test_an_assignment_in_the_page_is_that_of_scipy(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries[:2]}}, split)))
    source = (PAGES / "explorer.js").read_text()
    start, end = source.index("function numHits"), source.index("// What is left of an answer")
    rng = np.random.default_rng(0)
    for _ in range(200):
        ious = rng.beta(0.7, 0.7, size=rng.integers(1, 9, size=2)).round(3)
        pairs = ious[linear_sum_assignment(ious, maximize=True)]
        hits = page.evaluate(
            f"(ious) => {{ {source[start:end]}; return numHits(ious); }}", ious.tolist()
        )
        assert hits == int((pairs >= 0.5).sum())


def test_a_mask_threshold_changes_outlines_and_counts(opened, walls):
    split, queries = walls
    thinner = [replace(q, pred=[{**d, "rle": thin(d["rle"])} for d in q.pred]) for q in queries]
    answers = {"run": {0.3: queries, 0.7: thinner}}
    page = opened(page_of(explorer_panel(answers, split, mask_threshold=0.3)))
    assert shown_numbers(page) == expected_numbers(queries, 0.3)
    before = page.get_attribute("figure .hit", "d")
    page.focus("input.mask")
    page.keyboard.press("ArrowRight")
    assert page.text_content(".mask-value") == "0.7"
    assert shown_numbers(page) == expected_numbers(thinner, 0.3) != expected_numbers(queries, 0.3)
    assert page.get_attribute("figure .hit", "d") != before


def thin(rle):
    """Keep every third column of a mask."""
    mask = coco_mask.decode(rle)
    mask[:, np.arange(mask.shape[1]) % 3 > 0] = 0
    return mask_to_rle(mask)


def test_duplicates_are_dropped_as_supervision_drops_them(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split, score_threshold=0.001)))
    page.focus("input.overlap")
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    overlap = float(page.text_content(".overlap-value"))
    assert overlap == 0.4
    kept = 0
    for query in (query for query in queries if query.pred):
        masks = np.stack([coco_mask.decode(d["rle"]) for d in query.pred]).astype(bool)
        xyxy = sv.mask_to_xyxy(masks)
        found = sv.Detections(xyxy, masks, query.scores, np.zeros(len(masks), int))
        kept += len(found.with_nms(overlap))
    assert shown_numbers(page)[0] == kept < sum(len(query.pred) for query in queries)


def test_a_slider_moves_what_is_drawn_and_a_bad_number_is_marked(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split, score_threshold=0.001)))
    everything = page.locator(".pictures .hit").count()
    assert everything == sum(len(query.pred) for query in queries)
    page.focus("input.score")
    for _ in range(6):
        page.keyboard.press("PageUp")
    assert 0 < page.locator(".pictures .hit").count() < everything
    below = page.locator(".pictures .below")
    assert page.locator(".pictures .hit").count() + below.count() == everything
    assert not below.first.is_visible()
    page.check("input.below")
    assert below.first.is_visible()
    before = page.text_content(".numbers")
    for bad in ("7", "abc", "", "-0.1", "0.0001", "0"):
        page.fill(".score-value", bad)
        assert "bad" in page.get_attribute(".score-value", "class")
        assert page.get_attribute(".score-value", "aria-invalid") == "true"
        assert "from 0.001 to 1" in page.get_attribute(".score-value", "title")
        assert page.text_content(".numbers") == before
    page.fill(".score-value", "0,3")  # as on a German keyboard
    assert shown_numbers(page) == expected_numbers(queries, 0.3)
    page.fill(".score-value", "0.99")
    assert page.text_content(".numbers").startswith("at 0.99: ")
    assert not page.get_attribute(".score-value", "title")
    page.focus("input.score")
    page.keyboard.press("Home")
    assert shown_numbers(page)[0] == everything
    assert page.input_value(".score-value") == "0.001"
    assert page.get_attribute(".score-value", "aria-invalid") == "false"


def test_a_panel_that_starts_below_its_scores_draws_nothing_and_says_so(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split, score_threshold=0.0001)))
    assert page.text_content(".numbers").startswith("at 0.0001 nothing is shown: ")
    assert "bad" in page.get_attribute(".score-value", "class")
    assert not page.locator(".plots").is_visible()
    page.focus("input.score")
    page.keyboard.press("PageUp")
    assert page.locator(".plots").is_visible()
    assert "bad" not in page.get_attribute(".score-value", "class")


def test_a_goal_is_reached_or_said_to_be_out_of_reach(opened, walls):
    split, queries = walls
    panel = explorer_panel({"run": {0.5: queries}}, split, validation=queries)
    page = opened(page_of(panel))
    page.click("text=recall ≥ 0.9")
    assert float(shown_numbers(page)[2]) >= 0.9
    page.click("text=best F1")
    threshold = float(page.input_value(".score-value"))
    f1 = threshold_sweep(queries, [threshold, 0.3, 0.7])["f1"]
    assert f1[0] >= f1[1:].max() - 0.02
    page.select_option("select.prompt", "moss")
    page.click("text=recall ≥ 0.9")
    assert "no threshold reaches recall 0.9" in page.text_content(".numbers")


def test_no_button_chooses_on_the_pictures_that_are_judged(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split)))
    cracks = [query for query in queries if query.prompt == "crack"]
    panel = explorer_panel({"run": {0.5: queries}}, split, validation=cracks)
    other = opened(page_of(panel))
    for one, why in ((page, "flatters"), (other, "moss was not asked on the validation split")):
        one.select_option("select.prompt", "moss")
        assert why in one.text_content(".source")
        for button in one.locator("button[data-goal]").all():
            assert button.is_disabled()
            assert why in button.get_attribute("title")
    other.select_option("select.prompt", "crack")
    assert other.locator("text=best F1").is_enabled()


def test_the_buttons_choose_on_the_validation_split(opened, walls):
    split, queries = walls
    sure = [
        replace(q, pred=[{**d, "score": 0.9 + d["score"] / 20} for d in q.pred]) for q in queries
    ]
    panel = explorer_panel({"run": {0.5: queries}}, split, validation=sure)
    page = opened(page_of(panel))
    assert "validation" in page.text_content(".source")
    page.click("text=best F1")
    assert float(page.input_value(".score-value")) >= 0.9


def test_a_prompt_keeps_the_threshold_that_was_last_set_for_it(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split)))
    page.select_option("select.prompt", "crack")
    assert page.input_value(".score-value") == "0.3"  # none of its own yet
    page.fill(".score-value", "0.6")
    page.focus("input.overlap")
    page.keyboard.press("ArrowLeft")
    page.select_option("select.prompt", "moss")
    page.fill(".score-value", "0.05")
    for prompt, threshold in (("crack", "0.6"), ("every prompt", "0.3"), ("moss", "0.05")):
        page.select_option("select.prompt", prompt)
        assert page.input_value(".score-value") == threshold
        own = [query for query in queries if prompt in (query.prompt, "every prompt")]
        count = expected_numbers(own, float(threshold))[0]
        assert f"at {threshold}: {count} detections" in page.text_content(".numbers")
        assert page.text_content(".overlap-value") == "0.95"  # is one for all prompts
        assert page.input_value("select.prompt") == prompt
    words = page.locator("select.prompt option").all_text_contents()
    assert words == ["every prompt (0.3)", "crack (0.6)", "moss (0.05)"]


def test_the_calibrated_threshold_is_marked_with_its_interval(opened, walls):
    split, queries = walls
    calibrated = {"crack": {"threshold": 0.42, "low": 0.25, "high": 0.75}}
    answers = {"run": {0.5: queries}, "base": {0.5: queries}}
    page = opened(page_of(explorer_panel(answers, split, calibrated=calibrated)))
    recalls, f1s = page.locator(".plots svg").all()[:2]
    assert [one.locator(".calibrated-mark").count() for one in (recalls, f1s)] == [1, 1]
    assert recalls.locator(".interval").count() == 0
    band = f1s.locator(".interval")  # the axis goes from 40 to 340
    ends = float(band.get_attribute("x")), float(band.get_attribute("width"))
    assert ends == pytest.approx((40 + 300 * 0.25, 300 * 0.5))
    row = threshold_sweep(queries, [0.42]).iloc[0]
    for svg, x, y in ((recalls, row["recall"], row["precision"]), (f1s, 0.42, row["f1"])):
        place = svg.locator(".calibrated-mark").get_attribute("d")[1:].split("l")[0].split(" ")
        assert [float(one) for one in place] == pytest.approx([40 + 300 * x, 213 - 200 * y])
    assert "crack: 0.42 [0.25, 0.75]" in page.text_content(".calibrated")
    assert page.input_value(".score-value") == "0.3"  # marked, not set
    page.select_option("select.prompt", "moss")
    assert page.locator(".calibrated-mark").count() == 0
    assert page.text_content("p.calibrated") == ""


def test_two_models_share_the_sliders(opened, walls):
    split, queries = walls
    worse = [replace(q, pred=[{**d, "score": d["score"] / 3} for d in q.pred]) for q in queries]
    page = opened(page_of(explorer_panel({"run": {0.5: queries}, "base": {0.5: worse}}, split)))
    assert shown_numbers(page, 0) == expected_numbers(queries, 0.3)
    assert shown_numbers(page, 1) == expected_numbers(worse, 0.3)
    assert page.locator("figure").first.locator("svg").count() == 2


# The faults of the pictures in the order in which they are seen.
SEEN_FAULTS = """[...document.querySelectorAll("figure")].map((one) => [one.getBoundingClientRect(), one])
  .sort(([a], [b]) => a.top - b.top || a.left - b.left).map(([_, one]) => Number(one.dataset.faults))"""


def test_the_worst_picture_is_first_or_the_best_or_the_one_of_the_file(opened, walls):
    split, queries = walls
    page = opened(page_of(explorer_panel({"run": {0.5: queries}}, split)))
    in_file = page.evaluate(
        "[...document.querySelectorAll('figure')].map((one) => Number(one.dataset.faults))"
    )
    orders = {"worst first": sorted(in_file)[::-1], "best first": sorted(in_file)}
    orders["as in the file"] = in_file
    assert len({tuple(faults) for faults in orders.values()}) == 3
    assert page.evaluate(SEEN_FAULTS) == orders["worst first"]
    for name, faults in orders.items():
        page.get_by_label("order of pictures").select_option(name)
        assert page.evaluate(SEEN_FAULTS) == faults, name


def test_a_hundred_pictures_are_redrawn_in_a_blink(opened, walls):
    split, queries = walls
    many = [(n, record) for n in range(4) for record in split.records]
    records = tuple(replace(one, image_id=f"{n}_{one.image_id}") for n, one in many)
    asked = [replace(q, image_id=f"{n}_{q.image_id}") for n in range(4) for q in queries]
    page = opened(page_of(explorer_panel({"run": {0.5: asked}}, replace(split, records=records))))
    assert page.locator("figure").count() == len(records) > 100
    times, seen = [], []
    for threshold in np.linspace(0.05, 0.95, 20):
        seen.append(page.evaluate(MOVE_AND_WAIT, str(threshold)))
        times.append(float(page.get_attribute(".explorer", "data-milliseconds")))
    print(
        f"{len(records)} pictures: computed in {np.median(times):.0f} ms at the median, "
        f"{max(times):.0f} at most; seen after {np.median(seen):.0f} and {max(seen):.0f}"
    )
    assert np.median(times) < REDRAW
    assert np.median(seen) < SEEN


def test_a_diagnosis_is_a_page(opened):
    patient = DATA / "patients" / "no_detections"
    found = diagnose(patient, base=TINY_BASE)
    page = opened(found.to_html())
    assert page.text_content("h2") == f"1. {found.causes[0].title}"
    assert page.locator("tr").count() == 1 + len(found.gates)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


SECTIONS = [
    "numbers", "thresholds", "pictures", "words", "mistakes", "labels", "scores", "kept", "checklist",
    "diagnosis", "again",
]  # fmt: skip


def examine_report(page, names):
    """Go through a report of two models: its sections, and what its sliders do."""
    ids = page.evaluate("[...document.querySelectorAll('h2')].map((one) => one.id)")
    assert ids == SECTIONS
    for link in page.locator("nav a").all():
        link.click()
        section = page.locator("h2:target")
        assert section.is_visible()
        assert section.evaluate("(one) => one.nextElementSibling.textContent.trim() !== ''")
    assert [link.get_attribute("href") for link in page.locator("nav a").all()] == [
        f"#{one}" for one in SECTIONS
    ]
    assert page.locator("#numbers + div tr td.name").all_text_contents() == names
    texts = [page.locator(".numbers").text_content()]
    for name, key in ((".score", "End"), (".score", "Home"), (".overlap", "Home")):
        page.focus(f"input{name}")
        page.keyboard.press(key)
        texts.append(page.locator(".numbers").text_content())
    assert len(set(texts)) == len(texts), texts
    assert all(name in text for name in names for text in texts)
    outlines = page.locator("figure path.hit, figure path.below").all()
    drawn = [one.get_attribute("d") for one in outlines]
    page.focus("input.mask")
    page.keyboard.press("Home")
    assert drawn != [one.get_attribute("d") for one in outlines]


def test_a_report_opens_without_network_and_its_sliders_count(opened, report, run_here):
    examine_report(opened(report), [str(run_here), "its base"])


def test_a_report_on_two_runs_opens_without_network_and_its_sliders_count(
    opened, run_here, run_copy, data_dir
):
    text = report_of(run_here, data_dir, "--compare", run_copy)
    examine_report(opened(text), [str(run_here), str(run_copy)])


def test_no_page_is_wider_than_a_phone(opened, walls, report):
    diagnosis = diagnose(DATA / "patients" / "no_detections", base=TINY_BASE).to_html()
    explorer = page_of(explorer_panel({"run": {0.5: walls[1]}}, walls[0]))
    for text in (diagnosis, explorer, report):
        page = opened(text)
        page.set_viewport_size({"width": PHONE, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
