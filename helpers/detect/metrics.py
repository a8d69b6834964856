"""Metrics of queries: cgF1, AP, union IoU, threshold sweep, and the summary of a report."""

import numpy as np
import pandas as pd
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from helpers.data.masks import rle_box_xyxy
from helpers.detect.detections import reaches
from helpers.detect.queries import as_query_list
from helpers.errors import InputError, check_probability

NO_PRESENT_PROMPT = "no present prompt: no query has an object"
NO_ABSENT_PROMPT = (
    "no absent prompt: when every prompt is in its picture, IL_MCC and cgF1 are 0 whatever the "
    "detections are; add queries of prompts that are not in the picture"
)
NO_EXHAUSTIVE_QUERY = "no query is exhaustive, and cgF1 skips those that are not"
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
SINGLE_IOU_THRESHOLDS = {"@0.5": 0, "@0.75": 5}
_INSTANCE_EPSILON = 1e-4
_IMAGE_EPSILON = 1e-6


def coco_ap(queries, iou_type="segm"):
    """Compute COCO average precision with faster-coco-eval, equal to pycocotools' numbers.

    Every prompt is a category, so a detection of an absent prompt costs precision only when that
    prompt is present on another picture. The 100 best detections of each query count. Returns a
    dict of ``AP`` (mean over IoU 0.50:0.95), ``AP50``, ``AP75``, None with a ``reason`` where no
    query has an object.
    """
    if iou_type not in ("segm", "bbox"):
        raise InputError(f"unknown iou_type {iou_type!r}", fix="use 'segm' or 'bbox'")
    return _average_precisions(as_query_list(queries), (iou_type,))[0]


def _average_precisions(queries, iou_types):
    """Compute what `coco_ap` returns for each of some IoU types."""
    pairs = [(query.image_id, query.prompt) for query in queries]
    if len(set(pairs)) < len(pairs):
        image_id, prompt = next(pair for pair in pairs if pairs.count(pair) > 1)
        message = f"prompt {prompt!r} occurs twice on image {image_id!r}"
        fix = "merge the objects of one prompt on one picture into one query"
        raise InputError(message, where="queries", fix=fix)
    if not any(query.gt for query in queries):
        undefined = {"AP": None, "AP50": None, "AP75": None, "reason": NO_PRESENT_PROMPT}
        return [dict(undefined) for _ in iou_types]
    datasets = _coco_datasets(queries)
    results = []
    for iou_type in iou_types:
        evaluator = COCOeval_faster(*datasets, iou_type)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
        precision = evaluator.eval["precision"][..., 0, -1]  # (IoU, recall, category)
        curves = {"AP": precision, "AP50": precision[0], "AP75": precision[5]}
        results.append({name: float(curve[curve > -1].mean()) for name, curve in curves.items()})
    return results


def _coco_datasets(queries):
    """Write objects and detections as two COCO data sets, with boxes as x y w h in pixels."""
    image_ids = _numbered(query.image_id for query in queries)
    category_ids = _numbered(query.prompt for query in queries)
    objects, detections = [], []
    for query in queries:
        ids = {"image_id": image_ids[query.image_id], "category_id": category_ids[query.prompt]}
        boxes = [None] * len(query.gt) if query.gt_boxes_xyxy is None else query.gt_boxes_xyxy
        gt = [{"rle": r, "box_xyxy": box} for r, box in zip(query.gt, boxes, strict=True)]
        for items, entries in ((gt, objects), (query.pred, detections)):
            for item in items:
                box_xyxy = item.get("box_xyxy")
                box_xyxy = rle_box_xyxy(item["rle"]) if box_xyxy is None else map(float, box_xyxy)
                x0, y0, x1, y1 = box_xyxy
                entry = {"id": len(entries) + 1, "segmentation": item["rle"], **ids}
                entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
                # The range "all", the only one that is evaluated, holds any area.
                entries.append(entry | {"area": 1.0, "score": float(item.get("score", 1))})
    size = {image_ids[query.image_id]: (query.height, query.width) for query in queries}
    images = [{"id": number, "height": h, "width": w} for number, (h, w) in size.items()]
    categories = [{"id": number} for number in category_ids.values()]
    return [
        COCO({"images": images, "categories": categories, "annotations": annotations})
        for annotations in (objects, detections)
    ]


