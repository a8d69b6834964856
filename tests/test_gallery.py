"""Galleries: which places they show, in which order, and that planted label mistakes come first."""

from dataclasses import replace

import numpy as np
import pytest
from builders import check, edit_coco, write_coco
from PIL import Image

from helpers.data import mask_to_rle, read_split
from helpers.data.records import ImageRecord, ObjectAnnotation, Split
from helpers.detect import predict_split
from helpers.detect.queries import Query
from helpers.errors import InputError
from helpers.files import DATA, TINY_BASE
from helpers.model import load_base
from notebooks.gallery import (
    BARE_SIZE,
    SHIFT_PX,
    Exhibit,
    exhibit_picture,
    exhibits_figure,
    figure_picture,
    finding_exhibits,
    label_suspects,
    plant_label_mistakes,
    planted_ranks,
    small_figure,
)

SIDE = 100


def rle(x0, y0, x1, y1):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask_to_rle(mask)


def item(word, *box):
    return ObjectAnnotation(word, tuple(map(float, box)), rle(*box))


def split_of(*scenes, contents=frozenset()):
    records = [
        ImageRecord(f"{n}.png", f"{n}.png", SIDE, SIDE, tuple(objects), contents)
        for n, objects in enumerate(scenes)
    ]
    return Split("test", "data", "coco", ("crack",), tuple(records))


def answers(image, word, *found):
    """Return the query of a word; `found` are (score, x0, y0, x1, y1)."""
    pred = [{"rle": rle(*box), "score": score, "box_xyxy": list(box)} for score, *box in found]
    return Query(f"{image}.png", word, SIDE, SIDE, [], pred)


HERE, BESIDE_IT, FAR = (10, 10, 40, 40), (22, 10, 52, 40), (60, 60, 90, 90)


def kinds(suspects):
    return [(one.kind, round(one.suspicion, 2)) for one in suspects]


def test_an_annotation_that_the_model_confirms_is_no_suspect():
    split = split_of([item("crack", *HERE)])
    assert label_suspects([answers(0, "crack", (0.9, *HERE), (0.8, *HERE))], split) == []


def test_a_detection_on_nothing_is_suspected_by_its_score():
    found = label_suspects([answers(0, "crack", (0.8, *FAR), (0.7, *FAR))], split_of([]))
    assert kinds(found) == [("not annotated", 0.8)]
    assert found[0].boxes_xyxy == ((60, 60, 90, 90),)
    assert "“crack” detected (score 0.80), not annotated" in found[0].caption
    assert label_suspects([answers(0, "crack", (0.2, *FAR))], split_of([])) == []


def test_what_is_listed_without_annotation_is_no_suspect():
    split = split_of([], contents=frozenset({"crack"}))
    assert label_suspects([answers(0, "Crack", (0.8, *FAR))], split) == []


def test_another_word_on_an_object_is_suspected_unless_its_own_is_confirmed():
    split = split_of([item("moss", *HERE)])
    crack = answers(0, "crack", (0.8, *HERE))
    assert kinds(label_suspects([crack, answers(0, "moss")], split)) == [("wrong word", 0.8)]
    both = [crack, answers(0, "moss", (0.9, *HERE))]
    assert kinds(label_suspects(both, split)) == [("wrong word", 0.08)]


def test_a_detection_beside_its_annotation_is_badly_placed_once():
    split = split_of([item("crack", *HERE)])
    found = label_suspects([answers(0, "crack", (0.9, *BESIDE_IT))], split)
    iou = (18 * 30) / (42 * 30)
    assert kinds(found) == [("badly placed", round(0.9 * (1 - iou), 2))]


def test_a_missed_object_weighs_as_much_as_the_model_finds_others():
    split = split_of(*[[item("crack", *HERE)]] * 4)
    found = [answers(n, "crack", (0.9, *HERE)) for n in range(3)]
    missed = [*found, answers(3, "crack", (0.1, *HERE))]
    assert kinds(label_suspects(missed, split)) == [("missed", round(0.75 * 0.9, 2))]
    blind = [answers(n, "crack") for n in range(4)]
    assert [one.suspicion for one in label_suspects(blind, split)] == [0.0] * 4


def test_a_word_that_was_not_asked_cannot_be_missed():
    split = split_of([item("moss", *HERE)])
    assert label_suspects([answers(0, "crack")], split) == []


def test_answers_about_other_pictures_are_refused():
    with pytest.raises(InputError, match=r"'7.png', which is not in the split"):
        label_suspects([answers(7, "crack")], split_of([]))


def test_planting_changes_three_annotations_and_no_more():
    split = split_of(*[[item("crack", *HERE), item("crack", *FAR)]] * 5)
    spoilt, planted = plant_label_mistakes(split, "moss", seed=3)
    changed = {
        before.image_id: after.objects
        for before, after in zip(split.records, spoilt.records, strict=True)
        if before != after
    }
    assert changed.keys() == set(planted.values())
    assert len(changed[planted["not annotated"]]) == 1
    assert changed[planted["wrong word"]][0].category == "moss"
    moved = changed[planted["badly placed"]][0].box_xyxy
    assert moved == (HERE[0] + SHIFT_PX, HERE[1], HERE[2] + SHIFT_PX, HERE[3])
    assert split.records[0].objects == (item("crack", *HERE), item("crack", *FAR))
    assert plant_label_mistakes(split, "moss", seed=3)[1] == planted


