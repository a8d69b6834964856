"""Gates on what is left of the training data after the loader: objects, masks, boxes."""

from __future__ import annotations

from collections import Counter

import torch
from torchvision.ops import box_convert, masks_to_boxes

from helpers.errors import InputError
from helpers.evidence import Evidence, Gate
from helpers.paths import resolve
from helpers.segmentations import rle_area, rle_box_xyxy
from helpers.targets import mask_fits_image

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
