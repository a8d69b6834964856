"""Pictures of what the loss is given.

Targets are read back from the tensors of a collated batch and nothing from the files, so a fault of
the loader shows in these pictures, where pictures of the files would hide it.
"""

import html

import torch
from torch.nn.functional import interpolate
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_pil_image

from helpers.errors import printable
from helpers.show import pictures
from helpers.show.page import data_uri


def image_html(picture, alt, width="32em"):
    """Return an HTML image of a figure or a photograph, with its data inside."""
    text = html.escape(printable(alt))
    return f'<img alt="{text}" style="width:{width};max-width:100%" src="{data_uri(picture)}">'


def target_picture(batch, row, image_processor):
    """Draw the targets of one query on the image that the model is given.

    A mask is as coarse as the grid it is learned on; an object without one is drawn as its box.

    Parameters
    ----------
    batch : dict
        From `helpers.data.PromptCollator`, with B queries.
    row : int
        Query, from 0 to B - 1.
    image_processor : transformers.Sam3ImageProcessor
    """
    pixel_values, target = batch["pixel_values"][batch["image_index"][row]], batch["targets"][row]
    mean = torch.tensor(image_processor.image_mean).reshape(3, 1, 1)
    std = torch.tensor(image_processor.image_std).reshape(3, 1, 1)
    colours = ((pixel_values * std + mean) * 255).round().clip(0, 255)
    picture = to_pil_image(colours.to(torch.uint8))
    width, height = picture.size
    boxes_xyxy = box_convert(target["boxes_cxcywh"], "cxcywh", "xyxy").numpy()
    grids = target["masks"][:, None].float()
    masks = interpolate(grids, (height, width), mode="nearest-exact")[:, 0].numpy() > 0.5
    scale = [width, height, width, height]
    return pictures.annotate(picture, boxes_xyxy * scale, masks, colour=pictures.TRUTH_COLOUR)


def describe_target(batch, row):
    """Say what `target_picture` shows: ``"crack" (present): 2 objects, 2 with a mask``."""
    query, target = batch["queries"][row], batch["targets"][row]
    count, with_mask = len(target["boxes_cxcywh"]), int(target["mask_valid"].sum())
    state = "present" if query["is_positive"] else "absent"
    objects = f"{count} object{'' if count == 1 else 's'}"
    return f'"{query["prompt"]}" ({state}): {objects}, {with_mask} with a mask'


def targets_figure(batch, image_processor):
    """Draw the targets of every query of a batch; the arguments are those of `target_picture`."""
    items = []
    for row, query in enumerate(batch["queries"]):
        caption = f"{query['image_id']}: {describe_target(batch, row)}"
        items.append((target_picture(batch, row, image_processor), (), caption))
    return pictures.gallery_figure(items)