def test_planting_needs_three_images():
    split = split_of([item("crack", *HERE)], [item("moss", *HERE)], [], [item("crack", *FAR)])
    with pytest.raises(InputError, match="2 images have an object not called 'moss'"):
        plant_label_mistakes(split, "moss")


@pytest.fixture(scope="module")
def known_walls():
    """Return drawn walls with things that the base knows and has not seen, and what it answers."""
    split = read_split(DATA / "known_things", "test")
    split = replace(split, records=split.records[:6])
    model, processor = load_base(TINY_BASE)
    return split, predict_split(model, processor, split, absent_prompts=split.categories)


@pytest.mark.parametrize("seed", range(5))
def test_planted_label_mistakes_rank_at_the_top(known_walls, seed):
    split, queries = known_walls
    untouched = label_suspects(queries, split)
    assert len(untouched) <= 3
    spoilt, planted = plant_label_mistakes(split, "tape", seed)
    suspects = label_suspects(queries, spoilt)
    ranks = planted_ranks(suspects, planted)
    assert set(ranks.values()) == {1, 2, 3}, ranks
    assert len(suspects) <= len(untouched) + 3


def test_a_planted_mistake_that_is_not_ranked_has_no_rank():
    assert planted_ranks([], {"missed": "0.png"}) == {"missed": None}


@pytest.fixture
def faulty(tmp_path):
    """Return the report of a dataset with two boxes off their masks, and an image that is no image."""
    root = write_coco(tmp_path / "data")

    def spoil(content):
        for number, step in ((0, 60), (2, 25)):
            content["annotations"][number]["bbox"][0] += step

    edit_coco(root, "train", spoil)
    (root / "valid" / "e.png").write_bytes(b"nothing")
    return check(root)


def test_findings_are_shown_errors_first_and_the_worst_of_each_first(faulty):
    exhibits = finding_exhibits(faulty)
    codes = [one.kind for one in exhibits]
    of_code = {finding.code: finding for finding in faulty.findings}
    off_mask = [one for one in exhibits if one.kind == "D22_BOX_OFF_MASK"]
    assert len(off_mask) == len(of_code["D22_BOX_OFF_MASK"].places) == 2
    assert len(exhibits) == sum(len(finding.places) for finding in faulty.findings)
    assert "D70_BROKEN_IMAGE" in codes
    errors = [of_code[code].severity == "error" for code in codes]
    assert errors == sorted(errors, reverse=True)
    worst = of_code["D22_BOX_OFF_MASK"].places[0]
    assert off_mask[0].boxes_xyxy == (worst.box_xyxy,)
    assert off_mask[0].objects[0].annotation_id == worst.annotation_id
    assert "a box does not fit its own mask (D22, error) · train/" in off_mask[0].caption


def test_a_report_without_findings_has_no_exhibit(faulty):
    assert finding_exhibits(replace(faulty, findings=())) == []


def test_annotations_that_cannot_be_read_leave_the_pictures(faulty):
    (faulty.data_dir / "train" / "_annotations.coco.json").write_text("{")
    exhibits = finding_exhibits(faulty)
    assert exhibits
    assert all(one.objects == () for one in exhibits if "· train/" in one.caption)


def test_a_picture_that_cannot_be_opened_is_grey(faulty):
    (broken,) = [one for one in finding_exhibits(faulty) if one.kind == "D70_BROKEN_IMAGE"]
    picture = exhibit_picture(broken)
    assert picture.size == BARE_SIZE
    assert picture.getcolors() == [(BARE_SIZE[0] * BARE_SIZE[1], (187, 187, 187))]


@pytest.mark.parametrize(
    "box",
    [
        (float("nan"), 0.0, 5.0, 5.0),
        (-50.0, -50.0, 500.0, 500.0),
        (200.0, 5.0, 300.0, 9.0),
        (30.0, 30.0, 10.0, 10.0),
    ],
)
def test_impossible_boxes_are_drawn_inside_the_picture_or_not_at_all(tmp_path, box):
    path = tmp_path / "grey.png"
    Image.new("RGB", (SIDE, SIDE), "grey").save(path)
    bare = exhibit_picture(Exhibit(path, "0.png", "", ""))
    drawn = exhibit_picture(Exhibit(path, "0.png", "", "", (box,)))
    changed = (np.asarray(bare) != np.asarray(drawn)).any()
    assert changed == bool(np.isfinite(box).all())


def test_a_mask_of_another_size_is_left_out(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (50, 50), "grey").save(path)
    other = replace(item("crack", 5, 5, 20, 20), box_xyxy=(5.0, 5.0, 20.0, 20.0))
    assert exhibit_picture(Exhibit(path, "0.png", "", "", objects=(other,))).size


def test_figures_have_every_caption_and_fit_their_pictures(tmp_path):
    panels = [(Image.new("RGB", (80, 40), "grey"), f"{n}: {'word ' * 12}") for n in range(5)]
    figure = small_figure(panels, columns=4)
    assert len(figure.axes) == 5
    assert [ax.get_title(loc="left").split(":")[0] for ax in figure.axes] == list("01234")
    picture = figure_picture(figure)
    assert picture.size[0] == pytest.approx(960, abs=2)
    assert not np.asarray(picture)[:4].min() < 200, "a caption is cut off at the top"
    with pytest.raises(InputError, match="nothing to draw"):
        exhibits_figure([])
