"""The losses of a model beside those of a detector that never finds anything.

Two questions about a validation loss can be answered with numbers: on which scale it is, since the
same outputs give one value under SAM3's weights and another under the seed script's, and whether
it can be trusted to choose a checkpoint, since a detector without detections may have the lower
one.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch.utils.data import DataLoader

from helpers.losses import WEIGHTS, sam3_losses
from helpers.prompt_rows import model_inputs
from helpers.prompted_sam3 import PRESENCE_LOGIT_CLAMP, SCORE_LOGIT_CLAMP

_LAYER = ("pred_logits", "pred_boxes_cxcywh", "presence_logits")


@torch.no_grad()
def losses_beside_silence(model, dataset, collator):
    """Compute the mean loss of a model and of the same model with all its scores at the bottom.

    Parameters
    ----------
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
        Put into eval mode.
    dataset : helpers.datasets.PromptDataset
        For example from `helpers.prediction_queries.evaluation_dataset`.
    collator : helpers.datasets.PromptCollator

    Returns
    -------
    pandas.DataFrame
        Rows ``model`` and ``silent``: boxes and masks are the same, but all query and presence
        logits stand at the model's lower clamps, so that the highest score is below 1e-9. Columns
        ``native`` and ``early``: the mean over the images of the weighted total.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = pd.DataFrame(0.0, index=["model", "silent"], columns=list(WEIGHTS))
    for batch in DataLoader(dataset, collate_fn=collator):
        outputs = model(**model_inputs(batch, device))
        for name, judged in (("model", _parts(outputs)), ("silent", silenced(_parts(outputs)))):
            for variant in WEIGHTS:
                total = sam3_losses(judged, batch["targets"], variant)["total"]
                sums.loc[name, variant] += total.item()
    return sums / len(dataset)


def silenced(outputs):
    """Put all scores of some outputs to the lowest value the model can give.

    Parameters
    ----------
    outputs : dict
        See `helpers.losses.sam3_losses`.

    Returns
    -------
    dict
        A copy; boxes, masks and semantic map are shared with the input.
    """
    lowest = {"pred_logits": -SCORE_LOGIT_CLAMP, "presence_logits": -PRESENCE_LOGIT_CLAMP}

    def quiet(layer):
        return layer | {name: torch.full_like(layer[name], value) for name, value in lowest.items()}

    return quiet(outputs) | {"aux": [quiet(layer) for layer in outputs["aux"]]}


def _parts(outputs):
    """Return what the losses read of the model's outputs, in float32."""
    layers = [
        {name: layer[name].float() for name in _LAYER} for layer in (outputs, *outputs["aux"])
    ]
    masks = {name: outputs[name].float() for name in ("pred_masks", "semantic_logits")}
    return layers[0] | masks | {"aux": layers[1:]}