def _numbered(values):
    """Give each distinct value a number from 1, in order of appearance."""
    return {value: number for number, value in enumerate(dict.fromkeys(values), start=1)}


def cgf1(queries, score_threshold=0.5):
    """Compute cgF1 and its parts, equal to the numbers of Meta's ``CGF1Evaluator`` (segm).

    Parameters
    ----------
    queries : list of Query or of dict
        Those that are not exhaustive are skipped; InputError if none is left.
    score_threshold : float
        In [0, 1]; detections below it are ignored.

    Returns
    -------
    dict of str to float
        ``cgF1 = positive_micro_F1 * IL_MCC``, ``positive_micro_F1``, ``positive_macro_F1``,
        ``positive_micro_precision``, ``precision``, ``recall``, ``F1``: means over IoU 0.50:0.95,
        and with ``@0.5`` and ``@0.75`` at one IoU. ``IL_MCC``, ``IL_FPR``, ``IL_recall``,
        ``IL_precision``, ``IL_F1``: presence per query. The native numbers also where they have no
        meaning (0 or -1), which `evaluate_queries` refuses to report.
    """
    # Per query one assignment makes the summed mask IoU greatest; a pair is a hit at every threshold
    # it reaches. Source: ``sam3/eval/cgf1_eval.py`` of facebookresearch/sam3 at 99d02f2.
    queries = as_query_list(queries)
    check_probability(score_threshold, "score_threshold")
    exhaustive = [query for query in queries if query.exhaustive]
    if not exhaustive:
        raise InputError(NO_EXHAUSTIVE_QUERY, where="queries")
    rles = [query.rles(score_threshold) for query in exhaustive]
    ious = [_matched(mask_ious(r, q.gt)) for r, q in zip(rles, exhaustive, strict=True)]
    num_gt = np.array([len(query.gt) for query in exhaustive])
    num_pred = np.array([len(r) for r in rles])
    hits = np.stack([(iou[:, None] >= IOU_THRESHOLDS).sum(0) for iou in ious])

    image_level = _image_level(num_gt > 0, num_pred > 0)
    curves = _instance_level(num_gt, num_pred, hits)
    curves["cgF1"] = curves["positive_micro_F1"] * image_level["IL_MCC"]
    result = {name: float(curve.mean()) for name, curve in curves.items()} | image_level
    for suffix, index in SINGLE_IOU_THRESHOLDS.items():
        result |= {name + suffix: float(curve[index]) for name, curve in curves.items()}
    return result


def mask_ious(rles, gt, is_crowd=False):
    """Compute the IoU of every detection with every object, (detections, objects) float64."""
    ious = coco_mask.iou(rles, gt, [is_crowd] * len(gt))  # [] where either is empty
    return np.asarray(ious, dtype=np.float64).reshape(len(rles), len(gt))


def _matched(ious):
    """Pair detections with objects so that the summed IoU is greatest: (pairs,) IoU, 0 included."""
    return ious[linear_sum_assignment(ious, maximize=True)]


def undefined_cgf1(queries):
    """Return why cgF1 and IL_MCC of these queries would have no meaning, or None."""
    present = {query.is_positive for query in as_query_list(queries) if query.exhaustive}
    if not present:
        return NO_EXHAUSTIVE_QUERY
    if False not in present:
        return NO_ABSENT_PROMPT
    return None if True in present else NO_PRESENT_PROMPT


def _image_level(is_present, is_detected):
    """Compute how well the presence of a detection tells the presence of an object."""
    tn, fp, fn, tp = map(float, np.bincount(2 * is_present + is_detected, minlength=4))
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
    """Compute the IoU in [0, 1] of all detected pixels with all true ones; None without a true one.

    Masks are united per query and summed over queries: pixels of an absent prompt are wrong.
    """
    check_probability(score_threshold, "score_threshold")
    areas = np.zeros(3, dtype=int)  # of what is true, what is detected, and both together
    for query in as_query_list(queries):
        detected = query.rles(score_threshold)
        groups = (query.gt, detected, [*query.gt, *detected])
        areas += [int(coco_mask.area(coco_mask.merge(rles))) for rles in groups]
    true, detected, either = areas.tolist()
    return (true + detected - either) / either if true else None


