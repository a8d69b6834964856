"""Gates on the data of a run: annotation files, images, and what is not annotated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torchvision.ops import box_convert, masks_to_boxes

from helpers.checks import boxes_and_masks as annotation_checks
from helpers.checks import images as image_checks
from helpers.checks.images import contrast_per_turn
from helpers.data.coco import entries_of
from helpers.data.masks import rle_area, rle_box_xyxy
from helpers.data.records import mask_fits_image
from helpers.diagnose.examination import Evidence, Gate, Inapplicable
from helpers.errors import InputError
from helpers.files import resolve

MIN_KEPT = 0.95  # share of the objects; below it, lost ones explain a detector
MIN_MASK_SHARE = 0.5  # of the objects; with fewer, hardly any outline is taught
MIN_FITTING = 0.8  # share of box targets that fit their masks; healthy: see `box_targets`
MAX_OFF = 0.025  # of the image by which a side may be off its mask: boxes are drawn by hand
CELLS_OFF = 1.5  # on a coarse grid so many cells, because masks are rounded to them
OUTSIDE = 0.01  # by how much a box target may leave [0, 1]


def objects_after_loader(examination):
    """Count objects in the records against objects in the batches, prompt by prompt."""
    queries = examination.train_queries
    looked_at = {record.image_id: record for record, _, _ in queries}.values()
    objects = [item for record in looked_at for item in record.objects]
    crowd = sum(item.is_crowd for item in objects)
    kept = sum(len(target["boxes_cxcywh"]) for _, _, target in queries)
    text = f"{kept} of {len(objects)} objects of {len(looked_at)} images reach the loss"
    denied = Counter(
        query["prompt"]
        for record, query, target in queries
        if not len(target["boxes_cxcywh"]) and _annotated(record, query, examination.config)
    )
    if denied:
        asked = ", ".join(f"'{prompt}' on {count} images" for prompt, count in denied.items())
        text = f"{text}; annotated, yet asked without objects: {asked}"
        return text, [Evidence("objects_filtered", 1.0, text)]
    if crowd > (1 - MIN_KEPT) * len(objects):
        text = f"{text}; {crowd} are marked as crowd regions and dropped"
        return text, [Evidence("objects_filtered", 1.0, text)]
    if objects and not kept:
        return text, [Evidence("no_objects", 1.0, text)]
    if kept < MIN_KEPT * len(objects):
        return text, [Evidence("objects_filtered", 0.7, text)]
    evidence = _recorded(examination, kept)
    return "; ".join([text, *(one.text for one in evidence)]), evidence


def _annotated(record, query, config):
    """Tell whether an image has objects, no crowd regions, that a query asks for."""
    return any(
        item.category == query["prompt"] or config.data.prompt == query["prompt"]
        for item in record.objects
        if not item.is_crowd
    )


def _recorded(examination, kept):
    """Compare with the number of objects the run itself counted before it trained."""
    own_data = resolve(examination.config.data.data_dir) == examination.data_dir
    if not (examination.is_finished and own_data):
        return []
    recorded = examination.files.metrics["objects"]["train"]
    text = f"the run recorded {recorded} objects at its start, the loader now gives {kept}"
    if kept and not recorded:
        return [Evidence("no_objects", 0.95, text)]
    if recorded < MIN_KEPT * kept:
        return [Evidence("objects_filtered", 0.7, text)]
    return []


def masks_after_loader(examination):
    """Count the objects that keep a mask, and those that have one in the files."""
    queries = _with_objects(examination)
    total = sum(len(target["boxes_cxcywh"]) for _, _, target in queries)
    masks = sum(int(target["mask_valid"].sum()) for _, _, target in queries)
    readable = sum(_has_mask(record, item) for record, item in _items(queries))
    in_files = sum(
        item.rle is not None or item.mask_problem is not None for _, item in _items(queries)
    )
    text = (
        f"{masks} of {total} objects reach the loss with a mask; {readable} have a readable one "
        "in the files"
    )
    if masks < MIN_KEPT * min(readable, total):
        return text, [Evidence("masks_lost", 1.0, text)]
    if in_files < MIN_MASK_SHARE * total:  # unreadable ones are the business of another gate
        return text, [Evidence("masks_lost", 0.8, text)]
    return text, []


def _with_objects(examination):
    """List the queries with objects, or raise InputError if there is none."""
    queries = [one for one in examination.train_queries if len(one[2]["boxes_cxcywh"])]
    if not queries:
        raise InputError("no object reaches the loss", where=examination.data_dir)
    return queries


def _items(queries):
    """List (record, object) of all images of some queries."""
    records = {record.image_id: record for record, _, _ in queries}
    return [(record, item) for record in records.values() for item in record.objects]


def _has_mask(record, item):
    """Tell whether an object has a mask that the loss could use."""
    return mask_fits_image(record, item) and rle_area(item.rle) > 0


def box_targets(examination):
    """Compare each box target with its own mask, after all conversions.

    Share of targets that fit, in healthy runs: 1.00 (walls), 0.96 (masonry), 1.00 (potholes); read
    as corners 0.00.
    """
    queries = _with_objects(examination)
    boxes = torch.cat([target["boxes_cxcywh"] for _, _, target in queries])
    masks = torch.cat([target["masks"] for _, _, target in queries])
    valid = torch.cat([target["mask_valid"] for _, _, target in queries])
    if not torch.isfinite(boxes).all():
        count = int((~torch.isfinite(boxes).all(1)).sum())
        text = f"{count} of {len(boxes)} box targets are NaN or infinite"
        return text, [Evidence("not_finite", 1.0, text)]
    boxes_xyxy = box_convert(boxes, "cxcywh", "xyxy")
    outside = ((boxes_xyxy < -OUTSIDE) | (boxes_xyxy > 1 + OUTSIDE)).any(1).float().mean().item()
    text = f"{outside:.0%} of {len(boxes)} box targets leave the image"
    fitting = 1.0
    if valid.any():
        tight_xyxy = _tight_boxes(masks[valid])
        tolerance = max(MAX_OFF, CELLS_OFF / masks.shape[-1])
        fitting = _share_fitting(boxes_xyxy[valid], tight_xyxy, tolerance)
        corners = _share_fitting(boxes[valid], tight_xyxy, tolerance)
        text += (
            f"; {fitting:.0%} lie within {tolerance:.1%} of the image of their own mask on all "
            f"sides, read as corners {corners:.0%}"
        )
    is_wrong = outside > 1 - MIN_KEPT or fitting < MIN_FITTING
    if is_wrong and _share_fitting_in_files(queries) >= MIN_FITTING:
        return text, [Evidence("wrong_box_targets", 1.0, text)]
    return text, []


def _tight_boxes(masks):
    """Return the tight boxes of masks (n, S, S) on the grid as xyxy in [0, 1]."""
    boxes_xyxy = masks_to_boxes(masks)
    boxes_xyxy[:, 2:] += 1
    return boxes_xyxy / masks.shape[-1]


def _share_fitting(boxes_xyxy, others_xyxy, tolerance):
    """Return the share of boxes of which no side is farther than a tolerance from another's."""
    return ((boxes_xyxy - others_xyxy).abs().amax(1) <= tolerance).float().mean().item()


