"""Gates on the data of a run: annotation files, images, and what is not annotated."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from helpers import annotation_checks, image_checks
from helpers.annotations import entries_of
from helpers.errors import InputError
from helpers.evidence import Evidence, Gate
from helpers.gates_loader import LOADER_GATES
from helpers.turned_images import contrast_per_turn

SPLITS = ("train", "valid")
CAUSE_OF = {
    "D08_MISSING_IMAGE": "unreadable_data",
    "D10_ALL_CROWD": "objects_filtered",
    "D20_BOX_OUTSIDE": "boxes_off_masks",
    "D21_BOX_NORMALISED": "boxes_off_masks",
    "D22_BOX_OFF_MASK": "boxes_off_masks",
    "D40_DEGENERATE_BOX": "not_finite",
    "D41_NOT_FINITE": "not_finite",
    "D42_EMPTY_MASK": "not_finite",
    "D43_MASK_SIZE": "unreadable_data",
    "D44_BAD_MASK": "unreadable_data",
    "D50_TOO_SMALL": "tiny_objects",
    "D70_BROKEN_IMAGE": "unreadable_data",
    "D71_IMAGE_SHAPE": "annotations_off_image",
}
"""Finding of a data check to the cause it speaks for; the others speak for none."""
MIN_SHARE = 0.05
"""Share of objects or images from which a fault explains a detector, and is no slip of the hand."""
MIN_SHARES = {"D08_MISSING_IMAGE": 0.0, "D70_BROKEN_IMAGE": 0.0, "D50_TOO_SMALL": 0.5}
"""One image that cannot be opened stops the loader; many small objects are normal."""
SLIP = 0.4
"""Confidence below `MIN_SHARE`: shown, but names no cause."""
MIN_KEPT = 0.99  # share of the objects in the files that the reader must find
MAX_EMPTY_SHARE = 0.7  # of the training images; healthy: 0.19 (walls), 0.00 (masonry, potholes)
TURNED_BY = 2.0  # times the contrast of the upright images; healthy turns have 0.05 to 0.35 of it
MIN_TURNED_CONTRAST = 0.25  # standard deviations of the rim; healthy turns reach 0.08 to 0.21
MIN_IMAGES = 4  # of fewer, nothing is said
MISSED_BY = 0.5  # of the median score where the object is annotated
MISSED_SHARE = 0.25  # of the images without annotation; healthy: at most 0.25, 4 of 16
MIN_APART = 0.9  # share of pairs ordered rightly; healthy: 0.99 or more, half the labels: 0.77
MIN_SEEN = 0.1  # best score where the object is annotated, below which the model sees nothing


def annotation_files(examination):
    """Read the annotation files as the pipeline does, and count their objects without it."""
    texts, evidence = [], []
    for name in SPLITS:
        try:
            split = examination.split(name)
        except InputError as error:
            evidence.append(Evidence("unreadable_data", 1.0, str(error)))
            texts.append(f"{name}: {error.message}")
            continue
        in_files = _count_entries(split)
        texts.append(f"{name}: {len(split.records)} images, {in_files} objects in the files")
        if not in_files:
            text = f"the files of '{name}' hold no object at all"
            evidence.append(Evidence("no_objects", 1.0, text))
        elif split.num_objects < MIN_KEPT * in_files:
            text = f"the reader finds {split.num_objects} of the {in_files} objects of '{name}'"
            evidence.append(Evidence("no_objects", 1.0, text))
    return "; ".join(texts), evidence


def _count_entries(split):
    """Count the annotation entries of a split as they stand in its files."""
    return sum(len(objects) for _, _, objects, _ in entries_of(split.root, split.layout))


def annotations_alone(examination):
    """Ask the checks of annotations that need no image."""
    model = examination.base[0]
    findings, evidence = [], []
    for name in SPLITS:
        split = examination.split(name)
        found = annotation_checks.check_annotations(
            split,
            mask_size=model.mask_size,
            num_queries=model.config.detr_decoder_config.num_queries,
        )
        findings += found
        evidence += evidence_of(found, split.num_objects)
    return _texts(findings), evidence


def image_files(examination):
    """Open every image and compare it with what is stated about it."""
    findings, evidence = [], []
    for name in SPLITS:
        split = examination.split(name)
        found, _ = image_checks.check_images(split, SimpleNamespace(update=lambda: None))
        findings += found
        evidence += evidence_of(found, len(split.records))
    return _texts(findings), evidence


def _independent(findings):
    """Leave out what only follows: a degenerate box does not fit its mask either."""
    degenerate = {
        (place.image_id, place.annotation_id)
        for finding in findings
        if CAUSE_OF.get(finding.code) == "not_finite"
        for place in finding.places
    }
    independent = []
    for finding in findings:
        if finding.code == "D22_BOX_OFF_MASK":
            places = [
                place
                for place in finding.places
                if (place.image_id, place.annotation_id) not in degenerate
            ]
            finding = replace(finding, places=tuple(places))
        independent.append(finding)
    return independent


def evidence_of(findings, total):
    """Turn findings of data checks into evidence, by the share they concern.

    Parameters
    ----------
    findings : sequence of helpers.findings.Finding
        Of one split.
    total : int
        Objects, or images, that were looked at.

    Returns
    -------
    list of helpers.evidence.Evidence
        For findings of `CAUSE_OF` only.
    """
    evidence = []
    for finding in _independent(findings):
        if finding.code in CAUSE_OF and finding.places:
            share = len(finding.places) / total
            speaks = share >= MIN_SHARES.get(finding.code, MIN_SHARE)
            confidence = 0.9 + 0.1 * share if speaks else SLIP
            cause = CAUSE_OF[finding.code]
            evidence.append(Evidence(cause, confidence, f"{finding.message}: {finding.where}"))
    return evidence


def _texts(findings):
    """Join what was found."""
    return "; ".join(f"{one.code[:3]} {one.message}" for one in findings) or "nothing found"


def annotations_on_pixels(examination):
    """Compare the contrast of annotated masks on the images as they are and turned."""
    records = [record for record in examination.split("train").records if record.objects]
    per_turn = contrast_per_turn(records[:: max(1, len(records) // 32)])
    medians = {
        name: float(np.nanmedian(values)) for name, values in per_turn.items() if len(values)
    }
    if len(records) < MIN_IMAGES or not medians:
        raise InputError(f"fewer than {MIN_IMAGES} images with masks", where=examination.data_dir)
    upright, *turned = medians
    best = max(turned, key=medians.get)
    text = (
        f"marked pixels differ from their rim by {medians[upright]:.2f} standard deviations, on "
        f"images {best} by {medians[best]:.2f}"
    )
    if medians[best] > max(TURNED_BY * medians[upright], MIN_TURNED_CONTRAST):
        return text, [Evidence("annotations_off_image", 0.95, text)]
    return text, []


def empty_images(examination):
    """Count the training images without objects."""
    records = examination.split("train").records
    empty = sum(not record.objects for record in records)
    text = f"{empty} of {len(records)} training images have no object"
    if MAX_EMPTY_SHARE * len(records) < empty < len(records):
        return text, [Evidence("mostly_empty", 0.9, text)]
    return text, []


def unannotated_objects(examination):
    """Ask the trained model about images without annotation."""
    shown = [record for record in examination.sample if record.objects]
    empty = examination.unannotated
    if min(len(shown), len(empty)) < MIN_IMAGES:
        reason = f"{len(shown)} images with and {len(empty)} without objects are too few to compare"
        raise InputError(reason, where=examination.data_dir)
    present = {item.category for record in shown for item in record.objects}
    control = list(examination.config.evaluation.absent_prompts)
    raws = examination.raws([*present, *control], records=[*shown, *empty])
    texts, evidence = [], []
    for prompt in sorted(present):
        known = [
            raws[record.image_id, prompt].max_score
            for record in shown
            if any(item.category == prompt for item in record.objects)
        ]
        least = MISSED_BY * float(np.median(known))
        asked = [raws[record.image_id, prompt].max_score for record in empty]
        missed = [
            score >= least
            and all(raws[record.image_id, noun].max_score < least for noun in control)
            for record, score in zip(empty, asked, strict=True)
        ]
        apart = float(np.mean(np.greater.outer(known, asked)))
        text = (
            f"'{prompt}' scores {np.median(known):.2f} (median) where it is annotated, at least half "
            f"of that on {sum(missed)} of {len(empty)} images without annotation; an annotated image "
            f"scores higher in {apart:.0%} of all pairs"
        )
        texts.append(text)
        is_seen = max(known) >= MIN_SEEN and np.mean(missed) >= MISSED_SHARE
        if is_seen and apart < MIN_APART:
            confidence = min(0.95, 0.85 + MIN_APART - apart)
            evidence.append(Evidence("labels_missing", confidence, text, is_direct=False))
    return "; ".join(texts), evidence


DATA_GATES = (
    Gate(
        "annotation files",
        "every split can be read, and the reader finds every object",
        annotation_files,
    ),
    Gate("annotations", "no error of boxes, masks and crowd flags", annotations_alone),
    Gate("image files", "every image opens and has the stated shape", image_files),
    Gate(
        "annotations on pixels",
        "marked pixels stand out most on the images as they are",
        annotations_on_pixels,
    ),
    Gate(
        "images without objects",
        f"at most {MAX_EMPTY_SHARE:.0%} of the training images",
        empty_images,
    ),
    *LOADER_GATES,
    Gate(
        "objects without annotation",
        "the trained model sees nothing in images without annotation",
        unannotated_objects,
    ),
)
