"""Panels to move a threshold, to watch a training, and to browse what the loss is given.

Targets are drawn as the loss sees them: resized image, boxes and masks after the collate. Everything is read back from the tensors of a collated batch and nothing from the files, so a fault
of the loader shows in these pictures, where pictures of the files would hide it.
"""

from __future__ import annotations

import base64
import html
import io
import math
import time

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torchvision.ops import box_convert
from traitlets import validate
from transformers import TrainerCallback

from helpers.detect.detections import detect
from helpers.errors import InputError, check_probability, printable
from helpers.show.charts import draw_lines, history_frame, loss_terms
from helpers.show.pictures import (
    MAX_COLUMNS,
    TRUTH_COLOUR,
    annotate,
    annotate_detections,
    as_picture,
    gallery_figure,
)

_WIDE = {"style": {"description_width": "initial"}, "layout": {"width": "32em"}}
_REDRAW_SECONDS = 2.0
_PANEL_METRICS = ("eval_AP50", "eval_cgF1", "eval_max_score_present_share_above")
"""Shares from 0 to 1, drawn on one axis while a training runs."""


class StrictSlider(widgets.FloatSlider):
    """A slider that refuses a value outside its range, where the original moves it to the end."""

    @validate("value")
    def _validate_value(self, proposal):
        value = proposal["value"]
        if not self.min <= value <= self.max:
            raise InputError(
                f"{self.description} is {value!r}",
                fix=f"set a number from {self.min:g} to {self.max:g}",
            )
        return value


class ThresholdPanel:
    """Sliders `score` and `mask`, Dropdown `prompt` over computed outputs; `widget` shows it."""

    def __init__(self, image, raws, score_threshold, mask_threshold):
        self._image, self._raws = as_picture(image), {raw.prompt: raw for raw in raws}
        options = {"min": 0.0, "max": 1.0, "step": 0.01, "readout_format": ".2f", **_WIDE}
        self.score = StrictSlider(
            value=score_threshold,
            description="score threshold (probability)",
            tooltip="keep detections that score more than this",
            **options,
        )
        self.mask = StrictSlider(
            value=mask_threshold,
            description="mask threshold (probability)",
            tooltip="a pixel with a probability above this belongs to the mask",
            **options,
        )
        self.prompt = widgets.Dropdown(options=list(self._raws), description="prompt", **_WIDE)
        self.readout, self.picture = widgets.Label(), widgets.HTML()
        choices = [self.prompt] if len(self._raws) > 1 else []
        self.widget = widgets.VBox([*choices, self.score, self.mask, self.readout, self.picture])
        for control in (self.score, self.mask, self.prompt):
            control.observe(self._update, names="value")
        self._update()

    def _update(self, _change=None):
        raw = self._raws[self.prompt.value]
        self.detections = detect(raw, self.score.value, self.mask.value)
        kept, total = len(self.detections), len(raw.scores)
        self.readout.value = f"kept {kept} of {total}, highest score {raw.max_score:.3f}"
        picture = annotate_detections(self._image, self.detections)
        alt = f"Detections of {raw.prompt!r}: {self.readout.value}."
        self.picture.value = _img(picture, alt, width="32em")


def threshold_panel(image, raws, *, score_threshold=0.3, mask_threshold=0.5):
    """Make a panel that redraws computed detections as the thresholds move.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
        An array is (H, W, 3) uint8.
    raws : sequence of helpers.detect.detections.RawPrediction
        Outputs for this image, one per prompt, as ``Predictor.raw`` returns them.
    score_threshold, mask_threshold : float
        First values of the sliders ``score`` and ``mask``, in [0, 1].

    Raises
    ------
    InputError
        For an impossible threshold (also later, when a slider is set from code), for no outputs
        at all, and for outputs of an image of another size.
    """
    if not raws:
        raise InputError(
            "a panel needs the outputs of at least one prompt", fix="pass Predictor.raw(...)"
        )
    # A slider under construction may still move an impossible value to its end, so look first.
    check_probability(score_threshold, "score_threshold")
    check_probability(mask_threshold, "mask_threshold")
    return ThresholdPanel(image, raws, score_threshold, mask_threshold)


class LossPanel:
    """Curves of the training loss and the validation metrics that grow while training runs.

    Attributes
    ----------
    log : list of dict
        Everything `update` was given, in the form of ``trainer.state.log_history``.
    readout, picture : ipywidgets.Label, ipywidgets.HTML
        Step and last loss in words, and the curves.
    widget : ipywidgets.VBox
        What to display before training starts.
    """

    def __init__(self):
        self.log = []
        self.readout, self.picture = widgets.Label(value="training has not started"), widgets.HTML()
        self.widget = widgets.VBox([self.readout, self.picture])
        self._drawn_at = -math.inf
        self.redraw()

    def update(self, log):
        """Add one entry, names to numbers, and redraw if the last time was two seconds ago."""
        self.log.append(dict(log))
        if time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
            self.redraw()

    def redraw(self):
        """Draw everything logged so far."""
        history = history_frame(self.log)
        if "loss" in history:
            losses = history["loss"].dropna()
            self.readout.value = f"step {losses.index[-1]}: training loss {losses.iloc[-1]:.3f}"
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        terms = ["loss"] if "loss" in history else loss_terms(history)
        draw_lines(left, history, terms, xlabel="optimiser step", ylabel="training loss", log=True)
        metrics = [name for name in _PANEL_METRICS if name in history]
        draw_lines(right, history, metrics, xlabel="optimiser step", ylabel="validation metric")
        right.set_ylim(-0.03, 1.03)
        self.picture.value = _img(figure, self.readout.value, width="100%")
        self._drawn_at = time.monotonic()


