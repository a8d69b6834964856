"""A query is one prompt on one picture: what is there, and what a model detected."""

import math
import sys
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import DataLoader

from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.data.masks import clip_box
from helpers.data.records import plain_prompt, present_prompts, true_rle
from helpers.detect.detections import PROBABILITIES, detect, raw_predictions, reaches
from helpers.errors import InputError, check_probability
from helpers.files import progress_bar
from helpers.model.prompted import outputs_by_rows

SCORE_FLOOR = 1e-3  # average precision needs low scores, not the lowest
IMAGES_AT_ONCE = 4
MAX_DETECTIONS = 100  # per prompt and image, as many as COCO's average precision looks at
_REQUIRED = ("image_id", "prompt", "height", "width", "gt", "pred")


@dataclass(frozen=True)
class Query:
    """One prompt on one picture: the objects it asks for, and the detections; checked when made."""

    image_id: object
    prompt: str
    height: int  # of the picture, in pixels
    width: int
    gt: list  # masks of the objects, COCO compressed RLE; empty where the prompt is absent
    pred: list  # dicts of rle, score in [0, 1] and optionally box_xyxy in pixels
    exhaustive: bool = True  # False if the picture may show more objects; cgF1 skips these
    gt_boxes_xyxy: list | None = None  # in pixels; by default those around the masks
    presence_prob: float | None = None  # this and the next two whatever the threshold
    max_query_prob: float | None = None
    max_score: float | None = None

    def __post_init__(self):
        """Refuse what a metric would silently make a wrong number of."""
        where = f"{self.prompt!r} on image {self.image_id!r}"
        size = [self.height, self.width]
        for rle in (*self.gt, *(detection.get("rle") for detection in self.pred)):
            if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str | bytes):
                message, fix = "a mask is not a COCO compressed RLE", "use pycocotools.mask.encode"
                raise InputError(message, where=where, fix=fix)
            if list(rle.get("size", ())) != size:
                text = f"a mask has size {rle.get('size')}, the picture has {size} (height, width)"
                raise InputError(text, where=where)
        for detection in self.pred:
            check_probability(detection.get("score"), "score", where)
        if self.max_score is not None:
            check_probability(self.max_score, "max_score", where)
        boxes = [None] * len(self.gt) if self.gt_boxes_xyxy is None else self.gt_boxes_xyxy
        if len(boxes) != len(self.gt):
            raise InputError(f"{len(boxes)} gt_boxes_xyxy for {len(self.gt)} objects", where=where)
        for box_xyxy in (*boxes, *(detection.get("box_xyxy") for detection in self.pred)):
            if box_xyxy is not None and not _is_box(box_xyxy):
                raise InputError(f"a box is {box_xyxy!r}", where=where, fix="give x0, y0, x1, y1")

    @classmethod
    def from_dict(cls, mapping):
        """Read a query out of a mapping with the attributes as keys; others are ignored."""
        if missing := [key for key in _REQUIRED if key not in mapping]:
            raise InputError(f"missing {missing}")
        names = [field.name for field in fields(cls) if field.name in mapping]
        query = cls(**{name: mapping[name] for name in names})
        claim = mapping.get("is_positive", query.is_positive)
        if bool(claim) != query.is_positive:
            message = f"is_positive is {claim} with {len(query.gt)} objects in gt"
            raise InputError(message, where=f"{query.prompt!r} on image {query.image_id!r}")
        return query

    @property
    def is_positive(self):
        """True if the prompt is present."""
        return bool(self.gt)

    @cached_property
    def scores(self):
        """(detections,) float64 in [0, 1]."""
        return np.array([detection["score"] for detection in self.pred], dtype=np.float64)

    def rles(self, score_threshold=0.0):
        """List the masks of the detections from a score on."""
        kept = reaches(self.scores, score_threshold)
        return [detection["rle"] for detection, keep in zip(self.pred, kept, strict=True) if keep]

    @property
    def highest_score(self):
        """``max_score``, else the best detection's score, else 0."""
        return max(self.scores, default=0.0) if self.max_score is None else self.max_score


def _is_box(values):
    """Return whether values are four finite numbers."""
    try:
        return np.shape(values) == (4,) and all(map(math.isfinite, values))
    except TypeError:
        return False


