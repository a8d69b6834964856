"""Turn annotated objects into the tensors the loss compares predictions with."""

from __future__ import annotations

import math

import torch
from torchvision.ops import box_convert

from helpers.segmentations import masks_on_grid, rle_area


def clip_box(box_xyxy, width, height):
    """Clip a box to its image.

    Parameters
    ----------
    box_xyxy : tuple of float
        Pixels.
    width, height : int
        Size of the image in pixels.

    Returns
    -------
    tuple of float or None
        The part of the box inside the image in pixels; None if a side is zero or negative there
        or a number is not finite.
    """
    if not all(math.isfinite(number) for number in box_xyxy):
        return None
    x0, y0, x1, y1 = box_xyxy
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def object_targets(objects, record, mask_size):
    """Build what the loss compares n objects of one image with.

    Parameters
    ----------
    objects : list of ObjectAnnotation
        Each with a box that keeps an area inside the image.
    record : ImageRecord
        The image; its size normalises the boxes.
    mask_size : int
        Cells per side of the mask grid.

    Returns
    -------
    dict
        ``boxes_cxcywh`` float32 ``(n, 4)`` in [0, 1], clipped to the image; ``masks`` uint8
        ``(n, mask_size, mask_size)``; ``mask_valid`` bool ``(n,)``, False for an object without a
        mask of this image's size that has a pixel in it, whose ``masks`` are zero.
    """
    boxes_xyxy = [clip_box(item.box_xyxy, record.width, record.height) for item in objects]
    scale = torch.tensor([record.width, record.height, record.width, record.height])
    boxes_cxcywh = box_convert(
        torch.tensor(boxes_xyxy, dtype=torch.float32).reshape(-1, 4) / scale, "xyxy", "cxcywh"
    )
    valid = [mask_fits_image(record, item) and rle_area(item.rle) > 0 for item in objects]
    masks = torch.zeros((len(objects), mask_size, mask_size), dtype=torch.uint8)
    rles = [item.rle for item, usable in zip(objects, valid, strict=True) if usable]
    mask_valid = torch.tensor(valid, dtype=torch.bool)
    masks[mask_valid] = masks_on_grid(rles, mask_size)
    return {"boxes_cxcywh": boxes_cxcywh, "masks": masks, "mask_valid": mask_valid}


def mask_fits_image(record, item):
    """Tell whether an object has a mask of the size of its image.

    Parameters
    ----------
    record : ImageRecord
        The image.
    item : ObjectAnnotation
        An object in it.

    Returns
    -------
    bool
        False without a readable mask.
    """
    return item.rle is not None and list(item.rle["size"]) == [record.height, record.width]
