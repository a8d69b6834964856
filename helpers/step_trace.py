"""What a training step holds in memory and computes, found without data, weights or a GPU.

The real model, with its adapters, runs one forward, loss and backward pass on tensors that have a
shape and a type but no content (`torch._subclasses.FakeTensorMode`), and
`helpers.step_counter.StepCounter` counts. The tensors claim to be on the CPU, because autograd
refuses those of a GPU that is not there; `helpers.gpu_rules` puts in what a GPU does otherwise.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import lru_cache
from typing import NamedTuple
from unittest import mock

import torch
from accelerate.utils import convert_to_fp32
from torch._subclasses import fake_tensor
from transformers.models.sam3.modeling_sam3 import Sam3SinePositionEmbedding

from helpers.adapters import add_lora
from helpers.datasets import MAX_TOKENS
from helpers.gpu_rules import as_on_gpu
from helpers.loss_terms import box_terms, mask_terms, score_terms
from helpers.prompted_sam3 import PromptedSam3, checkpoint_activations, loss_inputs
from helpers.sam3 import base_dtype
from helpers.step_counter import StepCounter

_GPU_BLOCK = 512  # bytes; the CUDA allocator of torch rounds up to a multiple
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_KNOWN_SCALARS = 1024  # elements up to which a tensor made from Python numbers keeps its values


class StepLoad(NamedTuple):
    """What one forward and backward pass is given.

    Attributes
    ----------
    images : int
    prompts : int
        Of all images together.
    objects : tuple of int
        Number of objects of each prompt that is present; the others of `prompts` are absent.
    """

    images: int
    prompts: int
    objects: tuple


class StepTrace(NamedTuple):
    """What a training step needs, in bytes and floating-point operations.

    Attributes
    ----------
    base_bytes : int
        The frozen weights.
    adapter_bytes : int
        The adapters, their gradients and AdamW's two moments.
    kept_bytes : int
        What the forward pass leaves for the backward pass, loss and inputs included.
    peak_bytes : int
        The most that is alive at once, base and adapters included.
    forward_flops, step_flops : int
        Of the forward pass, and of forward and backward, recomputation included.
    """

    base_bytes: int
    adapter_bytes: int
    kept_bytes: int
    peak_bytes: int
    forward_flops: int
    step_flops: int


class StepTracer:
    """Trace training steps of one configuration.

    Parameters
    ----------
    base_config : transformers.Sam3Config
        Of the base; its ``image_size`` is replaced by ``model.resolution``.
    config : helpers.config.Config
        ``model.resolution``, ``lora`` and ``training`` are read.
    as_gpu : bool
        False traces the step as a CPU computes it.
    """

    def __init__(self, base_config, config, *, as_gpu=True):
        self.config, self.as_gpu = config, as_gpu
        model = _empty_model(base_config, config)
        self._fake = fake_tensor.FakeTensorMode()
        with self._fake:
            self.model = model._apply(lambda one: torch.empty(one.shape, dtype=one.dtype))
            for parameter in self._trained():
                parameter.grad = torch.empty_like(parameter)

    def _trained(self):
        """Return the trained parameters."""
        return [one for one in self.model.parameters() if one.requires_grad]

    def trace(self, load):
        """Run a step of a given size.

        Parameters
        ----------
        load : StepLoad

        Returns
        -------
        StepTrace
            Gradients count as resident, as they are from the second pass of an accumulation on.
        """
        trained = self._trained()
        with self._tracing() as counter:
            counter.add(trained)
            adapter_bytes = counter.now_bytes
            counter.add((*self.model.parameters(), *self.model.buffers()))
            base_bytes = counter.now_bytes - adapter_bytes
            counter.add(one.grad for one in trained)
            resident_bytes = counter.now_bytes
            loss = _forward(self.model, self.config, load)
            kept_bytes, forward_flops = counter.now_bytes - resident_bytes, counter.flops
            torch.autograd.backward(loss)
        moments_bytes = 2 * adapter_bytes
        return StepTrace(
            base_bytes=base_bytes,
            adapter_bytes=resident_bytes - base_bytes + moments_bytes,
            kept_bytes=kept_bytes,
            peak_bytes=counter.peak_bytes + moments_bytes,
            forward_flops=forward_flops,
            step_flops=counter.flops,
        )

    @contextmanager
    def _tracing(self):
        """Enter the modes in which a step is traced, and return the counter."""
        cached = lru_cache(maxsize=4)(
            Sam3SinePositionEmbedding.build_sine_position_embedding.__wrapped__
        )
        patches = [
            # The model reads the sides of its grid from a tensor, which has to keep its values.
            mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", _KNOWN_SCALARS),
            # The class has one cache for all models, into which no tensor without content may get.
            mock.patch.object(
                Sam3SinePositionEmbedding, "build_sine_position_embedding", staticmethod(cached)
            ),
        ]
        with ExitStack() as stack:
            for context in (*patches, as_on_gpu() if self.as_gpu else nullcontext(), self._fake):
                stack.enter_context(context)
            yield stack.enter_context(StepCounter(_GPU_BLOCK if self.as_gpu else 1))


def _empty_model(base_config, config):
    """Build the model of a training run, without content, in train mode."""
    base_config = deepcopy(base_config)
    base_config.image_size = config.model.resolution
    base_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = PromptedSam3(base_config)
    for encoder in (model.vision_encoder, model.text_encoder):
        encoder.to(base_dtype(config.training.mixed_precision))
    peft_model = add_lora(model, config.lora)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    return peft_model.train()


def _forward(model, config, load):
    """Run forward pass and loss as the trainer does, and return the loss alone."""
    dtype = _AUTOCAST.get(config.training.mixed_precision)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(**_inputs(model.get_base_model(), config, load))
    return _loss(loss_inputs(convert_to_fp32(outputs)), load)


def _inputs(base, config, load):
    """Make the tensors of a batch, features in place of what a cache would hold."""
    cached = config.training.feature_cache is not None
    shape = (load.prompts, MAX_TOKENS)
    inputs = {
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "image_index": torch.tensor(
            [row * load.images // load.prompts for row in range(load.prompts)]
        ),
    }
    if cached and not config.lora.apply_to_vision_encoder:
        backbone = base.vision_encoder.backbone
        num_patches = (base.resolution // backbone.config.patch_size) ** 2
        shape_of_states = (load.images, num_patches, backbone.config.hidden_size)
        inputs["backbone_states"] = torch.empty(shape_of_states, dtype=backbone.dtype)
    else:
        inputs["pixel_values"] = torch.empty(load.images, 3, base.resolution, base.resolution)
    if cached and not config.lora.apply_to_text_encoder:
        inputs["text_states"] = torch.empty(*shape, base.text_projection.out_features)
    else:
        inputs["input_ids"] = torch.zeros(shape, dtype=torch.long)
    return inputs


def _loss(outputs, load):
    """Compute SAM3's loss with queries given to objects in order: a matching needs numbers.

    The two semantic terms are replaced by a mean. They read one channel where the masks of the
    queries have 200, so nothing of size is lost.
    """
    side = outputs["pred_masks"].shape[-1]
    num_queries = outputs["pred_logits"].shape[1]
    counts = [*load.objects, *[0] * (load.prompts - len(load.objects))]
    targets = [
        {"boxes_cxcywh": torch.empty(n, 4), "masks": torch.empty(n, side, side, dtype=torch.uint8)}
        for n in counts
    ]
    matches = [(torch.arange(min(n, num_queries)),) * 2 for n in counts]
    num_boxes = max(sum(counts), 1)
    terms = mask_terms(outputs["pred_masks"], targets, matches, num_boxes)
    total = sum(terms.values()) + outputs["semantic_logits"].mean()
    for layer in (outputs, *outputs["aux"]):
        terms, ious = box_terms(layer["pred_boxes_cxcywh"], targets, matches, num_boxes)
        logits, presence = layer["pred_logits"], layer["presence_logits"]
        terms |= score_terms(logits, presence, targets, matches, ious, "native", load.prompts)
        total = total + sum(terms.values())
    return total
