"""SAM3 with several prompts per image and all decoder layers, some prompts at a time."""

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3SinePositionEmbedding,
    Sam3VisionEncoderOutput,
    inverse_sigmoid,
)

# Logits are clamped to plus or minus these values; beyond them their gradient is zero. Meta's code
# clamps no presence logit: it throws the clamped value away.
SCORE_LOGIT_CLAMP = 12.0
PRESENCE_LOGIT_CLAMP = 10.0
# Prompts that pass through DETR and mask decoder together. At full size a prompt takes about 0.3 GB
# while it passes, and its masks 66 MB; an image of a dataset may bring eighty prompts.
ROWS_AT_ONCE = 16
_VISION_INPUTS = ("pixel_values", "backbone_states")
_MODEL_INPUTS = (*_VISION_INPUTS, "image_index", "input_ids", "text_states", "attention_mask")
_LAYER_OUTPUTS = ("pred_logits", "pred_boxes_cxcywh", "presence_logits")
_MASK_INPUTS = ("decoder_queries", "encoder_hidden_states", "prompt_features", "prompt_mask")


class Float32Positions(Sam3SinePositionEmbedding):
    """Position codes of feature maps, shared by all images, in float32: bfloat16 is off by 0.034."""

    def forward(self, shape, device, dtype, mask=None):
        """Return the codes of a map of `shape` (I, C, h, w), float32 whatever `dtype` says."""
        codes = super().forward((1, *shape[1:]), device, torch.float32, mask)
        return codes.expand(shape[0], -1, -1, -1)


def repeat_vision_embeds(vision_embeds, image_index, num_prompts):
    """Give each of B prompts the maps of image `image_index` (B,); None pairs them or repeats one."""
    features = vision_embeds.fpn_hidden_states
    num_images = len(features[0])
    if image_index is None:
        if num_images == num_prompts:
            return vision_embeds
        if num_images != 1:
            raise ValueError(f"{num_images} images and {num_prompts} prompts need an image_index")
        image_index = torch.zeros(num_prompts, dtype=torch.long)
    if len(image_index) != num_prompts or int(image_index.max()) >= num_images:
        pairs = f"{num_prompts} prompts with {num_images} images"
        raise ValueError(f"image_index {image_index.tolist()} does not pair {pairs}")
    index = image_index.to(features[0].device)
    # Position encodings depend on the size of the map only, so all rows are equal.
    positions = vision_embeds.fpn_position_encoding
    return replace(
        vision_embeds,
        fpn_hidden_states=tuple(level[index] for level in features),
        fpn_position_encoding=tuple(p[:1].expand(num_prompts, -1, -1, -1) for p in positions),
    )


@dataclass
class PromptedSam3Output(Sam3ImageSegmentationOutput):
    """`Sam3ImageSegmentationOutput` with the names that `sam3_losses` reads."""

    pred_boxes_cxcywh: torch.Tensor | None = None  # (B, Q, 4) of the last layer, in [0, 1]
    semantic_logits: torch.Tensor | None = None  # (B, 1, h, w), the same as semantic_seg
    aux: list | None = None  # dicts of `_LAYER_OUTPUTS` of the layers before, first layer first


