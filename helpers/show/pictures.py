"""Pictures: ground truth and detections side by side, and figures shown with a sentence.

Charts of numbers are in `helpers.charts`. Every panel says in its title what it shows, so that
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
from helpers.errors import InputError

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
        `helpers.detect.detections.detect` returns them; may be empty.

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


PANEL_INCHES = 3.4
MAX_COLUMNS = 3
_TITLE_POINTS = 10.5
_TITLE_CHARACTERS = 40
_DPI = 100


def draw_objects(ax, image, objects, title=None):
    """Draw the annotated objects of an image.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        See `as_picture`.
    objects : sequence of helpers.data.records.ObjectAnnotation
        May be empty. One without a readable mask is drawn as its box.
    title : str, optional
        Default: the number of objects of each category.
    """
    picture = as_picture(image)
    counts = Counter(item.category for item in objects)
    listed = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())) or "no object"
    labels = [item.category if len(counts) > 1 else "" for item in objects]
    boxes_xyxy = [item.box_xyxy for item in objects]
    masks = [decode_mask(item.rle, picture.size, where=item.annotation_id) for item in objects]
    canvas = annotate(picture, boxes_xyxy, masks or None, labels, TRUTH_COLOUR)
    _show(ax, canvas, f"ground truth: {listed}" if title is None else title)


def draw_prediction(ax, image, prediction):
    """Draw what was detected for one prompt on one image.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        See `as_picture`.
    prediction : dict
        ``prompt``, ``presence_prob`` and ``max_score`` (both in [0, 1]), and ``detections``, see
        `helpers.show.pictures.annotate_detections`: what `python -m helpers predict --json` prints.
    """
    found = prediction["detections"]
    canvas = annotate_detections(image, found)
    count = f"{len(found)} detection{'' if len(found) == 1 else 's'}"
    scores = f"max score {prediction['max_score']:.3f}, presence {prediction['presence_prob']:.3f}"
    _show(ax, canvas, f'"{prediction["prompt"]}": {count}', scores)


def prediction_figure(image, predictions, objects=None):
    """Draw one panel per prompt for one image, after the ground truth where it is known.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        See `as_picture`.
    predictions : sequence of dict
        See `draw_prediction`; at least one.
    objects : sequence of helpers.data.records.ObjectAnnotation, optional
        Ground truth.

    Returns
    -------
    matplotlib.figure.Figure
        At most three panels in a row.
    """
    return _grid(_panels(image, objects, predictions), MAX_COLUMNS)


def save_prediction_figure(path, image, predictions, software=None):
    """Write the picture of `prediction_figure`, without ground truth, to a file.

    Parameters
    ----------
    path : os.PathLike
        The ending decides the format, for example ``.png`` or ``.jpg``; folders are made.
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        See `as_picture`.
    predictions : sequence of dict
        See `draw_prediction`.
    software : str, optional
        Stored in a PNG as the program that wrote it.

    Raises
    ------
    InputError
        When the ending names no image format.
    """
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
        ``(image, objects, predictions)`` of each image, see `draw_objects` and `draw_prediction`;
        objects may be None.

    Returns
    -------
    matplotlib.figure.Figure
        As many columns as the longest row has panels.
    """
    panels = [_panels(*row) for row in rows]
    columns = max(map(len, panels), default=0)
    return _grid(
        [panel for row in panels for panel in row + [None] * (columns - len(row))], columns
    )


def gallery_figure(items, columns=MAX_COLUMNS):
    """Draw annotated images with a caption each, for example the worst findings of the data check.

    Parameters
    ----------
    items : sequence of tuple
        ``(image, objects, caption)``, see `draw_objects`; a caption of None counts the objects.
    columns : int
        Pictures per row.

    Returns
    -------
    matplotlib.figure.Figure
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
    """Put a picture on axes without ticks, under a title wrapped to the width of a panel."""
    ax.imshow(picture)
    ax.set_axis_off()
    wrapped = [textwrap.fill(line, _TITLE_CHARACTERS) for line in title_lines]
    ax.set_title("\n".join(wrapped), fontsize=_TITLE_POINTS, loc="left")
