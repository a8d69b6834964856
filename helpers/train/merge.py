"""Merge an adapter into its base: a full model, written only if it detects what the two detect."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Sam3Model

from helpers.data.coco import read_split
from helpers.detect.detections import masks_at_image_size, reaches
from helpers.detect.predictor import GENERIC_PROMPT, Predictor
from helpers.errors import InputError
from helpers.files import WALL_CRACKS, staged_folder, write_json, write_text
from helpers.model.sam3 import base_config, load_base
from helpers.train.run import CARD_FILE, MERGE_FILE, load_run
from helpers.train.share import model_card

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_IMAGES = 4
NUM_PROMPTS = 6


@dataclass(frozen=True)
class Tolerance:
    """How far two models may be apart and still count as the same.

    Attributes
    ----------
    logit : float
        Largest absolute difference of a query, presence or mask logit.
    score : float
        Largest difference of a score.
    margin : float
        A query whose score is this close to the threshold may be detected by one model only.
    mask_iou : float
        Smallest IoU of the two masks of a query that both detect.
    """

    logit: float
    score: float
    margin: float
    mask_iou: float


EXACT = Tolerance(logit=1e-3, score=1e-3, margin=0.0, mask_iou=0.999)
"""For a merge in float32, the same sums in another order: no score may cross the threshold.

