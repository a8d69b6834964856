"""Faults that show in the annotations alone: crowd flags, boxes, masks, sizes, doubles."""

import math
from collections import defaultdict
from itertools import takewhile

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

from helpers.checks.findings import Place, finding_at, findings_by_code
from helpers.data.masks import rle_area, rle_box_xyxy
from helpers.data.records import has_mask, mask_fits_image

MIN_BOX_IOU = 0.8  # between a box and the tight box of its own mask
ROUNDING_PX = 2.0  # an edge may be this far from the mask's: label tools round
OUTSIDE_PX = 1.0  # a box may leave its image by this much, for the same reason
SAME_EDGE_PX = 1.0  # two boxes of one object may be this far apart, for the same reason
SAME_MASK_IOU = 0.9  # two masks of one object overlap by at least this
AREA_SHARE = 0.2  # an area may differ from its mask's by this share and a pixel along the outline
FULL_COVER = 0.9  # and in a single image
MAX_COVER = 0.6  # mean share of its images that an object class, other than a ground, covers


def check_annotations(split, *, mask_size, num_queries):
    """Run every check that needs no image, for a model's mask grid and number of queries."""
    faults, crowded, covers, total = [], [], defaultdict(list), 0
    for record in split.records:
        image, by_category = (split.name, record.image_id, record.path), defaultdict(list)
        for code, item, badness, detail in _faults_of(record, mask_size):
            faults.append((code, Place(*image, item.annotation_id, item.box_xyxy, badness), detail))
        for item in (item for item in record.objects if not item.is_crowd):
            by_category[item.category].append(item)
        for category, items in by_category.items():
            total += len(items)
            if len(items) > num_queries:
                crowded.append(Place(*image, badness=len(items)))
            rles = [item.rle for item in items if has_mask(record, item)]
            if rles:
                share = rle_area(coco_mask.merge(rles)) / (record.width * record.height)
                covers[category].append(Place(*image, badness=share))
    values = {"total": total, "annotations": split.num_objects, "iou": MIN_BOX_IOU}
    values |= {"no_outline": "", "advice": "add a segmentation, or expect boxes only"}
    if sum(code == "D45_NO_MASK" for code, _, _ in faults) == total:
        values["no_outline"] = "; the mask decoder has nothing to learn from"
        values["advice"] = "add segmentations, or set lora.apply_to_mask_decoder=false"
    findings = findings_by_code(faults, mask_size=mask_size, **values)
    findings += finding_at("D51_TOO_MANY", crowded, num_queries=num_queries)
    for category, places in covers.items():
        values = {"category": category, "total": len(places)}
        if np.mean([place.badness for place in places]) <= MAX_COVER:
            places = [place for place in places if place.badness > FULL_COVER]
        mean = np.mean([place.badness for place in places] or [0])
        findings += finding_at("D52_COVERS_PICTURE", places, mean=mean, **values)
    return findings


def _faults_of(record, mask_size):
    """Yield code, object, badness and detail of each fault in the annotations of an image."""
    single = {item.category for item in record.objects if not item.is_crowd}
    for item in record.objects:
        if item.is_crowd:
            yield "D11_CROWD", item, 0, ""
            if item.category not in single:
                yield "D10_ALL_CROWD", item, 0, ""
        else:
            yield from _box_faults(record, item, mask_size)
            yield from _mask_faults(record, item)
    for item in _doubles(record.objects):
        yield "D46_ANNOTATED_TWICE", item, 0, ""


