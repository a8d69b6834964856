"""Faults of the image files: missing, broken, turned, or the same one in two splits."""

from __future__ import annotations

import hashlib
from itertools import combinations

from helpers.datasets import same_shape
from helpers.errors import InputError
from helpers.findings import Place, finding_at
from helpers.images import open_upright, upright_size


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
    missing, broken, shape, scaled, turned, digests = [], [], [], [], [], {}
    reasons, shapes = [], []
    for record in split.records:
        bar.update()
        place = Place(split.name, record.image_id, record.path)
        if not record.path.is_file():
            missing.append(place)
            continue
        try:
            size = open_upright(record.path).size
            orientation = upright_size(record.path)[1]
        except InputError as error:
            broken.append(place)
            reasons.append(error.message)
            continue
        digests[hashlib.sha256(record.path.read_bytes()).hexdigest()] = record
        stated = (record.width, record.height)
        if not same_shape(size, stated):
            shape.append(place)
            shapes.append(
                f"{size[0]} x {size[1]} upright against {stated[0]} x {stated[1]} stated"
                + (f", EXIF orientation {orientation}" if orientation != 1 else "")
            )
        elif size != stated:
            scaled.append(place)
        elif orientation != 1:
            turned.append(place)
    unlisted = [Place(split.name, path.name, path) for path in split.unannotated]
    total = len(split.records)
    findings = [
        *finding_at(
            "D07_UNANNOTATED_IMAGE",
            unlisted,
            f"{len(unlisted)} images have no annotation entry and are not used",
            "annotate them; if they show nothing, add an entry with an empty list",
        ),
        *finding_at(
            "D08_MISSING_IMAGE",
            missing,
            f"{len(missing)} of {total} annotated images are not in the folder",
            "restore the files or remove their entries",
        ),
        *finding_at(
            "D70_BROKEN_IMAGE",
            broken,
            f"{len(broken)} of {total} images cannot be opened (the first {(reasons or [''])[0]})",
            "replace the files or remove them with their entries",
        ),
        *finding_at(
            "D71_IMAGE_SHAPE",
            shape,
            f"{len(shape)} of {total} images have another shape than stated (the first "
            f"{(shapes or [''])[0]})",
            "annotate the upright images, or save them without an EXIF orientation",
        ),
        *finding_at(
            "D72_IMAGE_SCALED",
            scaled,
            f"{len(scaled)} of {total} images are larger or smaller than stated, in the same shape",
            "nothing to do if boxes and masks are in the stated size",
        ),
        *finding_at(
            "D73_IMAGE_TURNED",
            turned,
            f"{len(turned)} of {total} images carry an EXIF orientation, which is applied",
            "make sure that they were annotated upright, above all if they are square",
        ),
    ]
    return findings, digests


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
