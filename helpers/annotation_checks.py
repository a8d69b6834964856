"""Faults that show in the annotations alone: crowd flags, boxes, masks, sizes."""

from __future__ import annotations

from helpers.box_checks import (
    box_sides,
    check_box_numbers,
    check_boxes_fit_masks,
    is_usable,
    object_place,
)
from helpers.findings import Place, finding_at
from helpers.segmentations import rle_area
from helpers.targets import mask_fits_image


def check_annotations(split, *, mask_size, num_queries):
    """Run every check that needs no image.

    Parameters
    ----------
    split : Split
        From `helpers.annotations.read_split`.
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
