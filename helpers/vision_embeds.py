"""Feature pyramids of images: their position codes, from kept backbone states, one per prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers.models.sam3.modeling_sam3 import (
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
)


class Float32Positions(Sam3SinePositionEmbedding):
    """The position codes of the feature maps, always computed in float32.

    The port computes them in the type of the map. In bfloat16 a code of the map of 72 x 72 cells is
    then off by up to 0.034, where rounding the exact one would cost 0.002
    (`tests/test_precision.py`). All images share one code, so one is kept.
    """

    def forward(self, shape, device, dtype, mask=None):
        """Return the codes of a map of `shape` (I, C, h, w), float32 whatever `dtype` says."""
        codes = super().forward((1, *shape[1:]), device, torch.float32, mask)
        return codes.expand(shape[0], -1, -1, -1)


def embeds_of_states(vision_encoder, backbone_states):
    """Run the neck on what the backbone said.

    Parameters
    ----------
    vision_encoder : transformers.Sam3VisionModel
    backbone_states : torch.Tensor
        (I, N, C) for the N patches of square images, row by row.

    Returns
    -------
    Sam3VisionEncoderOutput
        As ``vision_encoder`` returns it for the images.
    """
    num_images, num_patches, _ = backbone_states.shape
    side = round(num_patches**0.5)
    spatial = backbone_states.view(num_images, side, side, -1).permute(0, 3, 1, 2)
    maps, positions = vision_encoder.neck(spatial)
    return Sam3VisionEncoderOutput(
        last_hidden_state=backbone_states,
        fpn_hidden_states=maps,
        fpn_position_encoding=positions,
    )


def repeat_vision_embeds(vision_embeds, image_index, num_prompts):
    """Give every prompt the features of its image.

    Parameters
    ----------
    vision_embeds : Sam3VisionEncoderOutput
        Features of I images.
    image_index : torch.Tensor or None
        (B,) int64 in [0, I). None pairs image i with prompt i, or one image with all prompts.
    num_prompts : int
        B.

    Returns
    -------
    Sam3VisionEncoderOutput
        With feature maps of B rows.

    Raises
    ------
    ValueError
        When the index does not fit the images and prompts.
    """
    features = vision_embeds.fpn_hidden_states
    num_images = len(features[0])
    if image_index is None:
        if num_images == num_prompts:
            return vision_embeds
        if num_images != 1:
            raise ValueError(f"{num_images} images and {num_prompts} prompts need an image_index")
        image_index = torch.zeros(num_prompts, dtype=torch.long)
    if len(image_index) != num_prompts or int(image_index.max()) >= num_images:
        raise ValueError(
            f"image_index {image_index.tolist()} does not pair {num_prompts} prompts with "
            f"{num_images} images"
        )
    index = image_index.to(features[0].device)
    positions = vision_embeds.fpn_position_encoding
    return replace(
        vision_embeds,
        fpn_hidden_states=tuple(level[index] for level in features),
        # Position encodings depend on the size of the map only, so all rows are equal.
        fpn_position_encoding=tuple(
            level[:1].expand(num_prompts, -1, -1, -1) for level in positions
        ),
    )
