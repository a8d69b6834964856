"""The metrics against recorded native numbers, by hand, and where there is nothing to measure."""

import contextlib
import io
import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.detect.metrics import (
    cgf1,
    coco_ap,
    evaluate_queries,
    threshold_sweep,
    undefined_cgf1,
    union_iou,
)
from helpers.detect.queries import Query
from helpers.errors import InputError

ORACLES = Path(__file__).parent / "fixtures" / "oracles"
SIZE = 20
CGF1_FILES = sorted(path.name for path in ORACLES.glob("cgf1_dev_*.json"))


def load(name):
    return json.loads((ORACLES / name).read_text(encoding="utf-8"))


def mask(top, left, bottom, right):
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    pixels[top:bottom, left:right] = 1
    rle = mask_utils.encode(pixels)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


BIG = mask(0, 0, 10, 10)
HALF = mask(0, 0, 10, 5)
APART = mask(12, 12, 18, 18)


def query(gt=(), pred=(), image_id=1, prompt="crack", **extra):
    return {
        "image_id": image_id,
        "prompt": prompt,
        "height": SIZE,
        "width": SIZE,
        "exhaustive": True,
        "gt": list(gt),
        "pred": [{"rle": rle, "score": score} for rle, score in pred],
        **extra,
    }


# --- recorded numbers -------------------------------------------------------------------------


def test_the_three_recorded_files_are_there():
    assert len(CGF1_FILES) == 3


