"""Self-tests of scores, thresholds, masks and metrics, as they are in this process.

Every question has an answer that can be written down beforehand: no model is involved.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from helpers import detections, evaluation, prediction, prediction_queries
from helpers.records import ImageRecord, ObjectAnnotation, Split

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_HEIGHT, _WIDTH, _GRID = 48, 64, 12
_QUERIES = 3
_SURE = 8.0
_PICTURES = {
    "a": {"crack": [(2, 2, 20, 10), (30, 30, 24, 12)], "joint": [(40, 2, 20, 20)]},
    "b": {"crack": [(8, 20, 30, 24)], "joint": []},
}
"""Boxes ``(x, y, width, height)`` in pixels of two pictures, by prompt; 'joint' is absent in b."""


def score_answer():
    """Compare scores with the product of query and presence probability.

    Returns
    -------
    scores, expected, query_prob : numpy.ndarray
        (4,) what the code says, what it should say, and the query probability alone.
    """
    logits, presence = np.array([2.0, 0.5, -1.0, -6.0], np.float32), -0.8
    query_prob = 1 / (1 + np.exp(-logits))
    raw = _raw(logits, presence)
    return np.asarray(raw.scores), query_prob / (1 + np.exp(-presence)), query_prob


def threshold_answer():
    """Ask for detections at several thresholds, through the function that a user calls.

    Returns
    -------
    dict of float to tuple of int
        Threshold to (detections returned, scores above it).
    """
    scores = np.linspace(0.05, 0.95, 10)
    raw = _raw(np.log(scores / (1 - scores)).astype(np.float32), 30.0)
    predictor = _Answered(raw)
    picture = Image.new("RGB", (_WIDTH, _HEIGHT))
    return {
        threshold: (
            len(predictor.predict(picture, "crack", threshold)[0].detections),
            int((scores > threshold).sum()),
        )
        for threshold in THRESHOLDS
    }


def mask_answers():
    """Ask for masks whose size and area are known.

    Returns
    -------
    list of tuple
        ``(question, answer, expected)``, as text, number or tuple.
    """
    answers = []
    levels = np.array([-3.0, 0.3, 0.7, 3.0], np.float32)
    constant = np.ones((1, _GRID, _GRID), np.float32) * levels[:, None, None]
    for threshold in (0.3, 0.5, 0.8):
        masks = detections.masks_at_image_size(constant, _HEIGHT, _WIDTH, threshold)
        expected = [float(level) for level in 1 / (1 + np.exp(-levels)) > threshold]
        question = f"share of set pixels at logits {levels.tolist()} and threshold {threshold}"
        answers.append((question, [float(mask.mean()) for mask in masks], expected))
    answers.append(("size of a mask", tuple(masks.shape[1:]), (_HEIGHT, _WIDTH)))
    half = np.full((1, _GRID, _GRID), -_SURE, np.float32)
    half[:, :, : _GRID // 2] = _SURE
    raw = _raw(np.array([_SURE], np.float32), _SURE, mask_logits=half)
    rle = detections.detect(raw, 0.5)[0]["mask_rle"]
    answers.append(("size of a detected mask", tuple(rle["size"]), (_HEIGHT, _WIDTH)))
    area = int(coco_mask.area(rle))
    answers.append(("area of a mask of one half", area, _HEIGHT * _WIDTH // 2))
    return answers


def evaluation_answers():
    """Evaluate the truth, the truth given to the wrong questions, and a false alarm.

    Returns
    -------
    dict of str to dict
        ``truth``, ``shifted`` and ``false alarm`` to the metrics of
        `helpers.evaluation.evaluate_queries`. Expected are ``AP`` 1 and ``cgF1`` 1 for the truth,
        ``AP50`` near 0 when answers are moved to the next question, and ``cgF1`` below 1 when an
        absent prompt is answered; there are 3 present prompts and 1 absent one.
    """
    batch, dataset, outputs = _evaluation_case()
    moved = {name: tensor.roll(1, dims=0) for name, tensor in outputs.items()}
    alarmed = {name: tensor.clone() for name, tensor in outputs.items()}
    alarmed["pred_logits"][-1, 0] = alarmed["presence_logits"][-1] = _SURE
    cases = {"truth": outputs, "shifted": moved, "false alarm": alarmed}
    return {
        name: evaluation.evaluate_queries(
            prediction_queries.queries_from_outputs(case, batch["queries"], dataset, 0.5), 0.5
        )
        for name, case in cases.items()
    }


class _Answered(prediction.Predictor):
    """A predictor that has its answer already."""

    def __init__(self, raw):
        self.answer = raw

    def raw(self, image, prompts, name=None):
        """Return the answer whatever is asked."""
        return [self.answer]


def _raw(query_logits, presence_logit, mask_logits=None):
    """Build a raw prediction of n queries on one picture."""
    n = len(query_logits)
    if mask_logits is None:
        mask_logits = np.full((n, _GRID, _GRID), _SURE, np.float32)
    return detections.RawPrediction(
        image="self-test",
        prompt="crack",
        height=_HEIGHT,
        width=_WIDTH,
        query_logits=query_logits,
        presence_logit=presence_logit,
        boxes_xyxy=np.tile(np.array([0, 0, _WIDTH, _HEIGHT], np.float32), (n, 1)),
        mask_logits=mask_logits,
        semantic_logits=mask_logits[0],
    )


def _evaluation_case():
    """Return the questions of `_PICTURES`, a stand-in of their dataset, and perfect outputs."""
    questions = [(name, prompt) for name, shown in _PICTURES.items() for prompt in shown]
    rows = len(questions)
    outputs = {
        "pred_logits": torch.full((rows, _QUERIES), -_SURE),
        "presence_logits": torch.full((rows, 1), -_SURE),
        "pred_boxes": torch.zeros(rows, _QUERIES, 4),
        "pred_masks": torch.full((rows, _QUERIES, _HEIGHT, _WIDTH), -_SURE),
        "semantic_logits": torch.full((rows, 1, _HEIGHT, _WIDTH), -_SURE),
    }
    for row, (name, prompt) in enumerate(questions):
        for query, (x, y, width, height) in enumerate(_PICTURES[name][prompt]):
            outputs["pred_logits"][row, query] = outputs["presence_logits"][row] = _SURE
            box = torch.tensor([x, y, x + width, y + height], dtype=torch.float32)
            outputs["pred_boxes"][row, query] = box / torch.tensor([_WIDTH, _HEIGHT] * 2)
            outputs["pred_masks"][row, query, y : y + height, x : x + width] = _SURE
    batch = {"queries": [{"image_id": name, "prompt": prompt} for name, prompt in questions]}
    records = tuple(_record(name, shown) for name, shown in _PICTURES.items())
    split = Split("self-test", Path(), "coco", ("crack", "joint"), records)
    return batch, SimpleNamespace(records=records, split=split, prompt=None), outputs


def _record(name, shown):
    """Return the record of one of `_PICTURES`."""
    objects = []
    for prompt, boxes in shown.items():
        for x, y, width, height in boxes:
            mask = np.zeros((_HEIGHT, _WIDTH), np.uint8, order="F")
            mask[y : y + height, x : x + width] = 1
            rle = coco_mask.encode(mask)
            rle = {"size": [_HEIGHT, _WIDTH], "counts": rle["counts"].decode("ascii")}
            objects.append(ObjectAnnotation(prompt, (x, y, x + width, y + height), rle))
    return ImageRecord(name, Path(name), _WIDTH, _HEIGHT, tuple(objects))
