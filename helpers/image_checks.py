"""Faults of the image files: missing, broken, turned, or the same one in two splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from itertools import combinations

from helpers.errors import InputError
from helpers.findings import Place, finding_at
from helpers.images import open_upright, same_shape, upright_size

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


def check_images(split, bar):
    """Open every image file and compare it with what the annotations say about it.

    Parameters
    ----------
    split : Split
        Its images are decoded one after the other.
    bar : tqdm.tqdm
        Advanced by one per image.

    Returns
    -------
    findings : list of Finding
        ``D07_UNANNOTATED_IMAGE``, ``D08_MISSING_IMAGE``, ``D70_BROKEN_IMAGE``,
        ``D71_IMAGE_SHAPE``, ``D72_IMAGE_SCALED``, ``D73_IMAGE_TURNED``.
    digests : dict of str to ImageRecord
        By SHA-256 of the file.
    """
    places, details, digests = defaultdict(list), defaultdict(list), {}
    for record in split.records:
        bar.update()
        code, detail = _look_at(record)
        if code is not None:
            places[code].append(Place(split.name, record.image_id, record.path))
            details[code].append(detail)
        if code not in ("D08_MISSING_IMAGE", "D70_BROKEN_IMAGE"):
            digests[hashlib.sha256(record.path.read_bytes()).hexdigest()] = record
    code = "D07_UNANNOTATED_IMAGE"
    places[code] = [Place(split.name, path.name, path) for path in split.unannotated]
    findings = []
    for code, (what, fix) in WHAT_AND_FIX.items():
        detail = f" (the first: {details[code][0]})" if details[code] else ""
        findings += finding_at(
            code, places[code], f"{len(places[code])} images {what}{detail}", fix
        )
    return findings, digests


def _look_at(record):
    """Return the code of what is wrong with one image file, or None, and a detail."""
    if not record.path.is_file():
        return "D08_MISSING_IMAGE", str(record.path)
    try:
        size = open_upright(record.path).size
        _, orientation = upright_size(record.path)
    except InputError as error:
        return "D70_BROKEN_IMAGE", error.message
    stated = (record.width, record.height)
    turn = "" if orientation == 1 else f", EXIF orientation {orientation}"
    detail = f"{size[0]} x {size[1]} upright{turn}, {stated[0]} x {stated[1]} stated"
    if not same_shape(size, stated):
        return "D71_IMAGE_SHAPE", detail
    if size != stated:
        return "D72_IMAGE_SCALED", detail
    return ("D73_IMAGE_TURNED" if turn else None), detail


def check_leakage(splits, digests):
    """Find files that are in two splits, byte for byte.

    Parameters
    ----------
    splits : dict of str to Split
        By name.
    digests : dict of str to dict
        By name of the split, from `check_images`.

    Returns
    -------
    list of Finding
        ``D80_LEAKAGE``, one per pair of splits.
    """
    findings = []
    for first, second in combinations(digests, 2):
        shared = [digests[second][key] for key in digests[second] if key in digests[first]]
        findings += finding_at(
            "D80_LEAKAGE",
            [Place(second, record.image_id, record.path) for record in shared],
            f"{len(shared)} of {len(splits[second].records)} images of '{second}' are also in "
            f"'{first}'",
            "keep each photograph, and all its crops, in one split",
        )
    return findings