def _box_faults(record, item, mask_size):
    """Yield the faults of one box: D20 to D24, D40, D41, D50."""
    x0, y0, x1, y1 = item.box_xyxy
    width, height = x1 - x0, y1 - y0  # negative for swapped corners
    if not item.has_own_box:
        yield "D23_BOX_FROM_MASK", item, 0, ""
    if not all(map(math.isfinite, item.box_xyxy)):
        yield "D41_NOT_FINITE", item, 0, ""
        return
    # A box in the first pixel holds fractions, not pixels.
    if min(width, height) > 0 and all(0 <= number <= 1 for number in (x0, y0, width, height)):
        yield "D21_BOX_NORMALISED", item, 0, ""
        return
    if min(width, height) < 1:
        yield "D40_DEGENERATE_BOX", item, -min(width, height), ""
    overhang = max(-x0, -y0, x1 - record.width, y1 - record.height)
    if overhang > OUTSIDE_PX:
        yield "D20_BOX_OUTSIDE", item, overhang, ""
    cells = mask_size * max(width / record.width, height / record.height)
    if cells < 2:
        yield "D50_TOO_SMALL", item, 2 - cells, ""
    if item.area_px is not None:
        box_px = abs(width * height)  # what some tools state as the area
        mask_px = rle_area(item.rle) if has_mask(record, item) else min(item.area_px, box_px)
        outline_px = abs(width) + abs(height)  # a pixel more or less along it
        if not any(_is_near(item.area_px, area_px, outline_px) for area_px in (mask_px, box_px)):
            detail = f"{item.area_px:g} px stated, {mask_px:g} px drawn"
            yield "D24_AREA_DIFFERS", item, abs(item.area_px - mask_px), detail
    # Another fault of box or mask is left to its own check.
    if item.has_own_box and min(width, height) >= 1 and has_mask(record, item):
        tight = rle_box_xyxy(item.rle)
        if max(abs(a - b) for a, b in zip(item.box_xyxy, tight, strict=True)) <= ROUNDING_PX:
            return
        boxes = torch.tensor([item.box_xyxy, (x0, y0, width, height)], dtype=torch.float64)
        iou, iou_corners = box_iou(boxes, torch.tensor([tight], dtype=torch.float64))[:, 0].tolist()
        if iou < MIN_BOX_IOU:
            detail = "fit if read as [x0, y0, x1, y1]" if iou_corners >= MIN_BOX_IOU else ""
            yield "D22_BOX_OFF_MASK", item, 1 - iou, detail


def _is_near(area_px, other_px, outline_px):
    """Return whether two areas differ by rounding only."""
    difference = AREA_SHARE * max(area_px, other_px) + outline_px
    return math.isclose(area_px, other_px, rel_tol=0, abs_tol=difference)  # infinity is near none


def _mask_faults(record, item):
    """Yield the fault of one mask: malformed, missing, of the wrong size, or empty."""
    if item.mask_problem is not None:
        yield "D44_BAD_MASK", item, 0, item.mask_problem
    elif item.rle is None:
        yield "D45_NO_MASK", item, 0, ""
    elif not mask_fits_image(record, item):
        is_swapped = list(item.rle["size"]) == [record.width, record.height]
        yield "D43_MASK_SIZE", item, 0, "with width and height swapped" if is_swapped else ""
    elif rle_area(item.rle) == 0:
        yield "D42_EMPTY_MASK", item, 0, ""


def _doubles(objects):
    """Yield the objects of an image that another one of the same category repeats."""
    objects = [item for item in objects if all(map(math.isfinite, item.box_xyxy))]
    objects.sort(key=lambda item: item.box_xyxy)
    for index, item in enumerate(objects):
        end = item.box_xyxy[0] + SAME_EDGE_PX
        near = takewhile(lambda other, end=end: other.box_xyxy[0] <= end, objects[index + 1 :])
        yield from [other for other in near if _is_same(item, other)][:1]


def _is_same(first, second):
    """Return whether two annotations are of one object."""
    is_alike = first.category == second.category and first.is_crowd == second.is_crowd
    edges = zip(first.box_xyxy, second.box_xyxy, strict=True)
    if not is_alike or max(abs(a - b) for a, b in edges) > SAME_EDGE_PX:
        return False
    if first.rle is None or second.rle is None or first.rle["size"] != second.rle["size"]:
        return True
    return coco_mask.iou([first.rle], [second.rle], [0])[0, 0] >= SAME_MASK_IOU
