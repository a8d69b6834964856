"""Look at samples as the loss sees them: resized image, boxes and masks after the collate.

Everything is read back from the tensors of a collated batch and nothing from the files, so a fault
of the loader shows in these pictures, where pictures of the files would hide it.
"""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
from PIL import Image
from torchvision.ops import box_convert

from helpers.errors import InputError
from helpers.overlays import TRUTH_COLOUR, annotate
from helpers.panels import _encode, _img
from helpers.plots import MAX_COLUMNS, gallery_figure

_WIDE = {"style": {"description_width": "initial"}, "layout": {"width": "32em"}}


def target_picture(batch, row, image_processor):
    """Draw the targets of one query on the image that the model is given.

    Parameters
    ----------
    batch : dict
        From `helpers.datasets.PromptCollator`, with B queries.
    row : int
        Query, from 0 to B - 1.
    image_processor : transformers.Sam3ImageProcessor
        Its mean and standard deviation turn the tensor back into colours.

    Returns
    -------
    PIL.Image.Image
        See `helpers.overlays.annotate`. A mask is as coarse as the grid it is learned on; an
        object without a usable mask is drawn as its box.
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
    """Say in words what `target_picture` shows.

    Parameters
    ----------
    batch : dict
        From `helpers.datasets.PromptCollator`.
    row : int
        Query.

    Returns
    -------
    str
        For example ``"crack" (present): 2 objects, 2 with a mask``.
    """
    query, target = batch["queries"][row], batch["targets"][row]
    count, with_mask = len(target["boxes_cxcywh"]), int(target["mask_valid"].sum())
    state = "present" if query["is_positive"] else "absent"
    objects = f"{count} object{'' if count == 1 else 's'}"
    return f'"{query["prompt"]}" ({state}): {objects}, {with_mask} with a mask'


def targets_figure(batch, image_processor, columns=MAX_COLUMNS):
    """Draw the targets of every query of a batch.

    Parameters
    ----------
    batch : dict
        From `helpers.datasets.PromptCollator`; not empty.
    image_processor : transformers.Sam3ImageProcessor
        See `target_picture`.
    columns : int
        Pictures per row.

    Returns
    -------
    matplotlib.figure.Figure
    """
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
    """Choose an image and one of its prompts, and see the targets that reach the loss.

    Use `browse_panel` to make one.

    Attributes
    ----------
    image : ipywidgets.SelectionSlider
        Image ids in the order of the batch.
    prompt : ipywidgets.Dropdown
        The prompts asked on that image.
    readout : ipywidgets.Label
        See `describe_target`.
    picture : ipywidgets.HTML
        The drawing, with the read-out as its alternative text.
    widget : ipywidgets.VBox
        What to display.
    """

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
        self.picture.value = _img(_encode(picture), alt, width="32em")


def browse_panel(batch, image_processor):
    """Make a panel that shows the targets of a collated batch, one query at a time.

    Parameters
    ----------
    batch : dict
        From `helpers.datasets.PromptCollator`.
    image_processor : transformers.Sam3ImageProcessor
        See `target_picture`.

    Returns
    -------
    BrowsePanel
        With its first picture drawn.

    Raises
    ------
    InputError
        For a batch without a query.
    """
    if not batch["queries"]:
        raise InputError("the batch has no query", fix="collate at least one image with a prompt")
    return BrowsePanel(batch, image_processor)


def _to_size(mask, size):
    """Enlarge a mask of the grid to (width, height) in pixels, keeping its cells visible."""
    return np.asarray(Image.fromarray(mask * 255).resize(size, Image.Resampling.NEAREST)) > 127
