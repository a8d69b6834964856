"""Faults of image files: broken, of another size, in two splits, turned against their masks."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from helpers.checks.findings import Place, finding_at
from helpers.data.dataset import mask_fits_image
from helpers.data.images import near_pairs, open_upright, same_shape

WHAT_AND_FIX = {
    "D07_UNANNOTATED_IMAGE": (
        "have no annotation entry and are not used",
        "annotate them; if they show nothing, add an entry with an empty list",
    ),
    "D08_MISSING_IMAGE": (
        "have an annotation entry and no file",
        "restore the files or remove their entries",
    ),
    "D70_BROKEN_IMAGE": (
        "cannot be opened",
        "replace the files or remove them with their entries",
    ),
    "D71_IMAGE_SHAPE": (
        "have another shape than their annotation says",
        "annotate the upright images, or save them without an EXIF orientation",
    ),
    "D72_IMAGE_SCALED": (
        "are larger or smaller than stated, in the same shape",
        "nothing to do if boxes and masks are in the stated size",
    ),
    "D73_IMAGE_TURNED": (
        "carry an EXIF orientation, which is applied",
        "make sure that they were annotated upright, above all if they are square",
    ),
}


def check_images(split, pictures):
    """Compare image files with what the annotations say about them.

    Parameters
    ----------
    split : Split
    pictures : dict of pathlib.Path to helpers.data.images.Picture
        From `helpers.data.dataset.Dataset.look`.

    Returns
    -------
    list of Finding
        ``D07_UNANNOTATED_IMAGE``, ``D08_MISSING_IMAGE``, ``D70_BROKEN_IMAGE``,
        ``D71_IMAGE_SHAPE``, ``D72_IMAGE_SCALED``, ``D73_IMAGE_TURNED``.
    """
    places, details = defaultdict(list), defaultdict(list)
    for record in split.records:
        code, detail = _fault_of(record, pictures[record.path])
        if code is not None:
            places[code].append(Place(split.name, record.image_id, record.path))
            details[code].append(detail)
    code = "D07_UNANNOTATED_IMAGE"
    places[code] = [Place(split.name, path.name, path) for path in split.unannotated]
    findings = []
    for code, (what, fix) in WHAT_AND_FIX.items():
        detail = f" (the first: {details[code][0]})" if details[code] else ""
        findings += finding_at(
            code, places[code], f"{len(places[code])} images {what}{detail}", fix
        )
    return findings


def _fault_of(record, picture):
    """Return the code of what is wrong with an image file, or None, and a detail."""
    if not picture.digest and not record.path.is_file():
        return "D08_MISSING_IMAGE", str(record.path)
    if picture.problem is not None:
        return "D70_BROKEN_IMAGE", picture.problem
    size, stated = picture.size, (record.width, record.height)
    turn = "" if picture.orientation == 1 else f", EXIF orientation {picture.orientation}"
    detail = f"{size[0]} x {size[1]} upright{turn}, {stated[0]} x {stated[1]} stated"
    if not same_shape(size, stated):
        return "D71_IMAGE_SHAPE", detail
    if size != stated:
        return "D72_IMAGE_SCALED", detail
    return ("D73_IMAGE_TURNED" if turn else None), detail


def is_usable_picture(record, picture):
    """Return whether the training loader can take the image of a record."""
    return picture.size is not None and same_shape(picture.size, (record.width, record.height))


def check_leakage(splits, pictures):
    """Find images that are in two splits, as the same file or as a copy that looks the same.

    Parameters
    ----------
    splits : dict of str to Split
        By name.
    pictures : dict of pathlib.Path to helpers.data.images.Picture
        Of their images.

    Returns
    -------
    list of Finding
        ``D80_LEAKAGE``, one per pair of splits.
    """
    findings = []
    for first, second in combinations(splits, 2):
        same, similar = _shared(splits[first].records, splits[second].records, pictures)
        parts = [f"{len(same)} are the same files"] if same else []
        parts += [f"{len(similar)} look the same, as copies saved anew do"] if similar else []
        shared = [*same, *similar]
        findings += finding_at(
            "D80_LEAKAGE",
            [Place(second, record.image_id, record.path) for record in shared],
            f"{len(shared)} of {len(splits[second].records)} images of '{second}' are also in "
            f"'{first}': {', '.join(parts)}",
            "keep each photograph, and all its crops, in one split",
        )
    return findings


def _shared(first, second, pictures):
    """Return the records of `second` that `first` has byte for byte, and those it has by looks."""
    first, second = (
        [(record, pictures[record.path]) for record in records if pictures[record.path].size]
        for records in (first, second)
    )
    if not first or not second:
        return [], []
    digests = {picture.digest for _, picture in first}
    same = [record for record, picture in second if picture.digest in digests]
    looks = [np.stack([picture.look for _, picture in group]) for group in (first, second)]
    rows = sorted(set(near_pairs(*looks)[:, 1].tolist()))
    return same, [second[row][0] for row in rows if second[row][1].digest not in digests]


SIDE_PX = 256
"""Images and masks are compared at this size, as squares."""
RIM_PX = 5
"""Width of the rim around the objects that they are compared with."""


def turns():
    """List the eight ways to turn and mirror a square picture.

    Returns
    -------
    dict of str to callable
        The first one leaves the picture as it is; each takes an array and returns it turned.
    """
    names = ("as it is", "turned by 90", "turned by 180", "turned by 270")
    found = {}
    for quarter, name in enumerate(names):
        found[name] = lambda pixels, quarter=quarter: np.rot90(pixels, quarter)
    for quarter, name in enumerate(names):
        found[f"mirrored, {name}"] = lambda pixels, quarter=quarter: np.rot90(
            pixels[:, ::-1], quarter
        )
    return found


def contrast(grey, mask):
    """Measure how much the marked pixels differ from a rim around them.

    Parameters
    ----------
    grey : numpy.ndarray
        (S, S) brightness.
    mask : numpy.ndarray
        (S, S) uint8 of 0 and 1.

    Returns
    -------
    float
        Difference of the means in standard deviations of the rim; NaN without mask or rim.
    """
    kernel = np.ones((2 * RIM_PX + 1, 2 * RIM_PX + 1), np.uint8)
    inside = mask.astype(bool)
    rim = cv2.dilate(mask, kernel).astype(bool) & ~inside
    if not inside.any() or not rim.any():
        return float("nan")
    return float(abs(grey[inside].mean() - grey[rim].mean()) / max(grey[rim].std(), 1.0))


def contrast_per_turn(records):
    """Measure the contrast of annotated masks on images turned in each of the eight ways.

    Parameters
    ----------
    records : sequence of helpers.data.records.ImageRecord
        Those without a mask of the size of the image are left out.

    Returns
    -------
    dict of str to numpy.ndarray
        Name of the turn, see `turns`, to one contrast per image. Where annotations lie on what
        they name, the untouched image has by far the highest.

    Raises
    ------
    InputError
        If an image cannot be opened.
    """
    values = {name: [] for name in turns()}
    for record in records:
        rles = [item.rle for item in record.objects if mask_fits_image(record, item)]
        if not rles:
            continue
        picture = np.asarray(open_upright(record.path).convert("L").resize((SIDE_PX, SIDE_PX)))
        mask = cv2.resize(
            coco_mask.decode(coco_mask.merge(rles)),
            (SIDE_PX, SIDE_PX),
            interpolation=cv2.INTER_NEAREST,
        )
        for name, turn in turns().items():
            values[name].append(contrast(turn(picture).astype(np.float32), mask))
    return {name: np.array(found) for name, found in values.items()}