def _share_fitting_in_files(queries):
    """Return the share of boxes in the files that fit their masks; 1 if none can be compared."""
    pairs = [
        (item.box_xyxy, rle_box_xyxy(item.rle), (record.width, record.height) * 2)
        for record, item in _items(queries)
        if _has_mask(record, item)
    ]
    if not pairs:
        return 1.0
    boxes, tight, sides = (
        torch.tensor(side, dtype=torch.float32) for side in zip(*pairs, strict=True)
    )
    return _share_fitting(boxes / sides, tight / sides, MAX_OFF)


LOADER_GATES = (
    Gate(
        "objects after the loader",
        f"at least {MIN_KEPT:.0%} of the annotated objects, each under its own prompt",
        objects_after_loader,
    ),
    Gate("masks after the loader", "as many as the files hold", masks_after_loader),
    Gate(
        "box targets",
        f"inside [0, 1], at least {MIN_FITTING:.0%} close to their own masks",
        box_targets,
    ),
)


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
        found = image_checks.check_images(split, examination.dataset.look(split))
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
    findings : sequence of helpers.checks.findings.Finding
        Of one split.
    total : int
        Objects, or images, that were looked at.

    Returns
    -------
    list of helpers.diagnose.examination.Evidence
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
        raise Inapplicable(f"fewer than {MIN_IMAGES} images with masks", where=examination.data_dir)
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
        raise Inapplicable(reason, where=examination.data_dir)
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
