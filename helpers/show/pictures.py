"""Pictures: ground truth and detections side by side, and figures shown with a sentence.

Charts of numbers are in `helpers.show.charts`. Every panel says in its title what it shows, so that
nothing depends on telling two colours apart.
"""

from __future__ import annotations

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

TRUTH_COLOUR = "#0072B2"
PREDICTION_COLOUR = "#D55E00"
MAX_LABELS = 8
"""Only the best detections of a picture get a label with their score; its title gives the count."""
CANVAS_PIXELS = 720
LABEL_PIXELS = 31
"""Height of letters on the canvas: 10.5 points when it is shown 3.4 inches wide."""


def as_picture(image):
    """Return an upright RGB picture of a PIL image, a path, or an (H, W, 3) uint8 array."""
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
    """Decode a COCO RLE, or None, to (H, W) bool; refuse one that is not of size (width, height)."""
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
        n texts; an empty one is not drawn. They are moved apart where they would overlap.
    colour : str
        Hexadecimal, for fill, outline, box and the ground of the labels.

    Returns
    -------
    PIL.Image.Image
    """
    picture = as_picture(image)
    scale = CANVAS_PIXELS / max(picture.size)
    size = tuple(max(round(side * scale), 1) for side in picture.size)
    canvas = picture.resize(size, Image.Resampling.BICUBIC)
    boxes_xyxy = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    if len(boxes_xyxy) == 0:
        return canvas
    detections = sv.Detections(
        xyxy=boxes_xyxy * scale, class_id=np.zeros(len(boxes_xyxy), dtype=int)
    )
    colour = sv.Color.from_hex(colour)
    if masks is not None:
        detections.mask = np.stack([_enlarge(mask, size) for mask in np.asarray(masks)])
        canvas = sv.MaskAnnotator(color=colour, opacity=0.45).annotate(canvas, detections)
        canvas = sv.PolygonAnnotator(color=colour, thickness=2).annotate(canvas, detections)
    canvas = sv.BoxAnnotator(color=colour, thickness=3).annotate(canvas, detections)
    is_labelled = np.array([bool(label) for label in labels or [""] * len(detections)])
    if is_labelled.any():
        texts = [printable(label) for label in labels if label]
        canvas = _label_annotator(colour).annotate(canvas, detections[is_labelled], labels=texts)
    return canvas


def annotate_detections(image, detections):
    """Draw detections on an enlarged copy of a picture; the best eight with their score."""
    picture = as_picture(image)
    detections = sorted(detections, key=lambda item: item["score"], reverse=True)
    masks = [decode_mask(item["mask_rle"], picture.size, "detection") for item in detections]
    labels = [
        f"{item['score']:.2f}" if rank < MAX_LABELS else "" for rank, item in enumerate(detections)
    ]
    return annotate(picture, [item["box_xyxy"] for item in detections], masks or None, labels)


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


PANEL_INCHES = 3.4
MAX_COLUMNS = 3
_TITLE_POINTS = 10.5
_TITLE_CHARACTERS = 40
_DPI = 100


def draw_objects(ax, image, objects, title=None):
    """Draw annotated objects on axes; the default title counts them by category."""
    picture = as_picture(image)
    counts = Counter(item.category for item in objects)
    listed = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())) or "no object"
    labels = [item.category if len(counts) > 1 else "" for item in objects]
    boxes_xyxy = [item.box_xyxy for item in objects]
    masks = [decode_mask(item.rle, picture.size, where=item.annotation_id) for item in objects]
    canvas = annotate(picture, boxes_xyxy, masks or None, labels, TRUTH_COLOUR)
    _show(ax, canvas, f"ground truth: {listed}" if title is None else title)


def draw_prediction(ax, image, prediction):
    """Draw on axes what was detected for one prompt, an entry of `predict --json`."""
    detections = prediction["detections"]
    canvas = annotate_detections(image, detections)
    count = f"{len(detections)} detection{'' if len(detections) == 1 else 's'}"
    scores = f"max score {prediction['max_score']:.3f}, presence {prediction['presence_prob']:.3f}"
    _show(ax, canvas, f'"{prediction["prompt"]}": {count}', scores)


def prediction_figure(image, predictions, objects=None):
    """Draw one panel per prompt for one image, after the ground truth where it is known.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        An array is (H, W, 3) uint8.
    predictions : sequence of dict
        ``prompt``, ``presence_prob``, ``max_score`` and ``detections`` of each: `Prediction.to_dict`.
    objects : sequence of helpers.data.records.ObjectAnnotation, optional
        Ground truth.
    """
    return _grid(_panels(image, objects, predictions), MAX_COLUMNS)


def save_prediction_figure(path, image, predictions, software=None):
    """Write a `prediction_figure` to a file; its ending decides the format, folders are made."""
    path = Path(path)
    figure = prediction_figure(image, predictions)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{ending}" for ending in sorted(known))
        raise InputError(
            f"no picture can be written as {path.suffix!r}", where=path, fix=f"end it in {endings}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": software} if software and path.suffix.lower() == ".png" else None
    figure.savefig(path, dpi=150, metadata=metadata)


def comparison_figure(rows):
    """Draw ground truth beside the predictions, one image per row.

    Parameters
    ----------
    rows : sequence of tuple
        ``(image, objects, predictions)`` as for `prediction_figure`; objects may be None.
    """
    panels = [_panels(*row) for row in rows]
    columns = max(map(len, panels), default=0)
    return _grid(
        [panel for row in panels for panel in row + [None] * (columns - len(row))], columns
    )


def gallery_figure(items, columns=MAX_COLUMNS):
    """Draw annotated images with a caption each, `columns` per row.

    Parameters
    ----------
    items : sequence of tuple
        ``(image, objects, caption)``; a caption of None counts the objects.
    columns : int
    """
    return _grid([(draw_objects, *item) for item in items], columns)


def describe(figure, sentence):
    """Show a figure in a notebook with a sentence that says what it shows, then close it.

    The sentence is printed, for everyone, and stored as the alternative text of the picture.
    Charts are stored as PNG and photographs as JPEG, told apart by what the two weigh, so that
    letters stay sharp and notebooks small.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    sentence : str
    """
    encoded = {kind: io.BytesIO() for kind in ("png", "jpeg")}
    for kind, stream in encoded.items():
        options = {"pil_kwargs": {"quality": 85}} if kind == "jpeg" else {}
        figure.savefig(stream, format=kind, dpi=_DPI, **options)
    kind = "png" if encoded["png"].tell() <= 2 * encoded["jpeg"].tell() else "jpeg"
    data = encoded[kind].getvalue() if kind == "jpeg" else _with_palette(encoded[kind])
    display(DisplayImage(data=data, format=kind, alt=sentence))
    print(sentence)
    plt.close(figure)


def _with_palette(chart):
    """Return a PNG with 256 colours, which is all that a chart has, in a third of the bytes."""
    stream = io.BytesIO()
    Image.open(chart).convert("RGB").quantize(256).save(stream, format="png", optimize=True)
    return stream.getvalue()


def _panels(image, objects, predictions):
    """Return what `_grid` draws for one image: the ground truth, then one panel per prompt."""
    picture = as_picture(image)
    truth = [] if objects is None else [(draw_objects, picture, objects)]
    return truth + [(draw_prediction, picture, prediction) for prediction in predictions]


def _grid(panels, columns):
    """Lay ``(draw, image, *arguments)`` out in a grid; None leaves a place empty."""
    if not panels:
        raise InputError("nothing to draw", fix="pass at least one image with something to show")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (columns * PANEL_INCHES, rows * (PANEL_INCHES + 0.55))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            ax.remove()
        else:
            draw, *arguments = panel
            draw(ax, *arguments)
    return figure


def _show(ax, picture, *title_lines):
    """Put a picture on axes without ticks, under a title wrapped to the width of a panel.

    A title is a user's text: it is no mathematics, and what cannot be drawn is escaped.
    """
    ax.imshow(picture)
    ax.set_axis_off()
    wrapped = [textwrap.fill(printable(line), _TITLE_CHARACTERS) for line in title_lines]
    title = "\n".join(wrapped)
    ax.set_title(title, fontsize=_TITLE_POINTS, loc="left", parse_math=False)