class PromptedSam3(Sam3Model):
    """A `Sam3Model` that takes I images with B prompts and returns every decoder layer.

    Loaded in bfloat16, the two encoders are kept in it and matrix products run in it through
    autocast. The rest stays in float32: a box in bfloat16 is rounded to 1/256 of the image.
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
        num_features = neck.position_encoding.num_position_features
        neck.position_encoding = Float32Positions(num_features, normalize=True)
        self.geometry_encoder.register_forward_pre_hook(_float32_features, with_kwargs=True)

    @property
    def mask_size(self):
        """Side of the predicted masks in cells: the grid of ViT patches times the finest scale."""
        vision = self.config.vision_config
        return int(self.resolution // vision.backbone_config.patch_size * max(vision.scale_factors))

    @property
    def resolution(self):
        """Side of the square input image in pixels."""
        return int(self.config.vision_config.image_size)

    @property
    def native_prompt(self):
        """Whether the geometry encoder's token follows every prompt, as in Meta's code."""
        return getattr(self.config, "native_prompt", False)

    def geometry_inputs(self, num_prompts):
        """Return the box that is no box, for which transformers adds the token; or nothing."""
        if not self.native_prompt:
            return {}
        labels = torch.full((num_prompts, 1), -10, device=self.device)
        boxes = torch.zeros(num_prompts, 1, 4, device=self.device)
        return {"input_boxes": boxes, "input_boxes_labels": labels}

    def precision(self):
        """Return the context of a pass: bfloat16 autocast where the encoders are kept in it."""
        if self.vision_encoder.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def backbone_states(self, pixel_values):
        """Run the vision backbone on (I, 3, S, S) images: (I, N, C) for N patches, row by row."""
        with self.precision():
            return self.vision_encoder.backbone(pixel_values).last_hidden_state

    def text_states(self, input_ids, attention_mask):
        """Run the text encoder and its projection on (B, T) tokens: (B, T, D)."""
        with self.precision():
            tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
            return self.get_text_features(**tokens).pooler_output

    def vision_embeds(self, pixel_values=None, backbone_states=None):
        """Return the feature pyramids of I images, or of their backbone states (I, N, C)."""
        with self.precision():
            if backbone_states is None:
                if pixel_values is None:
                    raise ValueError("pass pixel_values, backbone_states or vision_embeds")
                return self.vision_encoder(pixel_values)
            num_images, num_patches, _ = backbone_states.shape
            side = round(num_patches**0.5)
            spatial = backbone_states.view(num_images, side, side, -1).permute(0, 3, 1, 2)
            maps, positions = self.vision_encoder.neck(spatial)
            pyramids = {"fpn_hidden_states": maps, "fpn_position_encoding": positions}
            return Sam3VisionEncoderOutput(last_hidden_state=backbone_states, **pyramids)

    def forward(
        self,
        pixel_values=None,
        vision_embeds=None,
        input_ids=None,
        attention_mask=None,
        image_index=None,
        backbone_states=None,
        text_states=None,
        mask_rows=None,
        mask_floor=None,
        **kwargs,
    ):
        """Segment B prompts on I images: a `PromptedSam3Output`, whose rows are prompts.

        Images are `pixel_values` (I, 3, S, S) as the processor makes them, `vision_embeds` or
        `backbone_states` (I, N, C); prompts are `input_ids` (B, T) or `text_states` (B, T, D), with
        their `attention_mask` (B, T). For `image_index` see `repeat_vision_embeds`.

        Every row has masks, unless `mask_rows` (B,) bool or `mask_floor` is given: then these rows
        have them, and rows whose best score reaches the floor; the masks of others are 0.
        """
        if attention_mask is None:
            raise ValueError("pass attention_mask: padding would change the scores of the prompts")
        with self.precision(), self._capture_decoder(mask_rows, mask_floor) as captured:
            if vision_embeds is None:
                vision_embeds = self.vision_embeds(pixel_values, backbone_states)
            if text_states is not None:
                kwargs["text_embeds"] = BaseModelOutputWithPooling(pooler_output=text_states)
            outputs = super().forward(
                vision_embeds=repeat_vision_embeds(vision_embeds, image_index, len(attention_mask)),
                input_ids=input_ids,
                attention_mask=attention_mask,
                **{**self.geometry_inputs(len(attention_mask)), **kwargs, "return_dict": True},
            )
            decoder = captured["decoder"]
            reference_logits = inverse_sigmoid(decoder.reference_boxes)
            boxes_cxcywh = (reference_logits + captured["box_offsets"]).sigmoid()
        stacked = (captured["logits"].squeeze(-1), boxes_cxcywh, decoder.presence_logits)
        layers = zip(*stacked, strict=True)
        *aux, last = (dict(zip(_LAYER_OUTPUTS, layer, strict=True)) for layer in layers)
        if "rows" in captured:
            for name in ("pred_masks", "semantic_seg"):
                nothing = outputs[name].new_zeros(len(attention_mask), *outputs[name].shape[1:])
                outputs[name] = nothing.index_copy(0, captured["rows"], outputs[name])
        return PromptedSam3Output(
            **{field.name: getattr(outputs, field.name) for field in fields(outputs)},
            pred_boxes_cxcywh=last["pred_boxes_cxcywh"],
            semantic_logits=outputs.semantic_seg,
            aux=aux,
        )

    @contextmanager
    def _capture_decoder(self, mask_rows, mask_floor):
        """Collect the last outputs of decoder and heads, and spare the masks that nobody wants."""
        captured = {}
        modules = {"decoder": self.detr_decoder, "logits": self.dot_product_scoring}
        modules["box_offsets"] = self.detr_decoder.box_head
        with ExitStack() as hooks:
            for name, module in modules.items():
                hook = partial(_keep_output, captured, name)
                hooks.enter_context(module.register_forward_hook(hook))
            if mask_rows is not None or mask_floor is not None:
                hook = partial(_choose_rows, captured, mask_rows, mask_floor)
                register = self.mask_decoder.register_forward_pre_hook
                hooks.enter_context(register(hook, with_kwargs=True))
            yield captured


def _float32_features(module, args, kwargs):
    """Give the geometry encoder float32: it pools bfloat16 as float16, which autocast refuses."""
    return args, kwargs | {"img_feats": [level.float() for level in kwargs["img_feats"]]}


def _keep_output(captured, name, module, args, output):
    captured[name] = output


def _choose_rows(captured, mask_rows, mask_floor, module, args, kwargs):
    """Give the mask decoder some rows, at least one: no parameter may be without a gradient."""
    with torch.no_grad():
        presence_prob = captured["decoder"].presence_logits[-1].float().sigmoid()
        scores = captured["logits"][-1].squeeze(-1).float().sigmoid() * presence_prob
        # Half the floor, as rounding may differ later; no score is 2.
        wanted = scores.amax(1) >= (2 if mask_floor is None else mask_floor / 2)
        if mask_rows is not None:
            wanted |= mask_rows.to(wanted.device)
        wanted[0] |= ~wanted.any()
        captured["rows"] = rows = wanted.nonzero()[:, 0]
    some = {name: kwargs[name].index_select(0, rows) for name in _MASK_INPUTS}
    levels = [level.index_select(0, rows) for level in kwargs["backbone_features"]]
    return args, kwargs | some | {"backbone_features": levels}


def loss_inputs(outputs):
    """Pick what `sam3_losses` reads out of the outputs, in float32: a dict of tensors and ``aux``."""
    layers = outputs, *outputs["aux"]
    final, *aux = [{name: layer[name].float() for name in _LAYER_OUTPUTS} for layer in layers]
    final |= {name: outputs[name].float() for name in ("pred_masks", "semantic_logits")}
    return final | {"aux": aux}


def checkpoint_activations(model):
    """Compute the activations of vision, text and DETR layers again in the backward pass."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    for layer in (*model.detr_encoder.layers, *model.detr_decoder.layers):
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward, *args, **kwargs):
    """Run a layer, keeping only its inputs if there will be a backward pass."""
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def base_of(model):
    """Return the SAM3 inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def rows_with_objects(targets):
    """Return which of B rows need masks for the loss: (B,) bool."""
    return torch.tensor([len(target["boxes_cxcywh"]) > 0 for target in targets])


def model_inputs(batch, device):
    """Pick what the model reads out of a collated batch and move it to a device."""
    return {name: batch[name].to(device) for name in _MODEL_INPUTS if name in batch}


def outputs_by_rows(model, batch, device, autocast=nullcontext, mask_rows=None, mask_floor=None):
    """Run a batch in parts of at most `ROWS_AT_ONCE` rows; yield slices of rows, and their outputs."""
    inputs = model_inputs(batch, device)
    if mask_rows is not None:
        inputs["mask_rows"] = mask_rows
    seen = [inputs.pop(name, None) for name in _VISION_INPUTS]
    with autocast():
        vision_embeds = base_of(model).vision_embeds(*seen)
    for start in range(0, len(inputs["attention_mask"]), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        with autocast():
            outputs = model(**part, vision_embeds=vision_embeds, mask_floor=mask_floor)
        yield rows, outputs
