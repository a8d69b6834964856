"""Faults that show in the annotations alone: crowd flags, boxes, masks, sizes, doubles."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

from helpers.checks.findings import Place, finding_at
from helpers.data.masks import rle_area, rle_box_xyxy
from helpers.data.records import has_mask, mask_fits_image

MIN_BOX_IOU = 0.8  # between a box and the tight box of its own mask
ROUNDING_PX = 2.0  # an edge may be this far from the mask's: label tools round
OUTSIDE_PX = 1.0  # a box may leave its image by this much, for the same reason
SAME_EDGE_PX = 1.0  # two boxes of one object may be this far apart, for the same reason
SAME_MASK_IOU = 0.9  # two masks of one object overlap by at least this
AREA_SHARE = 0.2  # an area may differ from its mask's by this share and a pixel along the outline
MAX_COVER = 0.6  # mean share of its images that an object class, other than a ground, covers


def check_annotations(split, *, mask_size, num_queries):
    """Run every check that needs no image, for a model with that mask grid and number of queries."""
    objects = [(r, item) for r in split.records for item in r.objects if not item.is_crowd]
    return [
        *check_crowds(split),
        *check_box_numbers(split, objects),
        *check_boxes_fit_masks(split, objects),
        *check_masks(split, objects),
        *check_areas(split, objects),
        *check_doubles(split),
        *check_sizes(split, objects, mask_size, num_queries),
        *check_cover(split, objects),
    ]


def object_place(split, record, item, badness=0.0):
    """Point at one object."""
    return Place(
        split.name, record.image_id, record.path, item.annotation_id, item.box_xyxy, badness
    )


def box_sides(item):
    """Return (width, height) of a box in pixels as in the file, negative for swapped corners."""
    x0, y0, x1, y1 = item.box_xyxy
    return x1 - x0, y1 - y0


def is_usable(item):
    """Return whether the numbers of a box can be pixels at all."""
    return _is_finite(item) and not _is_normalised(item)


def _is_finite(item):
    """Return whether all four numbers of a box are finite."""
    return all(math.isfinite(number) for number in item.box_xyxy)


def _is_normalised(item):
    """Return whether a box lies in the first pixel: then its numbers are fractions, not pixels."""
    numbers = (*item.box_xyxy[:2], *box_sides(item))
    return all(0 <= number <= 1 for number in numbers) and min(box_sides(item)) > 0


def _overhang(record, item):
    """Return by how many pixels a box leaves its image, at most 0 if it does not."""
    x0, y0, x1, y1 = item.box_xyxy
    return max(-x0, -y0, x1 - record.width, y1 - record.height)


def check_crowds(split):
    """Find crowd regions, and images in which they leave a category without objects: D10, D11."""
    crowds, emptied, total = [], [], 0
    for record in split.records:
        total += len(record.objects)
        single = {item.category for item in record.objects if not item.is_crowd}
        for item in record.objects:
            if item.is_crowd:
                crowds.append(object_place(split, record, item))
                if item.category not in single:
                    emptied.append(object_place(split, record, item))
    return [
        *finding_at(
            "D10_ALL_CROWD",
            emptied,
            f"{len(emptied)} annotations with iscrowd 1 are all there is of their category in "
            "their image; a loader that drops crowds then asks for a present thing as if absent",
            "set iscrowd to 0 on masks of single objects",
        ),
        *finding_at(
            "D11_CROWD",
            crowds,
            f"{len(crowds)} of {total} annotations have iscrowd 1 and are no targets",
            "set iscrowd to 0 unless the region really holds many objects",
        ),
    ]


def check_box_numbers(split, objects):
    """Find boxes that are not finite, not in pixels, without area, or outside: D41, D21, D40, D20."""
    infinite, normalised, thin, outside, farthest = [], [], [], [], 0.0
    for record, item in objects:
        if not _is_finite(item):
            infinite.append(object_place(split, record, item))
        elif _is_normalised(item):
            normalised.append(object_place(split, record, item))
        else:
            if min(box_sides(item)) < 1:
                thin.append(object_place(split, record, item, -min(box_sides(item))))
            overhang = _overhang(record, item)
            if overhang > OUTSIDE_PX:
                farthest = max(farthest, overhang)
                outside.append(object_place(split, record, item, overhang))
    total = len(objects)
    return [
        *finding_at(
            "D41_NOT_FINITE",
            infinite,
            f"{len(infinite)} of {total} boxes hold NaN or infinity",
            "write x, y, width, height in pixels or remove the annotation",
        ),
        *finding_at(
            "D21_BOX_NORMALISED",
            normalised,
            f"{len(normalised)} of {total} boxes have numbers between 0 and 1 only",
            "multiply x and width by the image's width, y and height by its height",
        ),
        *finding_at(
            "D40_DEGENERATE_BOX",
            thin,
            f"{len(thin)} of {total} boxes are less than 1 pixel wide or high",
            "draw the box again or remove the annotation",
        ),
        *finding_at(
            "D20_BOX_OUTSIDE",
            outside,
            f"{len(outside)} of {total} boxes leave their image, the farthest by {farthest:.0f} px",
            "write [x, y, width, height] in pixels of this image, not [x0, y0, x1, y1]",
        ),
    ]


def check_boxes_fit_masks(split, objects):
    """Compare each box with the tight box of its mask, which finds a wrong box format: D22, D23."""
    derived = [
        object_place(split, record, item) for record, item in objects if not item.has_own_box
    ]
    off, as_corners, compared = [], 0, 0
    for record, item in objects:  # another fault of box or mask is left to its own check
        if not (item.has_own_box and is_usable(item) and has_mask(record, item)):
            continue
        if min(box_sides(item)) < 1:
            continue
        compared += 1
        tight = rle_box_xyxy(item.rle)
        if max(abs(a - b) for a, b in zip(item.box_xyxy, tight, strict=True)) <= ROUNDING_PX:
            continue
        corners = (*item.box_xyxy[:2], *box_sides(item))  # the numbers read as x0, y0, x1, y1
        iou, iou_corners = box_iou(
            torch.tensor([item.box_xyxy, corners], dtype=torch.float64),
            torch.tensor([tight], dtype=torch.float64),
        )[:, 0].tolist()
        if iou < MIN_BOX_IOU:
            off.append(object_place(split, record, item, 1 - iou))
            as_corners += iou_corners >= MIN_BOX_IOU
    hint = f"; {as_corners} of them fit if read as [x0, y0, x1, y1]" if as_corners else ""
    return [
        *finding_at(
            "D22_BOX_OFF_MASK",
            off,
            f"{len(off)} of {compared} boxes overlap the tight box of their own mask by less than "
            f"{MIN_BOX_IOU} (IoU){hint}",
            "write [x, y, width, height] in pixels around the mask",
        ),
        *finding_at(
            "D23_BOX_FROM_MASK",
            derived,
            f"{len(derived)} of {len(objects)} objects have no bbox; the tight box of the mask is used",
            "nothing to do if the masks are right",
        ),
    ]


def check_masks(split, objects):
    """Find masks that are malformed, of the wrong size, empty, or missing: D44, D43, D42, D45."""
    bad, sized, empty, missing, reasons, swapped = [], [], [], [], [], 0
    for record, item in objects:
        if item.mask_problem is not None:
            bad.append(object_place(split, record, item))
            reasons.append(item.mask_problem)
        elif item.rle is None:
            missing.append(object_place(split, record, item))
        elif not mask_fits_image(record, item):
            sized.append(object_place(split, record, item))
            swapped += list(item.rle["size"]) == [record.width, record.height]
        elif rle_area(item.rle) == 0:
            empty.append(object_place(split, record, item))
    total = len(objects)
    hint = f", {swapped} of them with width and height swapped" if swapped else ""
    boxes_only = len(missing) == total
    return [
        *finding_at(
            "D44_BAD_MASK",
            bad,
            f"{len(bad)} of {total} segmentations are malformed (the first: {(reasons or [''])[0]})",
            "export polygons or run lengths of this image again",
        ),
        *finding_at(
            "D43_MASK_SIZE",
            sized,
            f"{len(sized)} of {total} masks have another size than their image{hint}",
            "write size as [height, width] of the image the mask was drawn on",
        ),
        *finding_at(
            "D42_EMPTY_MASK",
            empty,
            f"{len(empty)} of {total} masks have no pixel",
            "draw the mask again or remove the annotation",
        ),
        *finding_at(
            "D45_NO_MASK",
            missing,
            f"{len(missing)} of {total} objects have a box only and teach no outline"
            + ("; the mask decoder has nothing to learn from" if boxes_only else ""),
            "leave the mask decoder out with lora.apply_to_mask_decoder=false, or add segmentations"
            if boxes_only
            else "add a segmentation, or expect boxes only",
        ),
    ]


def check_areas(split, objects):
    """Compare the stated area of each object with that of its mask or box: D24."""
    differing, examples = [], []
    for record, item in objects:
        if item.area_px is None or not is_usable(item):
            continue
        width, height = map(abs, box_sides(item))
        box_px = width * height  # what some tools state as the area
        mask_px = rle_area(item.rle) if has_mask(record, item) else min(item.area_px, box_px)
        outline_px = width + height  # a pixel more or less along it
        if any(_is_near(item.area_px, area_px, outline_px) for area_px in (mask_px, box_px)):
            continue
        differing.append(object_place(split, record, item, abs(item.area_px - mask_px)))
        examples.append(f"{item.area_px:g} px stated, {mask_px:g} px drawn")
    return finding_at(
        "D24_AREA_DIFFERS",
        differing,
        f"{len(differing)} of {len(objects)} areas differ from what is drawn (the first: "
        f"{(examples or [''])[0]}): box, mask or image may be of another size",
        "look at these objects; if they are right, write the area anew",
    )


def _is_near(area_px, other_px, outline_px):
    """Return whether two areas differ by rounding only."""
    return abs(area_px - other_px) <= AREA_SHARE * max(area_px, other_px) + outline_px


def check_doubles(split):
    """Find objects that are annotated again in the same image and category: D46."""
    doubles, total = [], 0
    for record in split.records:
        objects = sorted(
            (item for item in record.objects if _is_finite(item)), key=lambda item: item.box_xyxy
        )
        total += len(objects)
        for index, item in enumerate(objects):
            for other in objects[index + 1 :]:
                if other.box_xyxy[0] - item.box_xyxy[0] > SAME_EDGE_PX:
                    break
                if _is_same(item, other):
                    doubles.append(object_place(split, record, other))
                    break
    return finding_at(
        "D46_ANNOTATED_TWICE",
        doubles,
        f"{len(doubles)} of {total} objects are annotated twice, so that two queries are taught "
        "to find each",
        "remove the doubles; two exports may have been joined",
    )


def _is_same(first, second):
    """Return whether two annotations are of one object."""
    if first.category != second.category or first.is_crowd != second.is_crowd:
        return False
    edges = zip(first.box_xyxy, second.box_xyxy, strict=True)
    if max(abs(a - b) for a, b in edges) > SAME_EDGE_PX:
        return False
    if first.rle is None or second.rle is None or first.rle["size"] != second.rle["size"]:
        return True
    return coco_mask.iou([first.rle], [second.rle], [0])[0, 0] >= SAME_MASK_IOU


def check_sizes(split, objects, mask_size, num_queries):
    """Find objects too small for the mask grid, and prompts with too many objects: D50, D51."""
    small, per_prompt = [], defaultdict(list)
    for record, item in objects:
        per_prompt[record.image_id, item.category].append(record)
        if is_usable(item):
            width, height = box_sides(item)
            cells = mask_size * max(width / record.width, height / record.height)
            if cells < 2:
                small.append(object_place(split, record, item, 2 - cells))
    crowded = [
        Place(split.name, image_id, records[0].path, badness=len(records))
        for (image_id, _), records in per_prompt.items()
        if len(records) > num_queries
    ]
    most = int(max((place.badness for place in crowded), default=0))
    return [
        *finding_at(
            "D50_TOO_SMALL",
            small,
            f"{len(small)} of {len(objects)} objects span less than 2 of the {mask_size} cells",
            "cut the images into tiles, or raise the resolution",
        ),
        *finding_at(
            "D51_TOO_MANY",
            crowded,
            f"{len(crowded)} prompts have more than {num_queries} objects, at most {most}",
            "cut the images into tiles",
        ),
    ]


def check_cover(split, objects):
    """Find categories whose masks cover most of their images, as inverted masks do: D52."""
    rles, covers, findings = defaultdict(list), defaultdict(list), []
    for record, item in objects:
        if has_mask(record, item):
            rles[item.category, record.image_id].append((record, item.rle))
    for (category, _), group in rles.items():
        record = group[0][0]
        area_px = rle_area(coco_mask.merge([rle for _, rle in group]))
        share = area_px / (record.width * record.height)
        covers[category].append(Place(split.name, record.image_id, record.path, badness=share))
    for category, places in covers.items():
        mean = np.mean([place.badness for place in places])
        if mean > MAX_COVER:
            findings += finding_at(
                "D52_COVERS_PICTURE",
                places,
                f"'{category}' covers {mean:.0%} of its {len(places)} images on average",
                "look at the masks: background and object may be exchanged",
            )
    return findings
