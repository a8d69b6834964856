"""Run a model on a collated batch, a bounded number of prompts at a time."""

from __future__ import annotations

from contextlib import nullcontext

ROWS_AT_ONCE = 16
"""Prompts that pass through DETR and mask decoder together; each is asked on one image.

At full size a prompt takes about 0.3 GB while it passes, and its masks 66 MB. An image of a dataset
with eighty categories brings eighty prompts.
"""
_MODEL_INPUTS = (
    "pixel_values",
    "backbone_states",
    "image_index",
    "input_ids",
    "text_states",
    "attention_mask",
)


def base_of(model):
    """Return the SAM3 inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_inputs(batch, device):
    """Pick what the model reads out of a collated batch and move it to a device."""
    return {name: batch[name].to(device) for name in _MODEL_INPUTS if name in batch}


def outputs_by_rows(model, batch, device, autocast=nullcontext):
    """Run a batch in parts; the vision encoder runs once per image all the same.

    Parameters
    ----------
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
    batch : dict
        From `helpers.datasets.PromptCollator`, B rows.
    device : torch.device
        Where the model is.
    autocast : callable
        Returns the context in which the model runs.

    Yields
    ------
    rows : slice
        Which of the B rows.
    outputs : helpers.sam3.PromptedSam3Output
        Of at most `ROWS_AT_ONCE` rows.
    """
    inputs = model_inputs(batch, device)
    num_rows = len(inputs["attention_mask"])
    if num_rows > ROWS_AT_ONCE:
        seen = [inputs.pop(name, None) for name in ("pixel_values", "backbone_states")]
        with autocast():
            vision_embeds = base_of(model).vision_embeds(*seen)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows, part = slice(start, start + ROWS_AT_ONCE), inputs
        if num_rows > ROWS_AT_ONCE:
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            part["vision_embeds"] = vision_embeds
        with autocast():
            outputs = model(**part)
        yield rows, outputs
