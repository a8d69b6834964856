"""What an evaluation query is, its checks, and the assignment of detections to objects.

A *query* is one prompt on one picture, a dict of

- ``image_id`` (int or str), ``prompt`` (str), ``height``, ``width`` (pixels);
- ``gt``: list of COCO compressed RLE, one per object; empty for an absent prompt;
- ``pred``: list of ``{"rle", "score"}``, score in [0, 1], optionally ``"box_xyxy"`` (pixels);
- ``exhaustive`` (bool, default true): whether ``gt`` is known to be complete;
- optionally ``gt_boxes_xyxy`` (pixels, one per object), ``max_score`` (highest score of the
  query before any threshold) and ``is_positive`` (must agree with ``gt``).

A detection counts when its score is at least the threshold.
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
from pycocotools import mask as mask_utils
from scipy.optimize import linear_sum_assignment

from helpers.errors import InputError

_REQUIRED = ("image_id", "prompt", "height", "width", "gt", "pred")


def check_queries(queries):
    """Refuse queries from which a metric would silently come out wrong.

    Parameters
    ----------
    queries : list of dict
        See the module.

    Raises
    ------
    InputError
        For an empty list, missing keys, a mask that is not a compressed RLE of the picture's
        size, a score that is NaN or outside [0, 1], a box that is not four finite numbers,
        numbers of boxes and objects that differ, and ``is_positive`` contradicting ``gt``. The message names picture and prompt.
    """
    if not queries:
        raise InputError("there is no query to evaluate", where="queries")
    for index, query in enumerate(queries):
        if missing := [key for key in _REQUIRED if key not in query]:
            raise InputError(f"missing {missing}", where=f"query {index}")
        where = f"query {index} ({query['prompt']!r} on image {query['image_id']!r})"
        for rle in query["gt"]:
            _check_rle(rle, query, where)
        for pred in query["pred"]:
            _check_rle(pred.get("rle"), query, where)
            check_probability(pred.get("score"), "score", where)
            if pred.get("box_xyxy") is not None:
                _check_box(pred["box_xyxy"], where)
        if "max_score" in query:
            check_probability(query["max_score"], "max_score", where)
        boxes = query.get("gt_boxes_xyxy")
        if boxes is not None and len(boxes) != len(query["gt"]):
            message = f"{len(boxes)} gt_boxes_xyxy for {len(query['gt'])} objects"
            raise InputError(message, where=where)
        for box in () if boxes is None else boxes:
            _check_box(box, where)
        if "is_positive" in query and bool(query["is_positive"]) != bool(query["gt"]):
            message = f"is_positive is {query['is_positive']} with {len(query['gt'])} objects"
            raise InputError(message, where=where, fix="a present prompt has objects in gt")


def check_probability(value, name, where=None):
    """Refuse what is not a number in [0, 1].

    Parameters
    ----------
    value : float
        A score or a threshold.
    name : str
        Its name in the message.
    where : str, optional
        Its place in the message.

    Raises
    ------
    InputError
        When `value` is no number, NaN, or outside [0, 1].
    """
    if not isinstance(value, Real) or not math.isfinite(value) or not 0 <= value <= 1:
        fix = "give a probability in [0, 1]"
        raise InputError(f"{name} is {value!r}", where=where, fix=fix)


def mask_ious(query):
    """Compute the IoU of every detection with every object of one query.

    Parameters
    ----------
    query : dict
        See the module.

    Returns
    -------
    numpy.ndarray
        (detections, objects) float64 in [0, 1].
    """
    gt, pred = query["gt"], [p["rle"] for p in query["pred"]]
    if not gt or not pred:
        return np.zeros((len(pred), len(gt)))
    return np.asarray(mask_utils.iou(pred, gt, [0] * len(gt)))


def matched_ious(ious):
    """Pair detections with objects one to one so that the summed IoU is greatest.

    Parameters
    ----------
    ious : numpy.ndarray
        (detections, objects), from `mask_ious`.

    Returns
    -------
    numpy.ndarray
        (pairs,) IoU of each pair; pairs that do not overlap are among them with 0.
    """
    return ious[linear_sum_assignment(ious, maximize=True)]


def scores(query):
    """List the scores of a query's detections.

    Parameters
    ----------
    query : dict
        See the module.

    Returns
    -------
    numpy.ndarray
        (detections,) float64 in [0, 1].
    """
    return np.array([p["score"] for p in query["pred"]], dtype=np.float64)


def _check_rle(rle, query, where):
    """Refuse a mask that is not a compressed RLE of the query's size."""
    size = [query["height"], query["width"]]
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), (str, bytes)):
        raise InputError(
            "a mask is not a COCO compressed RLE",
            where=where,
            fix="encode it with pycocotools.mask.encode",
        )
    if list(rle.get("size", ())) != size:
        message = f"a mask has size {rle.get('size')}, the picture has {size} (height, width)"
        raise InputError(message, where=where)


def _check_box(box_xyxy, where):
    """Refuse a box that is not four finite numbers."""
    if np.shape(box_xyxy) != (4,) or not np.isfinite(box_xyxy).all():
        raise InputError(f"a box is {box_xyxy!r}", where=where, fix="give x0, y0, x1, y1 in pixels")
