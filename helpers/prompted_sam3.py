"""SAM3 with several prompts per image and with the outputs of every decoder layer.

`PromptedSam3` is `transformers.Sam3Model` module for module and key for key. It adds what training
and prompting need: the vision encoder runs once per image whatever the number of prompts, and the
outputs of all decoder layers are returned, not only those of the last one.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput, inverse_sigmoid

from helpers.vision_embeds import Float32Positions, embeds_of_states, repeat_vision_embeds

SCORE_LOGIT_CLAMP = 12.0
"""Query logits are clamped to plus or minus this value; beyond it their gradient is zero."""
PRESENCE_LOGIT_CLAMP = 10.0
"""Presence logits are clamped to plus or minus this value; beyond it their gradient is zero."""


@dataclass
class PromptedSam3Output(Sam3ImageSegmentationOutput):
    """`Sam3ImageSegmentationOutput` with the names that `helpers.losses.sam3_losses` reads.

    Attributes
    ----------
    pred_boxes_cxcywh : torch.Tensor
        (B, Q, 4) boxes of the last decoder layer, centre and size as fractions of the image.
    semantic_logits : torch.Tensor
        (B, 1, h, w), the same tensor as ``semantic_seg``.
    aux : list of dict
        ``pred_logits`` (B, Q), ``pred_boxes_cxcywh`` (B, Q, 4) and ``presence_logits`` (B, 1) of
        every decoder layer but the last, first layer first.
    """

    pred_boxes_cxcywh: torch.Tensor | None = None
    semantic_logits: torch.Tensor | None = None
    aux: list | None = None


class PromptedSam3(Sam3Model):
    """A `Sam3Model` that takes I images with B prompts and returns every decoder layer.

    Parameters, modules and checkpoint keys are those of `Sam3Model`, so the weights of one load
    into the other.

    Loaded in bfloat16, the two encoders are kept in it, 96 % of the parameters of the full model,
    and their matrix products and those of the rest run in it through autocast, which the model
    switches on by itself. The rest stays in float32: a box in bfloat16 is rounded to 1/256 of the
    image, 4 of 1008 pixels.
    """

    _keep_in_fp32_modules_strict = (
        "^text_projection",
        "geometry_encoder",
        "detr_encoder",
        "detr_decoder",
        "mask_decoder",
        "dot_product_scoring",
    )

    # The ViT and text layers can be checkpointed, the class just does not say so.
    supports_gradient_checkpointing = True
    # Our losses are means over the batch: the trainer has to divide them by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        neck = self.vision_encoder.neck
        neck.position_encoding = Float32Positions(
            neck.position_encoding.num_position_features, normalize=True
        )

    @property
    def mask_size(self):
        """Side of the predicted masks in cells: the grid of ViT patches times the finest scale."""
        vision = self.config.vision_config
        return int(self.resolution // vision.backbone_config.patch_size * max(vision.scale_factors))

    @property
    def resolution(self):
        """Side of the square input image in pixels."""
        return int(self.config.vision_config.image_size)

    def precision(self):
        """Return the context in which the model computes: bfloat16 where the encoders are kept in it.

        Returns
        -------
        contextlib.AbstractContextManager
            Leaves an autocast that is on already as it is.
        """
        if self.vision_encoder.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def backbone_states(self, pixel_values):
        """Run the vision backbone, the expensive part of a pass.

        Parameters
        ----------
        pixel_values : torch.Tensor
            (I, 3, S, S) images as the processor makes them.

        Returns
        -------
        torch.Tensor
            (I, N, C) for N patches, row by row. `forward` takes them in place of the images.
        """
        with self.precision():
            return self.vision_encoder.backbone(pixel_values).last_hidden_state

    def text_states(self, input_ids, attention_mask):
        """Run the text encoder and its projection.

        Parameters
        ----------
        input_ids, attention_mask : torch.Tensor
            (B, T) tokens of the prompts.

        Returns
        -------
        torch.Tensor
            (B, T, D). `forward` takes them in place of ``input_ids``.
        """
        with self.precision():
            tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
            return self.get_text_features(**tokens).pooler_output

    def forward(
        self,
        pixel_values=None,
        vision_embeds=None,
        input_ids=None,
        attention_mask=None,
        image_index=None,
        backbone_states=None,
        text_states=None,
        **kwargs,
    ):
        """Segment B prompts on I images.

        Parameters
        ----------
        pixel_values : torch.Tensor, optional
            (I, 3, S, S) images as the processor makes them; or one of the next two.
        vision_embeds : Sam3VisionEncoderOutput, optional
            From the method of this name for the I images.
        input_ids, attention_mask : torch.Tensor
            (B, T) tokens of the prompts. The mask is required: without it the padding would be
            read as part of the prompt and change every score.
        image_index : torch.Tensor, optional
            (B,) int64, the image of each prompt. Without it I must equal B, or be 1.
        backbone_states : torch.Tensor, optional
            (I, N, C) from the method of this name; the neck is run on them.
        text_states : torch.Tensor, optional
            (B, T, D) from the method of this name, in place of `input_ids`.
        **kwargs
            Passed on to `Sam3Model.forward` (for example ``input_boxes``).

        Returns
        -------
        PromptedSam3Output
            Rows are prompts. ``pred_masks`` (B, Q, h, w), ``pred_boxes`` (B, Q, 4) xyxy in [0, 1],
            ``pred_logits`` (B, Q), ``presence_logits`` (B, 1), ``semantic_logits`` (B, 1, h, w),
            and the fields of `PromptedSam3Output`.

        Raises
        ------
        ValueError
            Without `attention_mask`, or with images and prompts that cannot be paired.
        """
        if attention_mask is None:
            raise ValueError(
                "pass attention_mask with the prompts: padding would change the scores"
            )
        with self.precision(), self._capture_decoder() as captured:
            if vision_embeds is None:
                vision_embeds = self.vision_embeds(pixel_values, backbone_states)
            if text_states is not None:
                kwargs["text_embeds"] = BaseModelOutputWithPooling(pooler_output=text_states)
            outputs = super().forward(
                vision_embeds=repeat_vision_embeds(vision_embeds, image_index, len(attention_mask)),
                input_ids=input_ids,
                attention_mask=attention_mask,
                **{**kwargs, "return_dict": True},
            )
            layers = _decoder_layers(captured)
        return PromptedSam3Output(
            **{field.name: getattr(outputs, field.name) for field in fields(outputs)},
            pred_boxes_cxcywh=layers[-1]["pred_boxes_cxcywh"],
            semantic_logits=outputs.semantic_seg,
            aux=layers[:-1],
        )

    def vision_embeds(self, pixel_values=None, backbone_states=None):
        """Return the feature pyramids of I images or of their backbone states.

        Parameters
        ----------
        pixel_values, backbone_states : torch.Tensor, optional
            One of the two, see `forward`.

        Returns
        -------
        Sam3VisionEncoderOutput
            `forward` takes it in place of the images.

        Raises
        ------
        ValueError
            Without either.
        """
        with self.precision():
            if backbone_states is not None:
                return embeds_of_states(self.vision_encoder, backbone_states)
            if pixel_values is not None:
                return self.vision_encoder(pixel_values)
        raise ValueError("pass pixel_values, backbone_states or vision_embeds")

    @contextmanager
    def _capture_decoder(self):
        """Collect what the decoder and its heads return inside `Sam3Model.forward`.

        Capturing rather than computing again keeps the dropout of the scoring head the same for
        the last layer and the others. The box head is called once per layer inside the decoder
        and then once for all layers; the last call is kept.
        """
        captured = {}
        modules = {
            "decoder": self.detr_decoder,
            "box_offsets": self.detr_decoder.box_head,
            "logits": self.dot_product_scoring,
        }
        handles = [
            module.register_forward_hook(
                lambda _module, _args, output, name=name: captured.__setitem__(name, output)
            )
            for name, module in modules.items()
        ]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def loss_inputs(outputs):
    """Pick what `helpers.losses.sam3_losses` reads out of the outputs, in float32.

    Parameters
    ----------
    outputs : PromptedSam3Output

    Returns
    -------
    dict
        ``pred_logits``, ``pred_boxes_cxcywh``, ``presence_logits``, ``pred_masks``,
        ``semantic_logits`` and ``aux``.
    """
    names = ("pred_logits", "pred_boxes_cxcywh", "presence_logits")
    final, *aux = [
        {name: layer[name].float() for name in names} for layer in (outputs, *outputs["aux"])
    ]
    final |= {name: outputs[name].float() for name in ("pred_masks", "semantic_logits")}
    return final | {"aux": aux}


def checkpoint_activations(model):
    """Compute the activations of vision, text and DETR layers again in the backward pass.

    The library checkpoints the layers of the two encoders. Those of the DETR are as large, once
    per prompt.

    Parameters
    ----------
    model : PromptedSam3
        Trades time for memory from now on.
    """
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in (*model.detr_encoder.layers, *model.detr_decoder.layers):
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward, *args, **kwargs):
    """Run a layer, keeping only its inputs if there will be a backward pass."""
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def _decoder_layers(captured):
    """Return one dict of logits, boxes and presence for each decoder layer, first layer first."""
    reference_logits = inverse_sigmoid(captured["decoder"].reference_boxes)
    boxes_cxcywh = (reference_logits + captured["box_offsets"]).sigmoid()
    stacked = (captured["logits"].squeeze(-1), boxes_cxcywh, captured["decoder"].presence_logits)
    names = ("pred_logits", "pred_boxes_cxcywh", "presence_logits")
    return [dict(zip(names, layer, strict=True)) for layer in zip(*stacked, strict=True)]
