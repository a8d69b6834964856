"""cgF1, the metric of SAM3: does a prompt find its objects, and only where they are.

``cgF1 = positive_micro_F1 * IL_MCC``: how well masks fit on the queries that have objects, times
the correlation (Matthews) between "has a detection" and "has an object" over all queries.
"""

from __future__ import annotations

import numpy as np

from helpers.coco_ap import NO_PRESENT_PROMPT
from helpers.errors import InputError
from helpers.evaluation_queries import (
    check_probability,
    check_queries,
    mask_ious,
    matched_ious,
    scores,
)

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
SINGLE_IOU_THRESHOLDS = {"@0.5": 0, "@0.75": 5}
NO_ABSENT_PROMPT = (
    "no absent prompt: when every prompt is in its picture, IL_MCC and cgF1 are 0 whatever the "
    "detections are; add queries of prompts that are not in the picture"
)
NO_EXHAUSTIVE_QUERY = "no query is exhaustive, and cgF1 skips those that are not"
_INSTANCE_EPSILON = 1e-4
_IMAGE_EPSILON = 1e-6


def cgf1(queries, score_threshold=0.5):
    """Compute cgF1 and its parts, equal to the numbers of Meta's ``CGF1Evaluator`` (segm).

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`; those that are not exhaustive are skipped.
    score_threshold : float
        In [0, 1]; detections below it are ignored.

    Returns
    -------
    dict of str to float
        ``cgF1``, ``positive_micro_F1``, ``positive_macro_F1``, ``positive_micro_precision``,
        ``precision``, ``recall``, ``F1``: means over IoU 0.50:0.95, and with ``@0.5`` and
        ``@0.75`` at one IoU. ``IL_MCC``, ``IL_FPR``, ``IL_recall``, ``IL_precision``, ``IL_F1``:
        presence per query, IoU-free. cgF1 and IL_MCC lie in [-1, 1], the rest in [0, 1].

        These are the native numbers also where they have no meaning: without an absent or
        without a present prompt IL_MCC and cgF1 are 0, and positive_macro_F1 is -1 when no query
        has both objects and detections. Ask `undefined_cgf1`, or use `evaluate_queries`, which
        refuses to report them then.

    Raises
    ------
    InputError
        When no query is exhaustive, and for whatever
        `helpers.evaluation_queries.check_queries` refuses.

    Notes
    -----
    Per query one assignment makes the summed mask IoU greatest; a pair is a hit at every IoU
    threshold it reaches. ``positive_micro_F1`` counts false positives only on queries with
    objects. ``cgF1 = positive_micro_F1 * IL_MCC``. Source: facebookresearch/sam3 at 99d02f2,
    ``sam3/eval/cgf1_eval.py``.
    """
    check_queries(queries)
    check_probability(score_threshold, "score_threshold")
    exhaustive = [query for query in queries if query.get("exhaustive", True)]
    if not exhaustive:
        raise InputError(NO_EXHAUSTIVE_QUERY, where="queries")
    kept = [scores(query) >= score_threshold for query in exhaustive]
    matched = [matched_ious(mask_ious(q)[k]) for q, k in zip(exhaustive, kept, strict=True)]
    num_gt = np.array([len(query["gt"]) for query in exhaustive])
    num_pred = np.array([int(k.sum()) for k in kept])
    hits = np.stack([(ious[:, None] >= IOU_THRESHOLDS).sum(0) for ious in matched])

    image_level = _image_level(num_gt > 0, num_pred > 0)
    curves = _instance_level(num_gt, num_pred, hits)
    curves["cgF1"] = curves["positive_micro_F1"] * image_level["IL_MCC"]
    result = {name: float(curve.mean()) for name, curve in curves.items()} | image_level
    for suffix, index in SINGLE_IOU_THRESHOLDS.items():
        result |= {name + suffix: float(curve[index]) for name, curve in curves.items()}
    return result


def undefined_cgf1(queries):
    """Tell why cgF1 and IL_MCC of these queries would have no meaning.

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`.

    Returns
    -------
    str or None
        The reason, or None when exhaustive queries with and without objects are there.
    """
    present = {bool(query["gt"]) for query in queries if query.get("exhaustive", True)}
    if not present:
        return NO_EXHAUSTIVE_QUERY
    if False not in present:
        return NO_ABSENT_PROMPT
    return None if True in present else NO_PRESENT_PROMPT


def _image_level(is_present, is_detected):
    """Compute how well the presence of a detection tells the presence of an object."""
    tp = float((is_present & is_detected).sum())
    fp = float((~is_present & is_detected).sum())
    fn = float((is_present & ~is_detected).sum())
    tn = float((~is_present & ~is_detected).sum())
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    precision = tp / (tp + fp + _IMAGE_EPSILON)
    recall = tp / (tp + fn + _IMAGE_EPSILON)
    return {
        "IL_MCC": (tp * tn - fp * fn) / (root + _IMAGE_EPSILON),
        "IL_FPR": fp / (fp + tn + _IMAGE_EPSILON),
        "IL_recall": recall,
        "IL_precision": precision,
        "IL_F1": 2 * precision * recall / (precision + recall + _IMAGE_EPSILON),
    }


def _instance_level(num_gt, num_pred, hits):
    """Compute precision, recall and F1 at each IoU threshold; `hits` is (queries, thresholds)."""
    is_present = num_gt > 0
    both = is_present & (num_pred > 0)
    total_hits, total_gt = hits.sum(0), num_gt.sum()
    precision, recall, f1 = _f1(total_hits, num_pred.sum(), total_gt)
    positive_precision, _, positive_f1 = _f1(total_hits, num_pred[is_present].sum(), total_gt)
    macro = np.full(len(IOU_THRESHOLDS), -1.0)
    if both.any():
        macro = _f1(hits[both], num_pred[both, None], num_gt[both, None])[2].mean(0)
    return {
        "positive_micro_F1": positive_f1,
        "positive_macro_F1": macro,
        "positive_micro_precision": positive_precision,
        "precision": precision,
        "recall": recall,
        "F1": f1,
    }


def _f1(hits, num_pred, num_gt):
    """Compute smoothed precision, recall and F1 from counts."""
    precision = hits / (num_pred + _INSTANCE_EPSILON)
    recall = hits / (num_gt + _INSTANCE_EPSILON)
    return precision, recall, 2 * precision * recall / (precision + recall + _INSTANCE_EPSILON)