def threshold_sweep(queries, thresholds):
    """Count detections and compute precision and recall over score thresholds.

    Parameters
    ----------
    queries : sequence of helpers.detect.queries.Query
    thresholds : sequence of float
        Scores in [0, 1].

    Returns
    -------
    pandas.DataFrame
        One row per threshold: ``threshold``, ``count`` (detections, those of absent prompts too),
        ``precision``, ``recall``, ``f1``, a hit from an IoU of 0.5 on; NaN where there is nothing
        to divide by.
    """
    for threshold in thresholds:
        check_probability(threshold, "threshold")
    counts, hits, num_gt = detection_counts(as_query_list(queries), thresholds)
    table = pd.DataFrame({"threshold": np.asarray(thresholds, float), "count": counts.sum(0)})
    hits, objects = hits.sum(0), num_gt.sum()
    table["precision"] = hits / table["count"].where(table["count"] > 0)
    table["recall"] = hits / objects if objects else np.nan
    total = table["count"] + objects
    return table.assign(f1=2 * hits / total.where(total > 0))


def detection_counts(queries, thresholds):
    """Count detections and hits, (queries, thresholds) each, and objects, (queries,)."""
    counts = np.zeros((2, len(queries), len(thresholds)), dtype=int)
    for row, query in enumerate(queries):
        ious, hits = mask_ious(query.rles(), query.gt), {0: 0}
        kept = reaches(query.scores[:, None], thresholds)  # (detections, thresholds)
        for column, count in enumerate(kept.sum(0).tolist()):
            if count not in hits:
                hits[count] = int((_matched(ious[kept[:, column]]) >= IOU_THRESHOLDS[0]).sum())
            counts[:, row, column] = count, hits[count]
    return *counts, np.array([len(query.gt) for query in queries], dtype=int)


def evaluate_queries(queries, score_threshold):
    """Compute the numbers that a report shows.

    Parameters
    ----------
    queries : sequence of helpers.detect.queries.Query
    score_threshold : float
        In [0, 1]; for everything but AP.

    Returns
    -------
    dict
        ``AP``, ``AP50``, ``AP75`` (masks), ``box_AP``, ``box_AP50``, ``box_AP75``, ``cgF1``,
        ``pmF1`` (positive_micro_F1), ``IL_MCC``, ``union_iou``; ``max_score_present`` and
        ``max_score_absent``, means of a query's highest score, each with ``_share_above``, the
        share that reaches the threshold; ``num_present``, ``num_absent``, ``score_threshold``. A
        metric without meaning is None, and the reason stands under its name with ``_reason``.
    """
    queries = as_query_list(queries)
    check_probability(score_threshold, "score_threshold")
    groups = {
        "present": [query for query in queries if query.is_positive],
        "absent": [query for query in queries if not query.is_positive],
    }
    result = {"score_threshold": float(score_threshold)}
    result |= {f"num_{presence}": len(group) for presence, group in groups.items()}
    average_precisions = _average_precisions(queries, ("segm", "bbox"))
    for prefix, ap in zip(("", "box_"), average_precisions, strict=True):
        ap["AP_reason"] = ap.pop("reason", None)
        result |= {prefix + name: value for name, value in ap.items()}
    reason = undefined_cgf1(queries)
    native = {} if reason == NO_EXHAUSTIVE_QUERY else cgf1(queries, score_threshold)
    result |= {name: None if reason else native[name] for name in ("cgF1", "IL_MCC")}
    result["cgF1_reason"] = reason
    reason = None if reason == NO_ABSENT_PROMPT else reason
    result |= {"pmF1": None if reason else native["positive_micro_F1"], "pmF1_reason": reason}
    result["union_iou"] = union_iou(queries, score_threshold)
    result["union_iou_reason"] = "no object has a pixel" if result["union_iou"] is None else None
    for presence, group in groups.items():
        name = f"max_score_{presence}"
        highest = np.array([query.highest_score for query in group])
        result[name] = float(highest.mean()) if group else None
        above = reaches(highest, score_threshold)
        result[f"{name}_share_above"] = float(above.mean()) if group else None
        result[f"{name}_reason"] = None if group else f"there is no {presence} prompt"
    return {k: v for k, v in result.items() if v is not None or not k.endswith("_reason")}
