"""The raw outputs of a model on many images as one table, before any threshold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from pycocotools import mask as mask_utils
from scipy.optimize import linear_sum_assignment
from torch.utils.data import DataLoader

from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.data.masks import clip_box
from helpers.data.prompts import present_prompts
from helpers.detect.detections import detect, raw_predictions
from helpers.detect.predictor import Predictor
from helpers.errors import InputError, check_probability
from helpers.model.prompted import base_of, outputs_by_rows

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


SCORE_FLOOR = 1e-3
"""Detections below are dropped; average precision needs the low scores, not the lowest."""
MAX_DETECTIONS = 100
"""Best detections kept per prompt and image, as many as COCO's average precision looks at."""


def evaluation_dataset(
    split, processor, model, *, prompt=None, absent_prompts=(), backbone_cache=None
):
    """Build the questions of an evaluation: every category and every absent noun on every image.

    Parameters
    ----------
    split : helpers.data.records.Split
    processor : transformers.Sam3Processor
    model : helpers.model.sam3.PromptedSam3 or peft.PeftModel
        For its resolution and grid.
    prompt : str, optional
        Replaces every category name.
    absent_prompts : sequence of str
        Nouns asked wherever the picture is not known to show them.
    backbone_cache : helpers.model.cache.BackboneCache, optional
        See `helpers.data.dataset.PromptDataset`.

    Returns
    -------
    helpers.data.dataset.PromptDataset
        The same questions in every epoch.
    """
    return PromptDataset.for_evaluation(
        split,
        base_of(model),
        processor,
        prompt=prompt,
        absent_prompts=absent_prompts,
        backbone_cache=backbone_cache,
    )


def queries_from_outputs(outputs, asked, dataset, mask_threshold):
    """Turn the outputs of one batch, or of some of its rows, into evaluation queries.

    Parameters
    ----------
    outputs : helpers.model.sam3.PromptedSam3Output
        B rows.
    asked : list of dict
        B entries of ``queries`` of `helpers.data.dataset.PromptCollator`.
    dataset : helpers.data.dataset.PromptDataset
        Where the batch came from; ground truth is taken from its records at image size.
    mask_threshold : float
        In [0, 1].

    Returns
    -------
    list of dict
        B queries, see `helpers.detect.queries`, with ``presence_prob``, ``max_query_prob``
        and ``max_score`` besides.
    """
    records = {record.image_id: record for record in dataset.records}
    described = []
    for query in asked:
        record = records[query["image_id"]]
        described.append((record.image_id, query["prompt"], record.height, record.width))
    queries = []
    for raw in raw_predictions(outputs, described):
        found = detect(raw, SCORE_FLOOR, mask_threshold, MAX_DETECTIONS)
        truth = _ground_truth(records[raw.image], raw.prompt, dataset)
        queries.append(
            {
                "image_id": raw.image,
                "prompt": raw.prompt,
                "height": raw.height,
                "width": raw.width,
                "exhaustive": True,
                **truth,
                "pred": [
                    {"rle": one["mask_rle"], "score": one["score"], "box_xyxy": one["box_xyxy"]}
                    for one in found
                ],
                "presence_prob": raw.presence_prob,
                "max_query_prob": raw.max_query_prob,
                "max_score": raw.max_score,
            }
        )
    return queries


@torch.no_grad()
def predict_split(
    model,
    processor,
    split,
    *,
    prompt=None,
    absent_prompts=(),
    mask_threshold=0.5,
    batch_size=4,
    num_workers=0,
):
    """Ask a model about every image of a split.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3 or peft.PeftModel
        Put into eval mode.
    processor : transformers.Sam3Processor
    split : helpers.data.records.Split
    prompt, absent_prompts
        See `evaluation_dataset`.
    mask_threshold : float
        In [0, 1].
    batch_size : int
        Images at once.
    num_workers : int
        Processes that load images.

    Returns
    -------
    list of dict
        One query per image and prompt, see `helpers.detect.queries`.

    Raises
    ------
    InputError
        If an image cannot be read or nothing can be asked.
    """
    dataset = evaluation_dataset(
        split, processor, model, prompt=prompt, absent_prompts=absent_prompts
    )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=PromptCollator(processor),
    )
    model.eval()
    device = next(model.parameters()).device
    queries = []
    for batch in loader:
        for rows, outputs in outputs_by_rows(model, batch, device):
            asked = batch["queries"][rows]
            queries += queries_from_outputs(outputs, asked, dataset, mask_threshold)
    return queries


def _ground_truth(record, prompt, dataset):
    """Return masks and boxes of the objects that a prompt asks for, at image size.

    An object without a usable mask stands as its filled box.
    """
    objects = present_prompts(record, dataset.split.categories, dataset.prompt).get(prompt, [])
    boxes_xyxy = [clip_box(item.box_xyxy, record.width, record.height) for item in objects]
    rles = [
        _mask_or_box(item.rle, box, record) for item, box in zip(objects, boxes_xyxy, strict=True)
    ]
    return {"gt": rles, "gt_boxes_xyxy": boxes_xyxy, "is_positive": bool(rles)}


def _mask_or_box(rle, box_xyxy, record):
    """Return a mask of the image's size with a pixel in it: the annotated one, or the box."""
    if (
        rle is not None
        and list(rle["size"]) == [record.height, record.width]
        and coco_mask.area(rle)
    ):
        return dict(rle)
    x0, y0, x1, y1 = box_xyxy
    rows, columns = np.ogrid[: record.height, : record.width]
    filled = (rows >= int(y0)) & (rows < max(y1, int(y0) + 1))
    filled = filled & (columns >= int(x0)) & (columns < max(x1, int(x0) + 1))
    encoded = coco_mask.encode(np.asfortranarray(filled.astype(np.uint8)))
    return {"size": [record.height, record.width], "counts": encoded["counts"].decode("ascii")}


def prompt_scores(queries, score_threshold):
    """Summarise the highest score of every query, by prompt and by whether it is present.

    Parameters
    ----------
    queries : list of dict
        See `helpers.detect.queries`, with ``presence_prob``, ``max_query_prob`` and
        ``max_score``, as `helpers.detect.queries.predict_split` returns them.
    score_threshold : float
        In [0, 1].

    Returns
    -------
    pandas.DataFrame
        Index ``prompt`` and ``shown`` ("present" or "absent"), present ones first. Columns
        ``images``; the means ``presence``, ``max query`` and ``max score``, all in [0, 1]; and
        ``reached``, the share of the images whose highest score is at least the threshold.

    Raises
    ------
    InputError
        For a threshold that is no probability or queries that are none.
    """
    check_queries(queries)
    check_probability(score_threshold, "score_threshold")
    table = pd.DataFrame(
        {
            "prompt": query["prompt"],
            "shown": "present" if query["gt"] else "absent",
            "presence": query["presence_prob"],
            "max query": query["max_query_prob"],
            "max score": query["max_score"],
            "reached": float(query["max_score"] >= score_threshold),
        }
        for query in queries
    )
    groups = table.groupby(["prompt", "shown"])
    summary = groups.mean()
    summary.insert(0, "images", groups.size())
    return summary.sort_index(level=["shown", "prompt"], ascending=[False, True])


def as_queries(predictions, records):
    """Set predictions beside the annotated masks of their images.

    Every annotated object counts as what the prompt asked for, whatever its category: the question
    is how much of what was marked is an object at all.

    Parameters
    ----------
    predictions : sequence of helpers.detect.predictor.Prediction
        Made on the files of `records`.
    records : sequence of helpers.data.records.ImageRecord

    Returns
    -------
    list of dict
        See `helpers.detect.queries`.

    Raises
    ------
    InputError
        For a prediction on an image that no record names.
    """
    by_path = {str(record.path): record for record in records}
    queries = []
    for one in predictions:
        if one.image not in by_path:
            raise InputError("no record of this image", where=one.image, fix="pass its split")
        record = by_path[one.image]
        queries.append(
            {
                "image_id": record.image_id,
                "prompt": one.prompt,
                "height": one.height,
                "width": one.width,
                "gt": [dict(item.rle) for item in record.objects if item.rle is not None],
                "pred": [
                    {"rle": found["mask_rle"], "score": found["score"]} for found in one.detections
                ],
                "presence_prob": one.presence_prob,
                "max_query_prob": one.max_query_prob,
                "max_score": one.max_score,
            }
        )
    return queries


_COLUMNS = [
    "image_id",
    "prompt",
    "logit_min",
    "logit_median",
    "logit_max",
    "presence_prob",
    "max_query_prob",
    "max_score",
    "semantic_mean",
    "semantic_max",
]


def raw_outputs(model, processor, records, prompts):
    """Ask a model the same prompts on many images.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3 or peft.PeftModel
    processor : transformers.Sam3Processor
    records : sequence of helpers.data.records.ImageRecord
        I images.
    prompts : sequence of str or dict of str to sequence of str
        The prompts of every image, or a dict from ``image_id`` to the prompts of that image.

    Returns
    -------
    list of helpers.detect.detections.RawPrediction
        One per image and prompt; ``image`` is the ``image_id``. An image without prompts has none.
    """
    predictor = Predictor(model, processor)
    raws = []
    for record in records:
        asked = prompts[record.image_id] if isinstance(prompts, dict) else prompts
        if asked:
            raws += predictor.raw(record.path, list(asked), name=record.image_id)
    return raws


def output_table(raws):
    """Describe raw outputs by the numbers that a zero detection is diagnosed with.

    Parameters
    ----------
    raws : sequence of helpers.detect.detections.RawPrediction
        May be empty.

    Returns
    -------
    pandas.DataFrame
        One row per prediction: ``image_id``, ``prompt``, ``logit_min``, ``logit_median``,
        ``logit_max`` (over the queries), ``presence_prob``, ``max_query_prob``, ``max_score``,
        ``semantic_mean`` and ``semantic_max`` (probabilities over the pixels of the semantic map).
    """
    rows = []
    for raw in raws:
        semantic_prob = 1 / (1 + np.exp(-raw.semantic_logits.astype(np.float64)))
        rows.append(
            {
                "image_id": raw.image,
                "prompt": raw.prompt,
                "logit_min": float(raw.query_logits.min()),
                "logit_median": float(np.median(raw.query_logits)),
                "logit_max": float(raw.query_logits.max()),
                "presence_prob": raw.presence_prob,
                "max_query_prob": raw.max_query_prob,
                "max_score": raw.max_score,
                "semantic_mean": float(semantic_prob.mean()),
                "semantic_max": float(semantic_prob.max()),
            }
        )
    return pd.DataFrame(rows, columns=_COLUMNS)
