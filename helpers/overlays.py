"""Masks, boxes and labels drawn onto enlarged copies of photographs.

The enlargement keeps lines and letters sharp on small images. Colours are from the Okabe-Ito
palette, which keeps apart under the common forms of colour blindness.
"""

from __future__ import annotations

import os

import numpy as np
import supervision as sv
from matplotlib import font_manager
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.errors import InputError
from helpers.images import open_upright

TRUTH_COLOUR = "#0072B2"
PREDICTION_COLOUR = "#D55E00"
MAX_LABELS = 8
"""Only the best detections of a picture get a label with their score; its title gives the count."""
CANVAS_PIXELS = 720
LABEL_PIXELS = 31
"""Height of letters on the canvas: 10.5 points when it is shown 3.4 inches wide."""


def as_picture(image):
    """Return an image of any of the usual kinds as an upright RGB picture.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        An array is (H, W, 3) uint8; a path is opened with its EXIF orientation applied.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    InputError
        For a file that cannot be opened, or an array of another shape or type.
    """
    if isinstance(image, str | os.PathLike):
        return open_upright(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"a picture of shape {image.shape} and type {image.dtype} cannot be drawn",
            fix="pass (H, W, 3) uint8, a PIL image or a path",
        )
    return Image.fromarray(image)


def decode_mask(rle, size, where):
    """Decode a mask and refuse one that was made for an image of another size.

    Parameters
    ----------
    rle : dict or None
        COCO compressed RLE; None is an empty mask.
    size : tuple of int
        (width, height) of the image in pixels.
    where : object
        What the mask belongs to, for the message.

    Returns
    -------
    numpy.ndarray
        (H, W) bool.

    Raises
    ------
    InputError
        When the sizes differ.
    """
    width, height = size
    if rle is None:
        return np.zeros((height, width), dtype=bool)
    if list(rle["size"]) != [height, width]:
        raise InputError(
            f"a mask of {rle['size']} (height, width) does not fit an image of {[height, width]}",
            where=where,
            fix="draw predictions on the image they were made on",
        )
    return coco_mask.decode(dict(rle)).astype(bool)


def annotate(image, boxes_xyxy, masks=None, labels=None, colour=PREDICTION_COLOUR):
    """Draw boxes, masks and labels on an enlarged copy of a picture.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        See `as_picture`.
    boxes_xyxy : array_like
        (n, 4) in pixels of the image; n may be 0.
    masks : array_like, optional
        (n, H, W) bool at the size of the image.
    labels : sequence of str, optional
        n texts; an empty one is not drawn. They are moved apart where they would overlap.
    colour : str
        Hexadecimal, for fill, outline, box and the ground of the labels.

    Returns
    -------
    PIL.Image.Image
        Longest side 720 pixels.
    """
    picture = as_picture(image)
    scale = CANVAS_PIXELS / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    canvas = picture.resize(size, Image.Resampling.BICUBIC)
    boxes_xyxy = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    if len(boxes_xyxy) == 0:
        return canvas
    found = sv.Detections(xyxy=boxes_xyxy * scale, class_id=np.zeros(len(boxes_xyxy), dtype=int))
    colour = sv.Color.from_hex(colour)
    if masks is not None:
        found.mask = np.stack([_enlarge(mask, size) for mask in np.asarray(masks)])
        canvas = sv.MaskAnnotator(color=colour, opacity=0.45).annotate(canvas, found)
        canvas = sv.PolygonAnnotator(color=colour, thickness=2).annotate(canvas, found)
    canvas = sv.BoxAnnotator(color=colour, thickness=3).annotate(canvas, found)
    named = np.array([bool(label) for label in labels or [""] * len(found)])
    if named.any():
        texts = [label for label in labels if label]
        canvas = _label_annotator(colour).annotate(canvas, found[named], labels=texts)
    return canvas


def annotate_detections(image, detections):
    """Draw detections with their scores on an enlarged copy of a picture.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        See `as_picture`.
    detections : sequence of dict
        ``score`` in [0, 1], ``box_xyxy`` in pixels and ``mask_rle`` at the size of the image, as
        `helpers.detections.detect` returns them; may be empty.

    Returns
    -------
    PIL.Image.Image
        See `annotate`. Only the best eight detections get a label.
    """
    picture = as_picture(image)
    found = sorted(detections, key=lambda item: item["score"], reverse=True)
    masks = [decode_mask(item["mask_rle"], picture.size, "detection") for item in found]
    labels = [
        f"{item['score']:.2f}" if rank < MAX_LABELS else "" for rank, item in enumerate(found)
    ]
    return annotate(picture, [item["box_xyxy"] for item in found], masks or None, labels)


def _enlarge(mask, size):
    """Resize an (H, W) bool mask to (width, height) with smooth edges."""
    grey = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) > 127


def _label_annotator(colour):
    """Return the annotator of labels, at least 10 points high when a panel has its usual size."""
    return sv.RichLabelAnnotator(
        color=colour,
        text_color=sv.Color.WHITE if colour.as_hex() == TRUTH_COLOUR.lower() else sv.Color.BLACK,
        font_path=font_manager.findfont("DejaVu Sans"),
        font_size=LABEL_PIXELS,
        text_padding=4,
        smart_position=True,
    )
