"""Faults of training itself: the data are right, the loss is right, and yet the model is spoiled."""

from __future__ import annotations

import torch

from helpers.planting import Fault, replaced_method
from helpers.prompt_rows import base_of
from helpers.trainer import Sam3Trainer

DEEP = -30.0
"""Presence logit; the clamp is at -10."""


def scores_without_gradient():
    """Let boxes and masks learn while the scores stay what they are.

    Returns
    -------
    contextlib.AbstractContextManager
        Detaches query and presence logits between the model and a loss that is left as it is.
    """
    original = Sam3Trainer._terms
    names = ("pred_logits", "presence_logits")

    def _terms(self, outputs, targets, *args, **kwargs):
        for layer in (outputs, *outputs["aux"]):
            for name in names:
                layer[name] = layer[name].detach()
        return original(self, outputs, targets, *args, **kwargs)

    return replaced_method(Sam3Trainer, "_terms", _terms)


def presence_pushed_down():
    """Pull the presence logit to `DEEP`, far below its clamp, whatever the picture shows.

    Returns
    -------
    contextlib.AbstractContextManager
        Adds a gradient to the loss of a batch and leaves its value as it is.
    """
    original = Sam3Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        raw_logits = []
        head = base_of(self.model).detr_decoder.presence_head
        handle = head.register_forward_hook(lambda *call: raw_logits.append(call[-1]))
        try:
            loss = original(self, model, inputs, *args, **kwargs)
        finally:
            handle.remove()
        push = 100 * sum(torch.relu(logits - DEEP).mean() for logits in raw_logits)
        return loss + push - push.detach()

    return replaced_method(Sam3Trainer, "compute_loss", compute_loss)


TRAINING_FAULTS = {
    "trained far too hard": Fault(
        "overtrained",
        "trains with a learning rate five times too high that never decays",
        "the update outgrows the weights of the base; the validation score peaks early or never",
        settings=(
            "scale.learning_rate=150.0",
            "training.lr_scheduler=constant",
            "training.num_epochs=15",
        ),
    ),
    "words run together": Fault(
        "text_distorted",
        "tunes the text encoder alone, with a learning rate twenty times too high",
        "all words come to mean the same, so either all are found or none is",
        settings=(
            "lora.apply_to_vision_encoder=false",
            "lora.apply_to_mask_decoder=false",
            "scale.learning_rate=600.0",
            "training.num_epochs=10",
        ),
    ),
    "presence at its clamp": Fault(
        "at_clamp",
        "lets training push presence down where the clamp hides it, as where a loss has no clamp",
        "presence is exactly -10 for every word and picture; training on changes nothing",
        patch=presence_pushed_down,
        settings=("training.num_epochs=10",),
    ),
    "scores held back": Fault(
        "low_confidence",
        "gives boxes and masks a gradient, but not the scores",
        "the best boxes lie on the objects, with scores far below any threshold",
        patch=scores_without_gradient,
        settings=("training.num_epochs=20",),
    ),
}
"""Name to fault."""
