"""Faults that show in the annotations alone: crowd flags, boxes, masks, sizes."""

from __future__ import annotations

import math

import torch
from torchvision.ops import box_iou

from helpers.checks.findings import Place, finding_at
from helpers.data.dataset import mask_fits_image
from helpers.data.masks import rle_area, rle_box_xyxy

MIN_BOX_IOU = 0.8  # between a box and the tight box of its own mask
ROUNDING_PX = 2.0  # an edge may be this far from the mask's: label tools round
OUTSIDE_PX = 1.0  # a box may leave its image by this much, for the same reason


def object_place(split, record, item, badness=0.0):
    """Point at one object.

    Parameters
    ----------
    split : Split
        Gives its name.
    record : ImageRecord
        Gives image and path.
    item : ObjectAnnotation
        Gives annotation and box.
    badness : float
        As in `helpers.checks.findings.Place`.

    Returns
    -------
    Place
        For a finding.
    """
    return Place(
        split.name, record.image_id, record.path, item.annotation_id, item.box_xyxy, badness
    )


def box_sides(item):
    """Measure a box.

    Parameters
    ----------
    item : ObjectAnnotation
        Any object.

    Returns
    -------
    tuple of float
        (width, height) in pixels as in the file, negative for swapped corners.
    """
    x0, y0, x1, y1 = item.box_xyxy
    return x1 - x0, y1 - y0


def is_usable(item):
    """Tell whether the numbers of a box can be pixels at all.

    Parameters
    ----------
    item : ObjectAnnotation
        Any object.

    Returns
    -------
    bool
        False for NaN, infinity, and a box inside the first pixel, whose numbers are fractions.
    """
    return _is_finite(item) and not _is_normalised(item)


def _is_finite(item):
    """Tell whether all four numbers of a box are finite."""
    return all(math.isfinite(number) for number in item.box_xyxy)


def _is_normalised(item):
    """Tell whether a box lies in the first pixel: then its numbers are fractions, not pixels."""
    numbers = (*item.box_xyxy[:2], *box_sides(item))
    return all(0 <= number <= 1 for number in numbers) and min(box_sides(item)) > 0


def _overhang(record, item):
    """Return by how many pixels a box leaves its image, at most 0 if it does not."""
    x0, y0, x1, y1 = item.box_xyxy
    return max(-x0, -y0, x1 - record.width, y1 - record.height)


def check_box_numbers(split, objects):
    """Find boxes that are not finite, not in pixels, without area, or outside their image.

    Parameters
    ----------
    split : Split
        For the places.
    objects : list of (ImageRecord, ObjectAnnotation)
        What to look at.

    Returns
    -------
    list of Finding
        ``D41_NOT_FINITE``, ``D21_BOX_NORMALISED``, ``D40_DEGENERATE_BOX``, ``D20_BOX_OUTSIDE``.
    """
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
    """Compare each box with the tight box of its own mask, which catches a wrong box format.

    Parameters
    ----------
    split : Split
        For the places.
    objects : list of (ImageRecord, ObjectAnnotation)
        What to look at; objects with another fault of box or mask are left to that check.

    Returns
    -------
    list of Finding
        ``D22_BOX_OFF_MASK``, ``D23_BOX_FROM_MASK``.
    """
    derived = [
        object_place(split, record, item) for record, item in objects if not item.has_own_box
    ]
    off, as_corners, compared = [], 0, 0
    for record, item in objects:
        if not (item.has_own_box and is_usable(item) and mask_fits_image(record, item)):
            continue
        if min(box_sides(item)) < 1 or rle_area(item.rle) == 0:
            continue
        compared += 1
        tight = rle_box_xyxy(item.rle)
        if max(abs(a - b) for a, b in zip(item.box_xyxy, tight, strict=True)) <= ROUNDING_PX:
            continue
        corners = (
            *item.box_xyxy[:2],
            *box_sides(item),
        )  # the file's numbers, read as x0, y0, x1, y1
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


def check_annotations(split, *, mask_size, num_queries):
    """Run every check that needs no image.

    Parameters
    ----------
    split : Split
        From `helpers.data.coco.read_split`.
    mask_size : int
        Cells per side of the model's mask grid.
    num_queries : int
        Objects the model can find per prompt.

    Returns
    -------
    list of Finding
        At most one per code.
    """
    objects = [(r, item) for r in split.records for item in r.objects if not item.is_crowd]
    return [
        *check_crowds(split),
        *check_box_numbers(split, objects),
        *check_boxes_fit_masks(split, objects),
        *check_masks(split, objects),
        *check_sizes(split, objects, mask_size, num_queries),
    ]


def check_crowds(split):
    """Find crowd regions, and images in which they leave a present category without objects.

    Parameters
    ----------
    split : Split
        All its objects are looked at.

    Returns
    -------
    list of Finding
        ``D10_ALL_CROWD``, ``D11_CROWD``.
    """
    crowds, emptied, total = [], [], 0
    for record in split.records:
        total += len(record.objects)
        kept = {item.category for item in record.objects if not item.is_crowd}
        for item in record.objects:
            if item.is_crowd:
                crowds.append(object_place(split, record, item))
                if item.category not in kept:
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


def check_masks(split, objects):
    """Find masks that are malformed, of the wrong size, empty, or missing.

    Parameters
    ----------
    split : Split
        For the places.
    objects : list of (ImageRecord, ObjectAnnotation)
        What to look at.

    Returns
    -------
    list of Finding
        ``D44_BAD_MASK``, ``D43_MASK_SIZE``, ``D42_EMPTY_MASK``, ``D45_NO_MASK``.
    """
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
            f"{len(missing)} of {total} objects have a box only and teach no outline",
            "add a segmentation, or expect boxes only",
        ),
    ]


def check_sizes(split, objects, mask_size, num_queries):
    """Find objects too small for the mask grid and prompts with more objects than queries.

    Parameters
    ----------
    split : Split
        For the places.
    objects : list of (ImageRecord, ObjectAnnotation)
        What to look at.
    mask_size : int
        Cells per side of the mask grid.
    num_queries : int
        Objects the model can find per prompt.

    Returns
    -------
    list of Finding
        ``D50_TOO_SMALL``, ``D51_TOO_MANY``.
    """
    small, per_prompt = [], {}
    for record, item in objects:
        per_prompt.setdefault((record.image_id, item.category), []).append(record)
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
