"""Masks and boxes of objects: COCO segmentations in, run lengths and the model's grid out."""

import math

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate
from torchvision.ops import masks_to_boxes

from helpers.data.images import MAX_PIXELS

TOUCHED_BELOW = 0.5  # share of an object's area under which all cells that it touches are kept


def segmentation_to_rle(segmentation, height, width):
    """Return polygons ``[[x, y, ...], ...]`` or COCO's runs as compressed RLE, else a ValueError."""
    # pycocotools decodes run lengths that do not fill their size into arbitrary memory. Run lengths
    # keep their own size, even a wrong one, for the checks to name.
    if isinstance(segmentation, dict):
        return _rle_from_runs(segmentation)
    if height * width > MAX_PIXELS:
        raise ValueError(f"its image is said to be {width} x {height} pixels large")
    if not isinstance(segmentation, list):
        raise ValueError(f"it is a {type(segmentation).__name__}, not polygons or run lengths")
    if all(isinstance(number, int | float) for number in segmentation):
        raise ValueError("it is a flat list of numbers; a polygon is a list inside the list")
    for part in segmentation:
        if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
            raise ValueError("a polygon needs an even count of at least 6 numbers")
        are_numbers = set(map(type, part)) <= {int, float} and all(map(math.isfinite, part))
        if not are_numbers or max(map(abs, part)) > 100 * max(height, width):
            raise ValueError("a polygon holds something that is no coordinate of this image")
    return _as_text(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def _as_text(rle):
    """Return a compressed RLE of pycocotools with its counts as text."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _rle_from_runs(segmentation):
    """Check run lengths against their own size and compress them."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    is_list = isinstance(size, list) and len(size) == 2
    if not is_list or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"its size is {size!r}, not [height, width]")
    if math.prod(size) > MAX_PIXELS:
        raise ValueError(f"its size {size} is more than {MAX_PIXELS / 1e6:.0f} megapixels")
    if isinstance(counts, str):
        runs = compressed_runs(counts)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        runs = counts
    else:
        raise ValueError("its counts are neither whole numbers nor compressed text")
    area = math.prod(size)
    if any(run < 0 for run in runs) or sum(runs) != area:
        raise ValueError(f"its runs cover {sum(runs)} pixels, its size {size} has {area}")
    if isinstance(counts, list):
        return _as_text(coco_mask.frPyObjects({"size": size, "counts": counts}, *size))
    return {"size": list(size), "counts": counts}


def compressed_runs(counts):
    """Return the run lengths in COCO's compressed text, background first, down the columns."""
    # A character carries 5 bits, lowest first, and a bit saying that more follow; from the fourth
    # run on, the difference to the run two before is stored.
    runs, value, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its counts hold the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign bit of the last group
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("its counts end in the middle of a number")
    return runs


def mask_to_rle(mask):
    """Encode a mask (h, w) of bool or 0 and 1 as ``{"size": [h, w], "counts": str}``."""
    return _as_text(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def rle_area(rle):
    """Return the number of foreground pixels of a compressed RLE as an int."""
    return int(coco_mask.area(rle))


def rle_box_xyxy(rle):
    """Return the tight box (x0, y0, x1, y1) of a mask with a pixel; x1 and y1 lie just past it."""
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    return (x, y, x + width, y + height)


def masks_on_grid(rles, mask_size):
    """Decode n RLEs and shrink them to uint8 (n, mask_size, mask_size), of any size each."""
    # A cell is foreground if at least half of it is covered. Where this keeps less than half of an
    # object's area, as with a crack thinner than a cell, every cell it touches is kept instead.
    masks = torch.zeros((len(rles), mask_size, mask_size), dtype=torch.uint8)
    for index, rle in enumerate(rles):
        full = torch.from_numpy(np.ascontiguousarray(coco_mask.decode(rle))).float()
        coverage = interpolate(full[None, None], (mask_size, mask_size), mode="area")[0, 0]
        cells = coverage >= 0.5
        if cells.sum() < TOUCHED_BELOW * coverage.sum():
            cells = coverage > 0
        masks[index] = cells
    return masks


def tight_boxes(masks):
    """Return the tight boxes of masks (n, h, w), corners as fractions."""
    height, width = masks.shape[-2:]
    corners = masks_to_boxes(masks.float()) + torch.tensor([0, 0, 1, 1])
    return corners / torch.tensor([width, height, width, height])


def clip_box(box_xyxy, width, height):
    """Return the part of a box inside its image, in pixels; None if it has no area there."""
    if not all(math.isfinite(number) for number in box_xyxy):
        return None
    x0, y0, x1, y1 = box_xyxy
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def box_to_rle(box_xyxy, width, height):
    """Fill a box that lies inside its image, at least one pixel wide and high."""
    x0, y0, x1, y1 = box_xyxy
    mask = np.zeros((height, width), dtype=np.uint8)
    # A pixel belongs to the box if its upper left corner does.
    rows = slice(int(y0), max(math.ceil(y1), int(y0) + 1))
    columns = slice(int(x0), max(math.ceil(x1), int(x0) + 1))
    mask[rows, columns] = 1
    return mask_to_rle(mask)