@pytest.mark.parametrize("name", CGF1_FILES)
def test_cgf1_equals_the_oracle(name):
    oracle = load(name)
    result = cgf1(oracle["queries"], oracle["score_threshold"])
    expected = oracle["expected"] | oracle["expected_other"]
    assert len(expected) == 26
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", CGF1_FILES)
def test_mask_ap_equals_the_oracle(name):
    oracle = load(name)
    exhaustive = [q for q in oracle["queries"] if q["exhaustive"]]
    assert coco_ap(oracle["queries"]) == pytest.approx(oracle["coco_segm_ap_all_queries"], abs=1e-6)
    expected = oracle["coco_segm_ap_exhaustive_queries"]
    assert coco_ap(exhaustive, "segm") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_pycocotools(seed, iou_type):
    queries = random_queries(seed)
    gt, pred = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, content in zip((gt, pred), _coco_contents(queries), strict=True):
            coco.dataset = content
            coco.createIndex()
        evaluator = COCOeval(gt, pred, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    expected = dict(zip(("AP", "AP50", "AP75"), evaluator.stats.tolist(), strict=False))
    assert 0 < expected["AP"] < expected["AP50"] < 1
    assert coco_ap(queries, iou_type) == pytest.approx(expected, abs=1e-12)


def random_queries(seed):
    """Three prompts on eight pictures: equal scores, empty masks, more than 100 detections."""
    rng = np.random.default_rng(seed)

    def shape():
        (top, left), (height, width) = rng.integers(0, 12, 2), rng.integers(2, 9, 2)
        return [int(n) for n in (top, left, top + height, left + width)]

    queries = []
    for number in range(24):
        objects = [shape() for _ in range(rng.integers(0, 4))]
        count = 120 if number == 5 else int(rng.integers(0, 6))
        moved = [[n + int(rng.integers(-1, 2)) for n in box] for box in objects]
        detected = moved + [shape() for _ in range(count)]
        scores = rng.integers(0, 8, len(detected)) / 8
        pred = [
            (mask(*np.clip(box, 0, SIZE)), s)
            for box, s in zip(detected, scores.tolist(), strict=True)
        ]
        gt = [mask(*np.clip(box, 0, SIZE)) for box in objects]
        queries.append(query(gt, pred, image_id=number % 8, prompt="abc"[number // 8]))
    queries[0]["pred"].append({"rle": mask(0, 0, 0, 0), "score": 0.9})
    return queries


def _coco_contents(queries):
    gt, pred = [], []
    for one in queries:
        ids = {"image_id": one["image_id"], "category_id": ord(one["prompt"]), "iscrowd": 0}
        for rle in one["gt"]:
            gt.append(ids | shape_of(rle) | {"id": len(gt) + 1})
        for item in one["pred"]:
            own = {"id": len(pred) + 1, "score": item["score"]}
            pred.append(ids | shape_of(item["rle"]) | own)
    images = [{"id": number, "height": SIZE, "width": SIZE} for number in range(8)]
    categories = [{"id": ord(letter)} for letter in "abc"]
    return [
        {"images": images, "categories": categories, "annotations": annotations}
        for annotations in (gt, pred)
    ]


def shape_of(rle):
    box, area = mask_utils.toBbox(rle).tolist(), float(mask_utils.area(rle))
    return {"segmentation": dict(rle), "bbox": box, "area": area}


def test_a_query_is_read_once_and_cannot_be_changed():
    mapping = query([BIG], [(BIG, 0.9)], is_positive=True, note="kept out")
    one = Query.from_dict(mapping)
    assert (one.gt, one.pred, one.exhaustive) == (mapping["gt"], mapping["pred"], True)
    assert one.is_positive
    assert one.highest_score == 0.9
    assert cgf1([one, query(prompt="joint")]) == cgf1([mapping, query(prompt="joint")])
    with pytest.raises(FrozenInstanceError):
        one.gt = []


# --- by hand ----------------------------------------------------------------------------------


def test_cgf1_of_a_perfect_and_of_an_inverted_detector():
    perfect = [query([BIG], [(BIG, 0.9)]), query(prompt="joint")]
    assert cgf1(perfect)["cgF1"] == pytest.approx(1, abs=1e-3)
    inverted = [query([BIG]), query(prompt="joint", pred=[(BIG, 0.9)])]
    assert cgf1(inverted)["IL_MCC"] == pytest.approx(-1, abs=1e-3)
    assert cgf1(inverted)["cgF1"] == 0


def test_score_threshold_is_inclusive_and_used():
    queries = [query([BIG], [(BIG, 0.3)]), query(prompt="joint")]
    assert cgf1(queries, 0.3)["recall"] == pytest.approx(1, abs=1e-3)
    assert cgf1(queries, 0.31)["recall"] == 0
    assert cgf1(queries)["recall"] == 0


def test_cgf1_is_zero_when_everything_is_below_the_threshold_or_missing():
    for pred in ([], [(BIG, 0.1)]):
        result = cgf1([query([BIG], pred), query(prompt="joint")])
        assert result["cgF1"] == result["positive_micro_F1"] == result["IL_MCC"] == 0
        assert result["positive_macro_F1"] == -1


def test_box_ap_takes_given_boxes_and_else_those_around_the_masks():
    assert coco_ap([query([BIG], [(BIG, 0.9)])], "bbox")["AP"] == pytest.approx(1)
    shifted = query([BIG], [(BIG, 0.9)])
    shifted["pred"][0]["box_xyxy"] = [0, 0, 10, 6]
    assert coco_ap([shifted], "bbox")["AP50"] == pytest.approx(1)
    assert coco_ap([shifted], "bbox")["AP75"] == 0
    shifted["gt_boxes_xyxy"] = [[0.0, 0.0, 10.0, 6.0]]
    assert coco_ap([shifted], "bbox")["AP75"] == pytest.approx(1)
    assert coco_ap([shifted], "segm")["AP75"] == pytest.approx(1)


def test_a_given_box_is_read_as_two_corners():
    away = query([APART], [(APART, 0.9)])
    away["pred"][0]["box_xyxy"] = [12.0, 12.0, 18.0, 18.0]
    assert coco_ap([away], "bbox")["AP"] == pytest.approx(1)


def test_ap_counts_a_false_alarm_of_a_prompt_that_is_present_elsewhere():
    queries = [query([BIG], [(BIG, 0.6)]), query(image_id=2, pred=[(BIG, 0.9)])]
    assert coco_ap(queries)["AP50"] == pytest.approx(0.5)
    queries[1]["prompt"] = "moss"
    assert coco_ap(queries)["AP50"] == pytest.approx(1)


def test_ap_takes_image_ids_of_any_kind():
    queries = [query([BIG], [(BIG, 0.6)], image_id="a.jpg"), query(image_id=("b", 1))]
    assert coco_ap(queries)["AP50"] == pytest.approx(1)


def test_union_iou_by_hand():
    assert union_iou([query([BIG], [(HALF, 0.9), (HALF, 0.8)])], 0.5) == 0.5
    split = query([HALF, mask(0, 5, 10, 10)], [(BIG, 0.9)])
    assert union_iou([split], 0.5) == 1
    assert union_iou([query([BIG], [(HALF, 0.5)])], 0.5) == 0.5
    assert union_iou([query([BIG], [(HALF, 0.4)])], 0.5) == 0
    # 100 pixels right, 36 pixels for an absent prompt wrong
    absent = query(prompt="joint", pred=[(APART, 0.9)])
    assert union_iou([query([BIG], [(BIG, 0.9)]), absent], 0.5) == pytest.approx(100 / 136)


def test_threshold_sweep_by_hand():
    queries = [
        query([BIG, APART], [(BIG, 0.9), (HALF, 0.6)]),
        query(prompt="joint", pred=[(APART, 0.4)]),
    ]
    table = threshold_sweep(queries, [0.0, 0.5, 0.7, 0.95])
    assert list(table.columns) == ["threshold", "count", "precision", "recall", "f1"]
    assert table["count"].tolist() == [3, 2, 1, 0]
    assert table["precision"].tolist()[:3] == pytest.approx([1 / 3, 1 / 2, 1])
    assert math.isnan(table["precision"][3])
    assert table["recall"].tolist() == [0.5, 0.5, 0.5, 0]
    assert table["f1"].tolist() == pytest.approx([2 / 5, 1 / 2, 2 / 3, 0])


def test_threshold_sweep_counts_a_hit_from_an_iou_of_a_half_on():
    for pred, recall in ((BIG, 1), (HALF, 1), (mask(0, 0, 10, 4), 0)):
        assert threshold_sweep([query([BIG], [(pred, 0.9)])], [0.5])["recall"][0] == recall


def test_sweep_agrees_with_cgf1():
    oracle = load("cgf1_dev_0.json")
    row = threshold_sweep(oracle["queries"], [0.5]).iloc[0]
    assert row["recall"] == pytest.approx(oracle["expected_other"]["recall@0.5"], abs=1e-4)
    assert row["precision"] == pytest.approx(oracle["expected_other"]["precision@0.5"], abs=1e-4)


# --- the summary, and what has no meaning -----------------------------------------------------


def test_evaluate_queries_reports_everything():
    oracle = load("cgf1_dev_0.json")
    result = evaluate_queries(oracle["queries"], 0.5)
    assert result["cgF1"] == pytest.approx(oracle["expected"]["cgF1"], abs=1e-6)
    assert result["pmF1"] == pytest.approx(oracle["expected"]["positive_micro_F1"], abs=1e-6)
    assert result["IL_MCC"] == pytest.approx(oracle["expected"]["IL_MCC"], abs=1e-6)
    assert result["AP"] == pytest.approx(oracle["coco_segm_ap_all_queries"]["AP"], abs=1e-6)
    assert result["union_iou"] == union_iou(oracle["queries"], 0.5)
    assert result["num_present"] == 8
    assert result["num_absent"] == 2
    # absent: 0.5125 and 0.25
    assert result["max_score_absent"] == pytest.approx((0.5125 + 0.25) / 2)
    assert result["max_score_absent_share_above"] == 0.5
    assert result["max_score_present_share_above"] == 7 / 8
    assert not any(key.endswith("_reason") for key in result)
    assert None not in result.values()
    json.dumps(result, allow_nan=False)


def test_max_score_of_the_query_is_preferred_to_that_of_the_listed_detections():
    queries = [query([BIG], max_score=0.2), query(prompt="joint", pred=[(BIG, 0.4)])]
    result = evaluate_queries(queries, 0.3)
    assert result["max_score_present"] == 0.2
    assert result["max_score_absent"] == 0.4


def test_without_an_absent_prompt_cgf1_is_refused_with_the_reason():
    queries = load("cgf1_dev_2.json")["queries"]
    assert "absent" in undefined_cgf1(queries)
    result = evaluate_queries(queries, 0.5)
    assert result["cgF1"] is None
    assert result["IL_MCC"] is None
    assert "no absent prompt" in result["cgF1_reason"]
    assert result["pmF1"] == pytest.approx(0.3799532729, abs=1e-6)
    assert "pmF1_reason" not in result
    assert result["max_score_absent"] is None
    assert result["max_score_absent_share_above"] is None
    assert "absent" in result["max_score_absent_reason"]


def test_an_absent_prompt_that_is_not_exhaustive_does_not_count_as_absent():
    queries = [query([BIG]), query(prompt="joint", exhaustive=False)]
    assert "absent" in undefined_cgf1(queries)
    assert evaluate_queries(queries, 0.5)["cgF1"] is None


def test_without_a_present_prompt_every_metric_says_why_it_is_none():
    result = evaluate_queries([query(pred=[(BIG, 0.9)])], 0.5)
    for name in ("AP", "box_AP", "cgF1", "pmF1", "union_iou", "max_score_present"):
        assert result[name] is None
        assert result[f"{name}_reason"]
    for name in ("AP50", "AP75", "box_AP50", "box_AP75", "IL_MCC"):
        assert result[name] is None
    assert result["max_score_absent"] == 0.9
    assert undefined_cgf1([query()]) == result["cgF1_reason"]


def test_without_an_exhaustive_query_cgf1_is_refused():
    queries = [query([BIG], [(BIG, 0.9)], exhaustive=False)]
    with pytest.raises(InputError, match="exhaustive"):
        cgf1(queries)
    result = evaluate_queries(queries, 0.5)
    assert result["cgF1"] is None
    assert result["pmF1"] is None
    assert "exhaustive" in result["cgF1_reason"]
    assert result["AP50"] == pytest.approx(1)


def test_an_empty_detector_gets_zeros_not_gaps():
    queries = [query([BIG]), query(image_id=2, prompt="joint")]
    result = evaluate_queries(queries, 0.5)
    for name in ("AP", "AP50", "AP75", "box_AP", "cgF1", "pmF1", "IL_MCC", "union_iou"):
        assert result[name] == 0
    assert result["max_score_present"] == 0
    sweep = threshold_sweep(queries, [0.0, 0.5])
    assert sweep["count"].tolist() == [0, 0]
    assert sweep["precision"].isna().all()
    assert sweep["recall"].tolist() == [0, 0]
    assert sweep["f1"].tolist() == [0, 0]


def test_everything_below_the_threshold_keeps_its_ap():
    queries = [query([BIG], [(BIG, 0.1)]), query(image_id=2, prompt="joint")]
    result = evaluate_queries(queries, 0.5)
    assert result["AP50"] == pytest.approx(1)
    assert result["cgF1"] == result["union_iou"] == 0
    assert result["max_score_present_share_above"] == 0


def test_nothing_to_find_and_nothing_found():
    assert union_iou([query()], 0.5) is None
    ap = coco_ap([query()])
    assert ap["AP"] is None
    assert ap["reason"]
    sweep = threshold_sweep([query()], [0.5])
    assert sweep["count"].tolist() == [0]
    assert sweep[["precision", "recall", "f1"]].isna().all(axis=None)


def test_an_object_without_pixels_is_never_found():
    nothing = mask(0, 0, 0, 0)
    queries = [query([nothing], [(BIG, 0.9)]), query(prompt="joint")]
    assert cgf1(queries)["recall"] == 0
    assert union_iou(queries, 0.5) is None
    assert evaluate_queries(queries, 0.5)["union_iou_reason"]


def test_nothing_is_printed(capsys):
    evaluate_queries([query([BIG], [(BIG, 0.9)]), query(prompt="joint")], 0.5)
    assert capsys.readouterr() == ("", "")


# --- unusable input ---------------------------------------------------------------------------

METRICS = {
    "cgf1": cgf1,
    "coco_ap": coco_ap,
    "union_iou": lambda queries: union_iou(queries, 0.5),
    "threshold_sweep": lambda queries: threshold_sweep(queries, [0.5]),
    "evaluate_queries": lambda queries: evaluate_queries(queries, 0.5),
}
BROKEN = {
    "no queries": ([], "no query"),
    "nan score": ([query([BIG], [(BIG, float("nan"))])], "score is nan"),
    "nan max score": ([query([BIG], max_score=float("nan"))], "max_score is nan"),
    "a logit": ([query([BIG], [(BIG, -3.0)])], r"score is -3\.0"),
    "no score": ([query([BIG]) | {"pred": [{"rle": BIG}]}], "score is None"),
    "no mask": ([query([BIG]) | {"pred": [{"score": 0.5}]}], "not a COCO compressed RLE"),
    "another size": ([query([BIG]) | {"height": 21}], r"\[21, 20\]"),
    "a polygon": ([query([[0, 0, 5, 0, 5, 5]])], "not a COCO compressed RLE"),
    "uncompressed": ([query([{"size": [20, 20], "counts": [400]}])], "compressed RLE"),
    "missing key": ([{"image_id": 1, "prompt": "crack"}], r"missing \['height'"),
    "contradiction": ([query([BIG], is_positive=False)], "is_positive is False with 1 objects"),
    "boxes missing": ([query([BIG], gt_boxes_xyxy=[])], "0 gt_boxes_xyxy for 1 objects"),
    "a box of text": ([query([BIG], gt_boxes_xyxy=[["0", 0, 1, 1]])], "a box is"),
    "no box": ([query([BIG], gt_boxes_xyxy=[7])], "a box is 7"),
    "nan box": ([query([BIG], gt_boxes_xyxy=[[0, 0, math.nan, 1]])], "a box is"),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", BROKEN)
def test_unusable_queries_are_refused(metric, name):
    queries, words = BROKEN[name]
    with pytest.raises(InputError, match=words):
        METRICS[metric](queries)


def test_the_message_names_picture_and_prompt():
    queries = [query(), query([BIG], [(BIG, math.nan)], image_id="wall.jpg", prompt="joint")]
    with pytest.raises(InputError, match=r"query 1 \('joint' on image 'wall\.jpg'\)"):
        cgf1(queries)


def test_a_prompt_twice_on_one_picture_is_refused():
    with pytest.raises(InputError, match="'crack' occurs twice on image 1"):
        coco_ap([query([BIG]), query([APART])])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, None, "0.5"])
def test_impossible_thresholds_are_refused(threshold):
    queries = [query([BIG], [(BIG, 0.9)]), query(prompt="joint")]
    for call in (cgf1, union_iou, evaluate_queries):
        with pytest.raises(InputError, match="score_threshold is"):
            call(queries, threshold)
    with pytest.raises(InputError, match="threshold is"):
        threshold_sweep(queries, [0.5, threshold])


def test_an_unknown_iou_type_is_refused():
    with pytest.raises(InputError, match="unknown iou_type 'mask'"):
        coco_ap([query([BIG])], "mask")
