"""What is wrong with each detection, after the kinds of TIDE, and what that says of the labels."""

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes seconds, when it is first used
import supervision as sv

from helpers.data.masks import rle_box_xyxy
from helpers.detect.detections import reaches
from helpers.detect.metrics import mask_ious

HIT, NEAR = 0.5, 0.1  # IoU of a hit, and from which a detection means an object
KINDS = {
    "right": "an object, once",
    "duplicate": "an object that another detection has",
    "mask": "the right box, another outline",
    "place": "partly an object",
    "wrong word": "an object of another word",
    "background": "no object that is annotated",
    "missed": "an object without a detection",
}


def mistake_table(queries, score_threshold):
    """Name what each kept detection and each missed object is.

    Parameters
    ----------
    queries : sequence of Query
    score_threshold : float
        In [0, 1].

    Returns
    -------
    pandas.DataFrame
        ``image_id``, ``prompt``, ``kind`` (of `KINDS`), ``score`` (of the detection, or the highest
        of any detection near a missed object, else 0), ``iou`` with the nearest object of the word,
        ``box_xyxy`` in pixels. By falling score: a "background" at the top is what the model is
        surest of and nobody has annotated, a "missed" at the bottom what it does not see at all.
    """
    rows, by_image = [], {}
    for query in queries:
        by_image.setdefault(query.image_id, []).append(query)
    for same in by_image.values():
        for query in same:
            others = [rle for other in same if other is not query for rle in other.gt]
            rows += _mistakes_of(query, others, score_threshold)
    names = ["image_id", "prompt", "kind", "score", "iou", "box_xyxy"]
    return pd.DataFrame(rows, columns=names).sort_values("score", ascending=False, kind="stable")


def _mistakes_of(query, others, score_threshold):
    """List the rows of one query; `others` are objects of other words in its picture."""
    order = np.argsort(-query.scores, kind="stable")
    kept = order[reaches(query.scores[order], score_threshold)]
    rles = [detection["rle"] for detection in query.pred]
    ious = mask_ious(rles, query.gt)
    # As in COCO's AP, the best detection takes the nearest free object.
    hits, free = {}, ious.copy()
    for number in kept:
        if free[number].max(initial=0) >= HIT:
            hits[number] = free[number].argmax()
            free[:, hits[number]] = 0
    boxes_xyxy, gt_xyxy = (
        np.array([rle_box_xyxy(rle) for rle in masks]).reshape(-1, 4) for masks in (rles, query.gt)
    )
    box_ious = sv.box_iou_batch(boxes_xyxy, gt_xyxy) if rles and query.gt else ious
    rows = []
    for number in kept:
        iou, box_iou = ious[number].max(initial=0), box_ious[number].max(initial=0)
        if number in hits:
            kind = "right"
        elif iou >= HIT:
            kind = "duplicate"
        elif box_iou >= HIT:
            kind = "mask"
        elif iou >= NEAR:
            kind = "place"
        elif mask_ious([rles[number]], others).max(initial=0) >= HIT:
            kind = "wrong word"
        else:
            kind = "background"
        rows.append((number, kind, query.scores[number], iou, boxes_xyxy[number]))
    for column in set(range(len(query.gt))) - set(hits.values()):
        near = ious[:, column] >= NEAR
        score, iou = query.scores[near].max(initial=0), ious[:, column].max(initial=0)
        rows.append((column, "missed", score, iou, gt_xyxy[column]))
    return [(query.image_id, query.prompt, *row[1:]) for row in rows]


def reliability_table(mistakes, num_bins=10):
    """Compare the score of detections with the share of them that is right.

    Returns a data frame from a `mistake_table`, a row for each bin of scores with a detection: index
    ``scores``, ``count``, ``score`` (mean), ``right`` (share) and its 95 % interval (Wilson) ``low``
    and ``high``, which is wide where the count is small.
    """
    detections = mistakes[mistakes["kind"] != "missed"]
    edges = np.linspace(0, 1, num_bins + 1).round(3)
    bins = pd.cut(detections["score"], edges, include_lowest=True).rename("scores")
    right = (detections["kind"] == "right").groupby(bins, observed=True)
    table = pd.DataFrame({"count": right.size(), "right": right.mean()})
    table.insert(1, "score", detections["score"].groupby(bins, observed=True).mean())
    hits = (table["count"] * table["right"]).round().astype(int)
    intervals = [
        scipy.stats.binomtest(*pair).proportion_ci(method="wilson")
        for pair in zip(hits, table["count"], strict=True)
    ]
    table[["low", "high"]] = [(interval.low, interval.high) for interval in intervals]
    return table


def content_matrix(queries, score_threshold, contents=None):
    """Return the share of pictures on which each word is answered, by what is in the picture.

    A data frame: a row for each word that pictures show, those of `contents` (``image_id`` to words
    that are in it, annotated or not) too, and ``"nothing listed"``; a column for each word that
    was asked. Off the diagonal only pictures without the asked word count, so that every answer is
    a false one; NaN where there is no such picture.
    """
    shown = {image_id: {*words} for image_id, words in (contents or {}).items()}
    for query in queries:
        shown.setdefault(query.image_id, set()).update([query.prompt] * query.is_positive)
    rows = [
        (content, query.prompt, bool(reaches(query.scores, score_threshold).any()))
        for query in queries
        for content in shown[query.image_id] or ["nothing listed"]
        if content == query.prompt or query.prompt not in shown[query.image_id]
    ]
    table = pd.DataFrame(rows, columns=["in the picture", "asked", "answered"])
    return table.pivot_table("answered", "in the picture", "asked")
