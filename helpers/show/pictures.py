"""Pictures: ground truth and detections side by side, and figures shown with a sentence.

Charts of numbers are in `helpers.show.charts`. Every panel says in its title what it shows, so that
nothing depends on telling two colours apart.
"""

import io
import itertools
import os
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import supervision as sv
from IPython.display import Image as DisplayImage
from IPython.display import display
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.data.images import open_upright
from helpers.errors import InputError, printable
from helpers.files import staged_folder

TRUTH_COLOUR = "#0072B2"
PREDICTION_COLOUR = "#D55E00"
MAX_LABELS = 8  # only the best detections get a label with their score; a title gives the count
_CANVAS_PIXELS = 720
_LABEL_PIXELS = 31  # high on the canvas: 10.5 points when it is shown 3.4 inches wide
_PANEL_INCHES = 3.4


def as_picture(image):
    """Return an upright RGB picture of a PIL image, a path, or an (H, W, 3) uint8 array."""
    if isinstance(image, str | os.PathLike):
        return open_upright(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        message = f"a picture of shape {image.shape} and type {image.dtype} cannot be drawn"
        raise InputError(message, fix="pass (H, W, 3) uint8, a PIL image or a path")
    return Image.fromarray(image)


def decode_mask(rle, size, where):
    """Decode a COCO RLE, or None, to (H, W) bool; refuse one that is not of size (width, height)."""
    shape = list(size[::-1])
    if rle is None:
        return np.zeros(shape, dtype=bool)
    if list(rle["size"]) != shape:
        message = f"a mask of {rle['size']} (height, width) does not fit an image of {shape}"
        raise InputError(message, where=where, fix="draw predictions on their own image")
    return coco_mask.decode(dict(rle)).astype(bool)


def annotate(image, boxes_xyxy, masks=None, labels=None, colour=PREDICTION_COLOUR):
    """Draw boxes, masks and labels on a copy of a picture, enlarged to 720 pixels.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        An array is (H, W, 3) uint8.
    boxes_xyxy : array_like
        (n, 4) in pixels of the image; n may be 0.
    masks : array_like, optional
        (n, H, W) bool at the size of the image.
    labels : sequence of str, optional
        At most n texts; an empty one is not drawn.
    colour : str
        Hexadecimal.
    """
    picture = as_picture(image)
    scale = _CANVAS_PIXELS / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    canvas = picture.resize(size, Image.Resampling.BICUBIC)
    boxes_xyxy = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    if len(boxes_xyxy) == 0:
        return canvas
    numbers = np.zeros(len(boxes_xyxy), dtype=int)
    detections = sv.Detections(xyxy=boxes_xyxy * scale, class_id=numbers)
    text_colour = sv.Color.WHITE if colour == TRUTH_COLOUR else sv.Color.BLACK
    colour = sv.Color.from_hex(colour)
    if masks is not None:
        greys = [Image.fromarray(255 * np.asarray(mask, dtype=np.uint8)) for mask in masks]
        smooth = [grey.resize(size, Image.Resampling.BILINEAR) for grey in greys]
        detections.mask = np.stack([np.asarray(grey) > 127 for grey in smooth])
        canvas = sv.MaskAnnotator(color=colour, opacity=0.45).annotate(canvas, detections)
        canvas = sv.PolygonAnnotator(color=colour, thickness=2).annotate(canvas, detections)
    canvas = sv.BoxAnnotator(color=colour, thickness=3).annotate(canvas, detections)
    labelled = [number for number, label in enumerate(labels or ()) if label]
    if labelled:
        look = {"font_size": _LABEL_PIXELS, "text_padding": 4, "smart_position": True}
        look["font_path"] = font_manager.findfont("DejaVu Sans")
        annotator = sv.RichLabelAnnotator(color=colour, text_color=text_colour, **look)
        texts = [printable(labels[number]) for number in labelled]
        canvas = annotator.annotate(canvas, detections[labelled], labels=texts)
    return canvas


def annotate_detections(image, detections):
    """Draw detections on an enlarged copy of a picture; the best eight with their score."""
    picture = as_picture(image)
    detections = sorted(detections, key=lambda item: item["score"], reverse=True)
    masks = [decode_mask(item["mask_rle"], picture.size, "detection") for item in detections]
    labels = [f"{item['score']:.2f}" for item in detections[:MAX_LABELS]]
    return annotate(picture, [item["box_xyxy"] for item in detections], masks, labels)


def _truth_panel(picture, objects):
    """Return a picture with annotated objects, and a title that counts them by category."""
    counts = Counter(item.category for item in objects)
    listed = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())) or "no object"
    labels = [item.category if len(counts) > 1 else "" for item in objects]
    boxes_xyxy = [item.box_xyxy for item in objects]
    masks = [decode_mask(item.rle, picture.size, where=item.annotation_id) for item in objects]
    return annotate(picture, boxes_xyxy, masks, labels, TRUTH_COLOUR), f"ground truth: {listed}"


