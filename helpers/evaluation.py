"""Detection metrics of prompts on pictures: cgF1, AP, union IoU, threshold sweep, summary.

Pure numbers, no model. `helpers.evaluation_queries` says what a query is. A metric that has no
meaning on the given queries is None here, with its reason; only `cgf1` itself keeps to the native
numbers (0 and -1) there.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from pycocotools import mask as mask_utils

from helpers.coco_ap import coco_ap
from helpers.concept_f1 import NO_ABSENT_PROMPT, NO_EXHAUSTIVE_QUERY, cgf1, undefined_cgf1
from helpers.errors import InputError
from helpers.evaluation_queries import (
    check_probability,
    check_queries,
    mask_ious,
    matched_ious,
    scores,
)

__all__ = [
    "cgf1",
    "coco_ap",
    "evaluate_queries",
    "threshold_sweep",
    "undefined_cgf1",
    "union_iou",
]


def union_iou(queries, score_threshold):
    """Compute the IoU of all detected pixels with all true pixels.

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`. Per query the masks are united; intersections and
        unions are then summed over all queries, so pixels found for an absent prompt are wrong.
    score_threshold : float
        In [0, 1].

    Returns
    -------
    float or None
        In [0, 1]; None when no object has a pixel.
    """
    check_queries(queries)
    check_probability(score_threshold, "score_threshold")
    true = found = either = 0
    for query in queries:
        kept = [one["rle"] for one in query["pred"] if one["score"] >= score_threshold]
        true += _united_area(query["gt"])
        found += _united_area(kept)
        either += _united_area(query["gt"] + kept)
    return (true + found - either) / either if true else None


def threshold_sweep(queries, thresholds, iou_threshold=0.5):
    """Count detections and compute precision and recall over score thresholds.

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`. All count: detections of absent prompts are wrong.
    thresholds : sequence of float
        Score thresholds in [0, 1].
    iou_threshold : float
        Mask IoU in (0, 1] from which a matched pair is a hit.

    Returns
    -------
    pandas.DataFrame
        One row per threshold: ``threshold``, ``count`` (detections), ``precision`` (NaN without
        a detection), ``recall`` (NaN without an object), ``f1`` = 2 hits / (detections +
        objects) (NaN without either).
    """
    check_queries(queries)
    check_probability(iou_threshold, "iou_threshold")
    if iou_threshold == 0:
        raise InputError("iou_threshold is 0", fix="give an IoU above 0, for example 0.5")
    num_gt = sum(len(query["gt"]) for query in queries)
    overlaps = [(scores(query), mask_ious(query)) for query in queries]
    rows = []
    for threshold in thresholds:
        check_probability(threshold, "threshold")
        count = hits = 0
        for score, ious in overlaps:
            kept = score >= threshold
            count += int(kept.sum())
            hits += int((matched_ious(ious[kept]) >= iou_threshold).sum())
        rows.append(
            {
                "threshold": float(threshold),
                "count": count,
                "precision": hits / count if count else np.nan,
                "recall": hits / num_gt if num_gt else np.nan,
                "f1": 2 * hits / (count + num_gt) if count + num_gt else np.nan,
            }
        )
    return pd.DataFrame(rows, columns=["threshold", "count", "precision", "recall", "f1"])


def evaluate_queries(queries, score_threshold):
    """Compute the numbers that a report shows.

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`.
    score_threshold : float
        In [0, 1], for everything but AP.

    Returns
    -------
    dict
        ``AP``, ``AP50``, ``AP75`` (masks), ``box_AP``, ``box_AP50``, ``box_AP75``, ``cgF1``,
        ``pmF1`` (positive_micro_F1), ``IL_MCC``, ``union_iou``; ``max_score_present`` and
        ``max_score_absent``, means over the queries with and without objects of their highest
        score, and ``max_score_present_share_above``, ``max_score_absent_share_above``, the share
        of those queries whose highest score is at least the threshold; ``num_present``,
        ``num_absent``, ``score_threshold``.

        A metric without meaning is None, and the reason stands under its name with ``_reason``:
        ``AP_reason``, ``box_AP_reason`` (also for AP50 and AP75), ``cgF1_reason`` (also for
        IL_MCC), ``pmF1_reason``, ``union_iou_reason``, ``max_score_present_reason``,
        ``max_score_absent_reason``.
    """
    check_queries(queries)
    check_probability(score_threshold, "score_threshold")
    present = [query for query in queries if query["gt"]]
    absent = [query for query in queries if not query["gt"]]
    result = {
        "score_threshold": float(score_threshold),
        "num_present": len(present),
        "num_absent": len(absent),
    }
    for prefix, iou_type in (("", "segm"), ("box_", "bbox")):
        ap = coco_ap(queries, iou_type)
        ap["AP_reason"] = ap.pop("reason", None)
        result |= {prefix + name: value for name, value in ap.items()}
    result |= _meaningful_cgf1(queries, score_threshold)
    result["union_iou"] = union_iou(queries, score_threshold)
    result["union_iou_reason"] = "no object has a pixel" if result["union_iou"] is None else None
    for presence, group in (("present", present), ("absent", absent)):
        name = f"max_score_{presence}"
        highest = np.array([_max_score(query) for query in group])
        result[name] = float(highest.mean()) if group else None
        share_above = float((highest >= score_threshold).mean()) if group else None
        result[f"{name}_share_above"] = share_above
        result[f"{name}_reason"] = None if group else f"there is no {presence} prompt"
    return {k: v for k, v in result.items() if v is not None or not k.endswith("_reason")}


def _meaningful_cgf1(queries, score_threshold):
    """Compute cgF1, IL_MCC and pmF1, each None with a reason where it has no meaning."""
    cgf1_reason = undefined_cgf1(queries)
    pmf1_reason = None if cgf1_reason == NO_ABSENT_PROMPT else cgf1_reason
    native = {} if cgf1_reason == NO_EXHAUSTIVE_QUERY else cgf1(queries, score_threshold)
    return {
        "cgF1": None if cgf1_reason else native["cgF1"],
        "IL_MCC": None if cgf1_reason else native["IL_MCC"],
        "cgF1_reason": cgf1_reason,
        "pmF1": None if pmf1_reason else native["positive_micro_F1"],
        "pmF1_reason": pmf1_reason,
    }


def _united_area(rles):
    """Count the pixels of the union of masks."""
    return int(mask_utils.area(mask_utils.merge(rles))) if rles else 0


def _max_score(query):
    """Take a query's ``max_score``, else its best detection's score, else 0."""
    return query.get("max_score", max((one["score"] for one in query["pred"]), default=0.0))