def as_query_list(queries):
    """Check queries once: mappings become `Query`; an error names the number of the query."""
    if not queries:
        raise InputError("there is no query to evaluate", where="queries")
    checked = []
    for index, query in enumerate(queries):
        try:
            checked.append(query if isinstance(query, Query) else Query.from_dict(query))
        except InputError as error:
            place = "" if error.where is None else f" ({error.where})"
            raise InputError(error.message, where=f"query {index}{place}", fix=error.fix) from error
    return checked


def predict_split(
    model,
    processor,
    split,
    *,
    prompt=None,
    absent_prompts=(),
    mask_threshold=0.5,
    adapter_words=None,
):
    """Ask a model about every image of a split.

    Parameters
    ----------
    model, processor
        See `helpers.detect.predictor.Predictor`.
    split : helpers.data.records.Split
    prompt, absent_prompts
        See `helpers.data.PromptDataset.for_evaluation`.
    mask_threshold : float
        In [0, 1]; a pixel with a higher probability belongs to the mask.
    adapter_words : sequence of str, optional
        Routing: only these are asked of the adapter, all others of its base.

    Returns
    -------
    list of Query
        One per image and prompt, with the 100 best detections that score at least 0.001.
    """
    asked = {"prompt": prompt, "absent_prompts": absent_prompts, "adapter_words": adapter_words}
    return predict_split_at(model, processor, split, [mask_threshold], **asked)[mask_threshold]


@torch.no_grad()
def predict_split_at(model, processor, split, mask_thresholds, *, adapter_words=None, **asked):
    """Do as `predict_split` for several mask thresholds at once: dict of each to its list."""
    if adapter_words is not None:
        own = predict_split_at(model, processor, split, mask_thresholds, **asked)
        with model.disable_adapter():
            of_base = predict_split_at(model, processor, split, mask_thresholds, **asked)
        words = {plain_prompt(word) for word in adapter_words}
        return {
            level: [
                query if plain_prompt(query.prompt) in words else other
                for query, other in zip(own[level], of_base[level], strict=True)
            ]
            for level in mask_thresholds
        }
    dataset = PromptDataset.for_evaluation(split, model, processor, **asked)
    loader = DataLoader(dataset, IMAGES_AT_ONCE, collate_fn=PromptCollator(processor))
    model.eval()
    device, queries = next(model.parameters()).device, {level: [] for level in mask_thresholds}
    with progress_bar(len(dataset), "asking", disable=not sys.stderr.isatty()) as bar:
        for batch in loader:
            for rows, outputs in outputs_by_rows(model, batch, device, mask_floor=SCORE_FLOOR):
                for level, answers in queries.items():
                    answers += queries_from_outputs(outputs, batch["queries"][rows], dataset, level)
            bar.update(len(batch["pixel_values"]))
    return queries


def queries_from_outputs(outputs, questions, dataset, mask_threshold):
    """Turn outputs of B rows into B queries; truth comes from the records, at image size."""
    records = {record.image_id: record for record in dataset.records}
    asked = [(records[question["image_id"]], question["prompt"]) for question in questions]
    described = [(r.image_id, prompt, r.height, r.width) for r, prompt in asked]
    queries = []
    for raw in raw_predictions(outputs, described):
        record = records[raw.image]
        present = present_prompts(record, dataset.split.categories, dataset.prompt)
        detections = detect(raw, SCORE_FLOOR, mask_threshold, MAX_DETECTIONS)
        queries.append(query_of(raw, detections, record, present.get(raw.prompt, [])))
    return queries


def query_of(answer, detections, record, objects):
    """Set an answer (raw or not) beside the objects that count as its ground truth."""
    gt = [true_rle(record, item) for item in objects]
    pred = [
        {"rle": d["mask_rle"], "score": d["score"], "box_xyxy": d["box_xyxy"]} for d in detections
    ]
    return Query(
        *(record.image_id, answer.prompt, record.height, record.width, gt, pred),
        gt_boxes_xyxy=[clip_box(item.box_xyxy, record.width, record.height) for item in objects],
        **{name: getattr(answer, name) for name in PROBABILITIES},
    )
