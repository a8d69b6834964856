from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from helpers.data.masks import rle_area
from helpers.data.records import ImageRecord, ObjectAnnotation, Split
from helpers.detect.metrics import union_iou
from helpers.detect.predictor import Prediction
from helpers.detect.queries import queries_from_outputs
from helpers.errors import InputError
from notebooks.examples import as_queries, prompt_scores

RLE = {"size": [4, 4], "counts": "02>"}


def query(image_id, prompt, shown, presence, max_query):
    return {
        "image_id": image_id, "prompt": prompt, "height": 4, "width": 4,
        "gt": [RLE] if shown else [], "pred": [], "presence_prob": presence,
        "max_query_prob": max_query, "max_score": presence * max_query,
    }  # fmt: skip


QUERIES = [
    query(1, "crack", True, 1.0, 0.8),
    query(2, "crack", True, 0.5, 0.4),
    query(3, "crack", False, 0.1, 0.9),
    query(1, "dog", False, 0.0, 0.6),
]


def test_prompts_are_kept_apart_by_whether_they_are_shown():
    table = prompt_scores(QUERIES, 0.3)
    assert list(table.index) == [("crack", "present"), ("crack", "absent"), ("dog", "absent")]
    assert table["images"].tolist() == [2, 1, 1]
    shown = table.loc[("crack", "present")]
    assert shown["max score"] == pytest.approx(0.5)  # (0.8 + 0.2) / 2
    assert shown["presence"] == pytest.approx(0.75)
    assert shown["reached"] == 0.5


def test_a_score_at_the_threshold_reaches_it():
    assert prompt_scores(QUERIES, 0.8).loc[("crack", "present"), "reached"] == 0.5


@pytest.mark.parametrize(("queries", "threshold"), [([], 0.3), (QUERIES, 1.5)])
def test_refuses_what_has_no_answer(queries, threshold):
    with pytest.raises(InputError):
        prompt_scores(queries, threshold)


def test_predictions_become_queries_of_their_own_image():
    objects = (ObjectAnnotation("crack", (0, 0, 1, 2), RLE),)
    records = [
        ImageRecord("a", Path("a.png"), 4, 4, ()),
        ImageRecord("b", Path("b.png"), 4, 4, objects),
    ]
    found = [{"score": 0.7, "box_xyxy": [0, 0, 1, 2], "mask_rle": RLE}]
    predictions = [
        Prediction(name, "object", 4, 4, 0.8, 0.9, 0.72, one)
        for name, one in (("b.png", found), ("a.png", []))
    ]
    queries = as_queries(predictions, records)
    assert [query.image_id for query in queries] == ["b", "a"]
    assert [len(query.gt) for query in queries] == [1, 0]
    assert union_iou(queries, 0.5) == 1.0
    assert union_iou(queries, 0.8) == 0.0
    assert prompt_scores(queries, 0.3).loc[("object", "present"), "max score"] == 0.72
    with pytest.raises(InputError, match="no record of this image"):
        as_queries(predictions, records[:1])


def test_both_ways_to_queries_have_one_ground_truth():
    crowd = ObjectAnnotation("crack", (0, 0, 4, 4), RLE, is_crowd=True)
    outside = ObjectAnnotation("crack", (9, 9, 12, 12), RLE)
    without_mask = ObjectAnnotation("crack", (1, 0, 3, 2), None)
    with_mask = ObjectAnnotation("crack", (0, 0, 1, 2), RLE)
    objects = (crowd, outside, without_mask, with_mask)
    record = ImageRecord("a", Path("a.png"), 4, 4, objects)
    [query] = as_queries([Prediction("a.png", "crack", 4, 4, 0.8, 0.9, 0.72, [])], [record])
    split = Split("test", Path(), "coco", ("crack",), (record,))
    dataset = SimpleNamespace(records=(record,), split=split, prompt=None)
    outputs = {
        "pred_logits": torch.zeros(1, 2),
        "presence_logits": torch.zeros(1, 1),
        "pred_boxes": torch.zeros(1, 2, 4),
        "pred_masks": torch.zeros(1, 2, 4, 4),
        "semantic_logits": torch.zeros(1, 1, 4, 4),
    }
    question = {"image_id": "a", "prompt": "crack"}
    [judged] = queries_from_outputs(outputs, [question], dataset, 0.5)
    assert query.gt == judged.gt
    assert query.gt_boxes_xyxy == judged.gt_boxes_xyxy == [(1, 0, 3, 2), (0, 0, 1, 2)]
    np.testing.assert_array_equal(coco_mask.decode(query.gt[0])[:2, 1:3], 1)
    assert rle_area(query.gt[0]) == 4
    assert query.gt[1] == RLE