def _panels(image, objects, predictions):
    """Return picture and lines of the title: of the ground truth, then of each prompt."""
    picture = as_picture(image)
    panels = [] if objects is None else [_truth_panel(picture, objects)]
    for prediction in predictions:
        canvas = annotate_detections(picture, prediction["detections"])
        count, presence = len(prediction["detections"]), prediction["presence_prob"]
        found = f'"{prediction["prompt"]}": {count} detection{"" if count == 1 else "s"}'
        scores = f"max score {prediction['max_score']:.3f}, presence {presence:.3f}"
        panels.append((canvas, found, scores))
    return panels


def prediction_figure(image, predictions, objects=None):
    """Draw a panel per prompt for one image, after the ground truth where it is known.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        An array is (H, W, 3) uint8.
    predictions : sequence of dict
        ``prompt``, ``presence_prob``, ``max_score`` and ``detections``: `Prediction.to_dict`.
    objects : sequence of helpers.data.records.ObjectAnnotation, optional
    """
    return _grid(_panels(image, objects, predictions))


def save_prediction_figure(path, image, predictions, software=None):
    """Write a `prediction_figure` to a file, whole or not at all; its ending decides the format."""
    path = Path(path)
    figure = prediction_figure(image, predictions)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        fix = f"end it in {', '.join(f'.{ending}' for ending in sorted(known))}"
        raise InputError(f"no picture can be written as {path.suffix!r}", where=path, fix=fix)
    metadata = {"Software": software} if software and path.suffix.lower() == ".png" else None
    with staged_folder(path.parent) as staging:
        figure.savefig(staging / path.name, dpi=150, metadata=metadata)


def comparison_figure(rows):
    """Draw ground truth beside the predictions, one image per row.

    Parameters
    ----------
    rows : sequence of tuple
        ``(image, objects, predictions)`` as for `prediction_figure`; objects may be None.
    """
    rows = [_panels(*row) for row in rows]
    columns = max(map(len, rows), default=0)
    return _grid([panel for row in rows for panel in row + [None] * (columns - len(row))], columns)


def gallery_figure(items):
    """Draw annotated images, three per row.

    Parameters
    ----------
    items : sequence of tuple
        ``(image, objects, caption)`` each, see `prediction_figure`; objects may be empty.
    """
    return _grid([(_truth_panel(as_picture(item[0]), item[1])[0], item[2]) for item in items])


def describe(figure, sentence):
    """Show a figure with a sentence, which is printed and stored as its alternative text; close it.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Stored as PNG, or as JPEG where that weighs less than half, as photographs do.
    sentence : str
        What the figure shows, with its numbers.
    """
    png, jpeg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    figure.savefig(jpeg, format="jpeg", dpi=100, pil_kwargs={"quality": 85})
    kind, stream = "jpeg", jpeg
    if png.tell() <= 2 * jpeg.tell():
        kind, stream = "png", io.BytesIO()  # of 256 colours, all that a chart has
        Image.open(png).convert("RGB").quantize(256).save(stream, format=kind, optimize=True)
    display(DisplayImage(data=stream.getvalue(), format=kind, alt=sentence))
    print(textwrap.fill(sentence, 100, break_on_hyphens=False))
    plt.close(figure)


def _grid(panels, columns=3):
    """Lay ``(picture, *title lines)`` out in a grid; None leaves a place empty."""
    if not panels:
        raise InputError("nothing to draw", fix="pass at least one image with something to show")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (columns * _PANEL_INCHES, rows * (_PANEL_INCHES + 0.55))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            ax.remove()
            continue
        picture, *lines = panel
        ax.imshow(picture)
        ax.set_axis_off()
        title = "\n".join(textwrap.fill(printable(line), 40) for line in lines)
        ax.set_title(title, fontsize=10.5, loc="left", parse_math=False)
    return figure
