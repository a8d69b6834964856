"""Detection metrics of prompts on pictures: cgF1, AP, union IoU, threshold sweep, summary.

Pure numbers, no model. `helpers.evaluation_queries` says what a query is. A metric that has no
meaning on the given queries is None here, with its reason; only `cgf1` itself keeps to the native
numbers (0 and -1) there.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pandas as pd
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.detect.queries import check_queries, mask_ious, matched_ious, scores
from helpers.errors import InputError, check_probability

NO_PRESENT_PROMPT = "no present prompt: no query has an object"


def coco_ap(queries, iou_type="segm"):
    """Compute COCO average precision with pycocotools' defaults.

    Every prompt is a category and ``image_id`` the picture, so a detection of an absent prompt
    costs precision only when that prompt is present on another picture (COCO leaves out
    categories without an object).

    Parameters
    ----------
    queries : list of dict
        See `helpers.detect.queries`. Give all scores, not only those above a threshold. The
        100 best detections of each query count.
    iou_type : {"segm", "bbox"}
        Masks or boxes. Boxes that a query does not give are those around its masks.

    Returns
    -------
    dict
        ``AP`` (mean over IoU 0.50:0.95), ``AP50``, ``AP75``, in [0, 1]. When no query has an
        object they are None and a fourth key, ``reason``, says so.

    Raises
    ------
    InputError
        For another `iou_type`, a prompt that occurs twice on one picture, and whatever
        `helpers.detect.queries.check_queries` refuses.
    """
    if iou_type not in ("segm", "bbox"):
        raise InputError(f"unknown iou_type {iou_type!r}", fix="use 'segm' or 'bbox'")
    check_queries(queries)
    pairs = [(query["image_id"], query["prompt"]) for query in queries]
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise InputError(
            f"prompt {twice[1]!r} occurs twice on image {twice[0]!r}",
            where="queries",
            fix="merge the objects of one prompt on one picture into one query",
        )
    if not any(query["gt"] for query in queries):
        return {"AP": None, "AP50": None, "AP75": None, "reason": NO_PRESENT_PROMPT}
    gt, pred = _coco_pair(queries)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(gt, pred, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = ("AP", "AP50", "AP75")
    return {name: float(evaluator.stats[index]) for index, name in enumerate(names)}


def _coco_pair(queries):
    """Build the COCO data sets of the objects and of the detections."""
    image_ids = _numbered(query["image_id"] for query in queries)
    category_ids = _numbered(query["prompt"] for query in queries)
    gt, pred = [], []
    for query in queries:
        ids = {
            "image_id": image_ids[query["image_id"]],
            "category_id": category_ids[query["prompt"]],
            "iscrowd": 0,
        }
        boxes = query.get("gt_boxes_xyxy")
        for index, rle in enumerate(query["gt"]):
            box = None if boxes is None else boxes[index]
            gt.append(ids | _shape(rle, box) | {"id": len(gt) + 1})
        for one in query["pred"]:
            shape = _shape(one["rle"], one.get("box_xyxy"))
            pred.append(ids | shape | {"id": len(pred) + 1, "score": one["score"]})
    images = [
        {"id": image_ids[query["image_id"]], "height": query["height"], "width": query["width"]}
        for query in queries
    ]
    return _dataset(gt, images, category_ids), _dataset(pred, images, category_ids)


def _numbered(values):
    """Give each distinct value a number from 1, in order of appearance."""
    return {value: number for number, value in enumerate(dict.fromkeys(values), start=1)}


def _shape(rle, box_xyxy):
    """Describe mask and box as COCO does: RLE, x y w h in pixels, area in pixels."""
    if box_xyxy is None:
        box_xywh = mask_utils.toBbox(rle).tolist()
    else:
        left, top, right, bottom = (float(value) for value in box_xyxy)
        box_xywh = [left, top, right - left, bottom - top]
    return {"segmentation": rle, "bbox": box_xywh, "area": float(mask_utils.area(rle))}


def _dataset(annotations, images, category_ids):
    """Index annotations as pycocotools wants them."""
    coco = COCO()
    coco.dataset = {
        "images": images,
        "categories": [{"id": number} for number in category_ids.values()],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


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
        See `helpers.detect.queries`; those that are not exhaustive are skipped.
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
        `helpers.detect.queries.check_queries` refuses.

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
        See `helpers.detect.queries`.

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


def union_iou(queries, score_threshold):
    """Compute the IoU of all detected pixels with all true pixels.

    Parameters
    ----------
    queries : list of dict
        See `helpers.detect.queries`. Per query the masks are united; intersections and
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
        See `helpers.detect.queries`. All count: detections of absent prompts are wrong.
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
        See `helpers.detect.queries`.
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