class LivePlotCallback(TrainerCallback):
    """Feed a `LossPanel` from a `transformers.Trainer`; prints nothing."""

    def __init__(self, panel):
        self.panel = panel

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Pass every logged entry on with its step."""
        self.panel.update({**(logs or {}), "step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the last state, which the two-second limit may have left out."""
        self.panel.redraw()


def _img(picture, alt, width):
    """Return an HTML image of a figure, as PNG, or of a photograph, as JPEG, with its data inside."""
    stream, kind = io.BytesIO(), "png" if isinstance(picture, Figure) else "jpeg"
    if kind == "png":
        picture.savefig(stream, format=kind, dpi=100)
    else:
        picture.save(stream, format=kind, quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    source = f"data:image/{kind};base64,{data}"
    return f'<img alt="{html.escape(printable(alt))}" style="width:{width}" src="{source}">'


def target_picture(batch, row, image_processor):
    """Draw the targets of one query on the image that the model is given.

    Parameters
    ----------
    batch : dict
        From `helpers.data.PromptCollator`, with B queries.
    row : int
        Query, from 0 to B - 1.
    image_processor : transformers.Sam3ImageProcessor
        Its mean and standard deviation turn the tensor back into colours.

    Returns
    -------
    PIL.Image.Image
        A mask is as coarse as the grid it is learned on; an object without one is drawn as its box.
    """
    pixel_values = batch["pixel_values"][int(batch["image_index"][row])].numpy()
    mean, std = (
        np.reshape(values, (3, 1, 1))
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    colours = np.clip(np.round((pixel_values * std + mean) * 255), 0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))
    target, (width, height) = batch["targets"][row], picture.size
    boxes_xyxy = box_convert(target["boxes_cxcywh"], "cxcywh", "xyxy").numpy()
    masks = [_to_size(mask, picture.size) for mask in target["masks"].numpy()]
    scale = [width, height, width, height]
    return annotate(picture, boxes_xyxy * scale, masks or None, colour=TRUTH_COLOUR)


def describe_target(batch, row):
    """Say what `target_picture` shows: ``"crack" (present): 2 objects, 2 with a mask``."""
    query, target = batch["queries"][row], batch["targets"][row]
    count, with_mask = len(target["boxes_cxcywh"]), int(target["mask_valid"].sum())
    state = "present" if query["is_positive"] else "absent"
    objects = f"{count} object{'' if count == 1 else 's'}"
    return f'"{query["prompt"]}" ({state}): {objects}, {with_mask} with a mask'


def targets_figure(batch, image_processor, columns=MAX_COLUMNS):
    """Draw the targets of every query of a batch; the arguments are those of `target_picture`."""
    items = [
        (
            target_picture(batch, row, image_processor),
            (),
            f"{query['image_id']}: {describe_target(batch, row)}",
        )
        for row, query in enumerate(batch["queries"])
    ]
    return gallery_figure(items, columns)


class BrowsePanel:
    """SelectionSlider `image`, Dropdown `prompt`, and the targets that reach the loss below them."""

    def __init__(self, batch, image_processor):
        self._batch, self._image_processor, self._rows = batch, image_processor, {}
        for row, query in enumerate(batch["queries"]):
            self._rows.setdefault(query["image_id"], {})[query["prompt"]] = row
        self.image = widgets.SelectionSlider(
            options=list(self._rows), description="image", continuous_update=False, **_WIDE
        )
        first = next(iter(self._rows.values()))
        self.prompt = widgets.Dropdown(options=list(first), description="prompt", **_WIDE)
        self.readout, self.picture = widgets.Label(), widgets.HTML()
        self.widget = widgets.VBox([self.image, self.prompt, self.readout, self.picture])
        self.image.observe(self._offer_prompts, names="value")
        self.prompt.observe(self._draw, names="value")
        self._draw()

    def _offer_prompts(self, _change):
        self.prompt.options = list(self._rows[self.image.value])
        self._draw()  # the first prompt may be the same word as before, which is no change

    def _draw(self, _change=None):
        row = self._rows[self.image.value][self.prompt.value]
        self.readout.value = describe_target(self._batch, row)
        picture = target_picture(self._batch, row, self._image_processor)
        alt = f"{self.image.value}, {self.readout.value}."
        self.picture.value = _img(picture, alt, width="32em")


def browse_panel(batch, image_processor):
    """Make a panel that shows the targets of a collated batch, one query at a time.

    The arguments are those of `target_picture`; a batch without a query is refused.
    """
    if not batch["queries"]:
        raise InputError("the batch has no query", fix="collate at least one image with a prompt")
    return BrowsePanel(batch, image_processor)


def _to_size(mask, size):
    """Enlarge a mask of the grid to (width, height) in pixels, keeping its cells visible."""
    return np.asarray(Image.fromarray(mask * 255).resize(size, Image.Resampling.NEAREST)) > 127
