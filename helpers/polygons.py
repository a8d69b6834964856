"""What the corners of a polygon mean: points on the outline, or pixels that belong to the object.

COCO's polygons are outlines: a square of 4 pixels reaches from 2 to 6. A contour that OpenCV traced
names the outermost pixels, 2 to 5, and whoever reads it as an outline loses half a pixel all around:
a pothole keeps an IoU of 0.97, a crack 0.77, and a crack of one pixel vanishes.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from helpers.errors import InputError
from helpers.segmentations import mask_to_rle

MEANINGS = ("auto", "outline", "pixels")
PRECISION = 1e-5
"""Share of the image's side by which a coordinate of five decimals may miss what was meant."""


def settle_polygons(source, meaning="auto"):
    """Turn polygons whose corners are pixels into masks; leave outlines as they are.

    Parameters
    ----------
    source : helpers.source_data.Source
    meaning : {"auto", "outline", "pixels"}
        With ``auto``, corners are pixels if all of them are whole numbers, as traced contours
        are; hand-drawn polygons of today's tools are not.

    Returns
    -------
    helpers.source_data.Source
        With a note if polygons were taken for pixels.

    Raises
    ------
    InputError
        For another meaning.
    """
    if meaning not in MEANINGS:
        raise InputError(f"polygons are {meaning!r}", fix=f"use one of {', '.join(MEANINGS)}")
    if meaning == "outline" or (meaning == "auto" and not _all_whole(source)):
        return source
    splits = {
        name: [
            replace(image, objects=tuple(_filled(item, image) for item in image.objects))
            for image in images
        ]
        for name, images in source.splits.items()
    }
    note = "corners of polygons are whole pixels, which belong to the object; see --polygons"
    return replace(source, splits=splits, notes=(*source.notes, note))


def _all_whole(source):
    """Tell whether there are polygons and all their corners are whole numbers."""
    seen = False
    for images in source.splits.values():
        for image in images:
            limit = PRECISION * max(image.width, image.height)
            for item in image.objects:
                for corners in _polygons(item):
                    seen = True
                    if (np.abs(corners - np.round(corners)) > limit).any():
                        return False
    return seen


def _polygons(item):
    """Return the polygons of an entry as arrays; none where it has run lengths or a box."""
    segmentation = item.get("segmentation")
    return [np.asarray(part) for part in segmentation] if isinstance(segmentation, list) else []


def _filled(item, image):
    """Fill the polygons of an entry, their border pixels included."""
    polygons = _polygons(item)
    if not polygons:
        return item
    mask = np.zeros((image.height, image.width), dtype=np.uint8)
    for corners in polygons:  # one by one: together, overlapping parts would cancel each other
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32).reshape(-1, 1, 2)], 1)
    return {**item, "segmentation": mask_to_rle(mask)}
