"""Find out from pixels whether annotations were made on turned or mirrored images."""

from __future__ import annotations

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from helpers.images import open_upright
from helpers.targets import mask_fits_image

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
    records : sequence of helpers.records.ImageRecord
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