Seen are 3e-5 on five runs of the embedded base, and 6e-5 on all 840 million parameters of SAM3 with
random weights, at 336 pixels.
"""
CAST = Tolerance(logit=float("inf"), score=0.05, margin=0.05, mask_iou=0.9)
"""For weights rounded to 8 bits; seen on those five runs: scores 0.012, masks 0.988."""


@dataclass(frozen=True)
class Comparison:
    """What differs between two models on the same questions.

    Attributes
    ----------
    num_questions, num_detections : int
        Images times prompts; detections of the first model at the threshold.
    max_logit_difference, max_score_difference : float
        Over all queries, detected or not.
    num_changed : int
        Queries that only one of the two detects, and whose score is not within the margin of the
        threshold.
    min_mask_iou : float
        Over the queries that both detect; 1 without any.
    """

    num_questions: int
    num_detections: int
    max_logit_difference: float
    max_score_difference: float
    num_changed: int
    min_mask_iou: float

    def within(self, tolerance):
        """Tell whether the two models count as the same; NaN never does."""
        return (
            self.max_logit_difference <= tolerance.logit
            and self.max_score_difference <= tolerance.score
            and self.num_changed == 0
            and self.min_mask_iou >= tolerance.mask_iou
        )


class MergeDiffers(Exception):
    """The merged model does not detect what base and adapter detect; nothing was written.

    Attributes
    ----------
    document : dict
        What `merge` would have returned.
    """

    def __init__(self, document):
        self.document = document
        super().__init__("the merged model differs from base and adapter")


def merge(folder, output, dtype=None, base=None):
    """Write a full model that plain `Sam3Model.from_pretrained` loads.

    Base and adapter are merged in float32, and the result is compared with them; then it is cast,
    written, loaded again from the written files, and compared once more.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.
    output : os.PathLike
        Folder to write; must be empty or missing. It stays so unless everything went well.
    dtype : {"float32", "bfloat16"}, optional
        Type of the written weights; by default that of the base's own files.
    base : str, optional
        Another place of the base than the run names.

    Returns
    -------
    dict
        Also in ``merge.json``: ``base``, ``revision``, ``resolution``, ``dtype``, ``prompts``,
        ``score_threshold``, ``mask_threshold``, ``config`` and ``data_fingerprint`` of the run,
        ``images`` (where the compared images are from), ``num_images``, ``merged`` and
        ``written``, two `Comparison` with base and adapter as dicts, and ``same``.

    Raises
    ------
    InputError
        If the output holds files, the type is unknown, or the run cannot be loaded.
    MergeDiffers
        If a comparison is not within its tolerance, `EXACT` or, for a cast, `CAST`.
    """
    output = Path(output).expanduser().absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError("is not an empty folder", where=output, fix="choose another --output")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"there is no type {dtype!r} here", fix=f"use one of {', '.join(DTYPES)}")
    run = load_run(folder, base=base, dtype=torch.float32)
    settings = run.config.model
    if dtype is None:
        own = base_config(base or settings.name, None if base else settings.revision).dtype
        dtype = str(own or torch.float32).removeprefix("torch.")
    was_missing = not output.exists()
    try:
        with staged_folder(output) as staging:
            document = _merge_into(staging, run, dtype)
            if not document["same"]:
                raise MergeDiffers(document)
            write_json(staging / MERGE_FILE, document)
            card = model_card(run, settings.resolution, merge=document)
            write_text(staging / CARD_FILE, card)
    except BaseException:
        if was_missing:
            with contextlib.suppress(OSError):  # the folder that the staging made
                output.rmdir()
        raise
    return document


def _merge_into(staging, run, dtype):
    """Write the merged model and compare it twice; returns the document of `merge`."""
    evaluation, settings = run.config.evaluation, run.config.model
    thresholds = evaluation.score_threshold, evaluation.mask_threshold
    source, images = _sample_images(run.config)
    prompts = _sample_prompts(run)

    def answers(model, processor):
        predictor = Predictor(model, processor)
        return [raw for image in images for raw in predictor.raw(image, prompts)]

    expected = answers(run.model, run.processor)
    merged = run.model.merge_and_unload(safe_merge=True)
    in_memory = compare(expected, answers(merged, run.processor), *thresholds, EXACT.margin)
    _plain(merged).to(DTYPES[dtype]).save_pretrained(staging)
    run.processor.save_pretrained(staging)
    tolerance = EXACT if dtype == "float32" else CAST
    written = compare(expected, answers(*load_base(staging)), *thresholds, tolerance.margin)
    return {
        "base": settings.name,
        "revision": settings.revision,
        "resolution": settings.resolution,
        "dtype": dtype,
        "prompts": run.prompts,
        "score_threshold": evaluation.score_threshold,
        "mask_threshold": evaluation.mask_threshold,
        "config": run.config.fingerprint(),
        "data_fingerprint": run.metrics.get("data_fingerprint"),
        "images": source,
        "num_images": len(images),
        "merged": asdict(in_memory),
        "written": asdict(written),
        "same": in_memory.within(EXACT) and written.within(tolerance),
    }


def compare(expected, actual, score_threshold, mask_threshold, margin=0.0):
    """Compare what two models answered to the same questions.

    Parameters
    ----------
    expected, actual : sequence of helpers.detect.detections.RawPrediction
        In the same order.
    score_threshold, mask_threshold : float
        In [0, 1].
    margin : float
        Queries of the first model with a score this close to the threshold may be detected or not.

    Returns
    -------
    Comparison
    """
    logits, scores, ious, changed, detected = [0.0], [0.0], [1.0], 0, 0
    for one, other in zip(expected, actual, strict=True):
        for name in ("query_logits", "presence_logit", "mask_logits"):
            logits.append(float(np.abs(getattr(one, name) - getattr(other, name)).max()))
        scores.append(float(np.abs(one.scores - other.scores).max()))
        kept, kept_too = (reaches(raw.scores, score_threshold) for raw in (one, other))
        far = np.abs(one.scores - score_threshold) > margin
        changed += int(((kept != kept_too) & far).sum())
        detected += int(kept.sum())
        for query in np.flatnonzero(kept & kept_too):
            mask, mask_too = (
                masks_at_image_size(raw.mask_logits[[query]], raw.height, raw.width, mask_threshold)
                for raw in (one, other)
            )
            union = (mask | mask_too).sum()
            ious.append(float((mask & mask_too).sum() / union) if union else 1.0)
    return Comparison(
        num_questions=len(expected),
        num_detections=detected,
        max_logit_difference=float(np.max(logits)),
        max_score_difference=float(np.max(scores)),
        num_changed=changed,
        min_mask_iou=float(np.min(ious)),
    )


def _sample_images(config):
    """Return where the sample comes from, and images of the validation split or the course's."""
    try:
        name, split = "validation split", read_split(config.data.data_dir, config.data.val_split)
    except InputError:
        name, split = "data/wall_cracks", read_split(WALL_CRACKS, "valid")
    paths = [record.path for record in split.records]
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(NUM_IMAGES, len(paths))).astype(int))
    return name, [paths[index] for index in chosen]


def _sample_prompts(run):
    """Return trained prompts, present ones first, as many as are compared."""
    asked = [*run.prompts["prompts"], *run.config.evaluation.absent_prompts]
    asked += [*run.prompts["negatives"], GENERIC_PROMPT]
    return list(dict.fromkeys(asked))[:NUM_PROMPTS]


def _plain(model):
    """Return the library's own class with the same weights, so that config.json names it."""
    with torch.device("meta"):
        plain = Sam3Model(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain
