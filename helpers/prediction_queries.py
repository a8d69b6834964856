"""Predictions on a whole split, in the form that `helpers.evaluation` judges."""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from helpers.datasets import PromptCollator, PromptDataset
from helpers.detections import detect, raw_predictions
from helpers.prompt_rows import base_of, outputs_by_rows
from helpers.prompts import clip_box, present_prompts

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
    split : helpers.records.Split
    processor : transformers.Sam3Processor
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
        For its resolution and grid.
    prompt : str, optional
        Replaces every category name.
    absent_prompts : sequence of str
        Nouns asked wherever the picture is not known to show them.
    backbone_cache : helpers.feature_cache.BackboneCache, optional
        See `helpers.datasets.PromptDataset`.

    Returns
    -------
    helpers.datasets.PromptDataset
        The same questions in every epoch.
    """
    base = base_of(model)
    num_nouns = len(split.categories if prompt is None else (prompt,)) + len(absent_prompts)
    return PromptDataset(
        split,
        processor,
        resolution=base.resolution,
        mask_size=base.mask_size,
        prompt=prompt,
        # All there are. With a single noun and no other, only images without it can ask for it.
        num_negatives=num_nouns if num_nouns > 1 else 0,
        negative_prompts=tuple(absent_prompts),
        resample_negatives=False,
        backbone_cache=backbone_cache,
    )


def queries_from_outputs(outputs, asked, dataset, mask_threshold):
    """Turn the outputs of one batch, or of some of its rows, into evaluation queries.

    Parameters
    ----------
    outputs : helpers.sam3.PromptedSam3Output
        B rows.
    asked : list of dict
        B entries of ``queries`` of `helpers.datasets.PromptCollator`.
    dataset : helpers.datasets.PromptDataset
        Where the batch came from; ground truth is taken from its records at image size.
    mask_threshold : float
        In [0, 1].

    Returns
    -------
    list of dict
        B queries, see `helpers.evaluation_queries`, with ``presence_prob``, ``max_query_prob``
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
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
        Put into eval mode.
    processor : transformers.Sam3Processor
    split : helpers.records.Split
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
        One query per image and prompt, see `helpers.evaluation_queries`.

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
