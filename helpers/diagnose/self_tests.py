"""Self-tests of scores, thresholds, masks and metrics, as they are in this process.

Every question has an answer that can be written down beforehand: no model is involved.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.data.records import ImageRecord, ObjectAnnotation, Split
from helpers.detect import detections
from helpers.detect import metrics as evaluation
from helpers.detect import predictor as prediction
from helpers.detect import queries as prediction_queries
from helpers.model import matching
from helpers.train import trainer

PUBLISHED_WEIGHTS = {
    "native": {
        "loss_ce": 20.0,
        "presence_loss": 20.0,
        "loss_bbox": 5.0,
        "loss_giou": 2.0,
        "loss_mask": 200.0,
        "loss_dice": 10.0,
        "loss_semantic_seg": 20.0,
        "loss_semantic_dice": 30.0,
    },
    "early": {
        "loss_ce": 2.0,
        "loss_bbox": 5.0,
        "loss_giou": 2.0,
        "loss_mask": 5.0,
        "loss_dice": 5.0,
    },
}
"""Written out a second time on purpose: a change of `helpers.model.losses.WEIGHTS` has to show."""
LAYER_TERMS = ("loss_ce", "presence_loss", "loss_bbox", "loss_giou")
SCORE_TERMS = ("loss_ce", "presence_loss")
TOLERANCE = 1e-3
"""Relative; float32 against `math` gives less than 1e-5."""
_SIDE, _WIDTH = 8, 0.4
_ROWS, _PRESENT, _QUERIES = 3, 2, 3


class Example(NamedTuple):
    """One prediction: what its logits are and how far its box is off.

    Attributes
    ----------
    matched, others : float
        Query logits of the query at the object, and of all others.
    shift : float
        Of the box, in fractions of the image; the box is 0.4 wide.
    presence : float
        Presence logit in all rows, or, in a right answer, its size: plus where an object is.
    mask : float
        Mask and semantic logits everywhere, or, in a right answer, plus inside and minus outside.
    is_right : bool
        Whether presence and masks are answered right rather than the same everywhere.
    """

    matched: float
    others: float
    shift: float
    presence: float
    mask: float
    is_right: bool = False


FORMULA_EXAMPLES = (Example(1.0, -2.0, 0.1, 0.5, 0.5), Example(-1.5, 0.7, 0.2, -2.0, -1.0))
PERFECT = Example(6.0, -6.0, 0.0, 6.0, 6.0, is_right=True)
WORSE = {
    "a missed object": PERFECT._replace(matched=-4.0),
    "false alarms": PERFECT._replace(others=4.0),
    "a box that is off": PERFECT._replace(shift=0.2),
    "inverted masks": PERFECT._replace(mask=-6.0),
    "a wrong presence": PERFECT._replace(presence=-6.0),
}
_UNSEEN_BY_EARLY = "a wrong presence"


def loss_terms_of(example, variant):
    """Compute the terms of an example the way a training step does.

    Parameters
    ----------
    example : Example
    variant : {"native", "early"}

    Returns
    -------
    dict of str to float
        See `helpers.model.losses.sam3_losses`; one earlier layer, equal to the final one.
    """
    outputs, targets = _tensors(example)
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1),
        config=SimpleNamespace(loss=SimpleNamespace(variant=variant)),
    )
    terms = trainer.Sam3Trainer._terms(stand_in, outputs, targets)
    return {name: float(value) for name, value in terms.items()}


def expected_terms(example, variant):
    """Write down the terms of an example whose logits are constant (``is_right`` False).

    Parameters
    ----------
    example : Example
    variant : {"native", "early"}

    Returns
    -------
    dict of str to float
        The terms of the final layer, unweighted.
    """
    iou = (_WIDTH - example.shift) / (_WIDTH + example.shift)
    soft_target = max(0.01, _sigmoid(example.matched) ** 0.25 * iou**0.75)
    matched = _softplus(example.matched) - soft_target * example.matched
    other = _softplus(example.others)
    if variant == "native":
        others = (_QUERIES - 1) * _sigmoid(example.others) ** 2 * other
        loss_ce = _PRESENT * (10 * matched + others) / (_ROWS * 200)
        yes, no = _softplus(-example.presence), _softplus(example.presence)
        presence = 0.5 * (_PRESENT * yes + (_ROWS - _PRESENT) * no) / _ROWS
    else:
        without_object = (_ROWS - _PRESENT) * _QUERIES * other
        loss_ce = _PRESENT * (0.5 * matched + (_QUERIES - 1) * other) + without_object
        loss_ce, presence = loss_ce / (_ROWS * _QUERIES + 1e-6), 0.0
    dice = _half_dice(example.mask)
    return {
        "loss_ce": loss_ce,
        "presence_loss": presence,
        "loss_bbox": example.shift,
        "loss_giou": 1 - iou,
        "loss_mask": _half_focal(example.mask, 0.25),
        "loss_dice": dice,
        "loss_semantic_seg": _half_focal(example.mask, 0.6),
        "loss_semantic_dice": dice,
    }


def term_ratios(variant):
    """Compare every term with its formula on each of `FORMULA_EXAMPLES`.

    Parameters
    ----------
    variant : {"native", "early"}

    Returns
    -------
    dict of str to list of float
        Computed over expected, per example, for each term and ``total``; 1 is right. One number
        other than 1 in all examples is a wrong factor, different numbers are another function.
        ``total`` is compared with the published weights on the computed terms, so that a wrong
        term does not show twice.
    """
    ratios = {}
    for example in FORMULA_EXAMPLES:
        computed = loss_terms_of(example, variant)
        for name, expected in expected_terms(example, variant).items():
            ratios.setdefault(name, []).append(_ratio(computed.get(name, 0.0), expected))
        total = weighted_total(computed, variant)
        ratios.setdefault("total", []).append(_ratio(computed["total"], total))
    return ratios


def weighted_total(terms, variant):
    """Add up terms with the published weights.

    Parameters
    ----------
    terms : dict of str to float
        ``aux0.loss_ce`` takes the weight of ``loss_ce``; names without a weight are left out.
    variant : {"native", "early"}

    Returns
    -------
    float
    """
    return sum(weighted_terms(terms, variant).values())


def weighted_terms(terms, variant):
    """Multiply terms by their published weights; names without a weight are left out."""
    weights = PUBLISHED_WEIGHTS[variant]
    return {
        name: weights[name.rpartition(".")[2]] * value
        for name, value in terms.items()
        if name.rpartition(".")[2] in weights
    }


def answers_not_worse(variant):
    """List the wrong answers that the loss does not punish.

    Parameters
    ----------
    variant : {"native", "early"}

    Returns
    -------
    list of str
        Names of `WORSE` whose total is not above that of the perfect answer.
    """
    best = loss_terms_of(PERFECT, variant)["total"]
    return [
        name
        for name, example in WORSE.items()
        if loss_terms_of(example, variant)["total"] <= best
        and not (variant == "early" and name == _UNSEEN_BY_EARLY)
    ]


def queries_per_object():
    """Count the queries that the matching gives to each of two objects.

    Returns
    -------
    list of int
        One for each object in a one-to-one matching.
    """
    centres = torch.tensor([0.25, 0.27, 0.73, 0.75, 0.5])
    boxes = torch.stack([centres, centres, torch.full((5,), 0.2), torch.full((5,), 0.2)], dim=1)
    outputs = {"pred_logits": torch.zeros(1, 5), "pred_boxes_cxcywh": boxes[None]}
    target = {"boxes_cxcywh": torch.tensor([[0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2]])}
    ((_, target_idx),) = matching.hungarian_match(outputs, [target])
    return torch.bincount(target_idx, minlength=2).tolist()


def _tensors(example):
    """Return model outputs and targets of an example."""
    inside = torch.zeros(_SIDE, _SIDE)
    inside[:, : _SIDE // 2] = 1
    present = torch.tensor([True] * _PRESENT + [False] * (_ROWS - _PRESENT))
    logits = torch.full((_ROWS, _QUERIES), example.others)
    logits[present, 0] = example.matched
    boxes = torch.tensor([0.1, 0.1, 0.05, 0.05]).repeat(_ROWS, _QUERIES, 1)
    boxes[:, 0] = torch.tensor([0.5 + example.shift, 0.5, _WIDTH, _WIDTH])
    sign = torch.where(present, 1.0, -1.0) if example.is_right else torch.ones(_ROWS)
    pattern = 2 * inside - 1 if example.is_right else torch.ones(_SIDE, _SIDE)
    layer = {
        "pred_logits": logits,
        "pred_boxes_cxcywh": boxes,
        "presence_logits": example.presence * sign[:, None],
    }
    masks = (example.mask * pattern).expand(_ROWS, _QUERIES, _SIDE, _SIDE)
    outputs = layer | {"pred_masks": masks, "semantic_logits": masks[:, :1], "aux": [layer]}
    objects = {
        "boxes_cxcywh": torch.tensor([[0.5, 0.5, _WIDTH, _WIDTH]]),
        "masks": inside[None].to(torch.uint8),
    }
    nothing = {name: value[:0] for name, value in objects.items()}
    return outputs, [objects if here else nothing for here in present.tolist()]


def _half_focal(logit, alpha):
    """Return the focal loss, gamma 2, of one logit everywhere where half of the pixels are set."""
    prob = _sigmoid(logit)
    inside = alpha * (1 - prob) ** 2 * _softplus(-logit)
    return 0.5 * (inside + (1 - alpha) * prob**2 * _softplus(logit))


def _half_dice(logit):
    """Return the dice loss, smoothed by 1, of one logit everywhere where half is set."""
    pixels, prob = _SIDE**2, _sigmoid(logit)
    return 1 - (pixels * prob + 1) / (pixels * prob + pixels / 2 + 1)


def _ratio(computed, expected):
    """Divide; equal numbers give 1, also if both are 0."""
    if computed == expected:
        return 1.0
    return computed / expected if expected else math.inf


def _sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def _softplus(logit):
    return math.log1p(math.exp(logit))


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
        `helpers.detect.metrics.evaluate_queries`. Expected are ``AP`` 1 and ``cgF1`` 1 for the truth,
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
