"""How low and how high the frozen scoring head lets a query logit go.

The logit of a query is the scaled dot product of a projection of its decoder state and one of the
prompt. The decoder state comes out of a layer norm, so it lies in an ellipsoid, and an affine
function of it has a lowest and a highest value there. LoRA on vision, text or DETR moves the state
within the ellipsoid; as long as the norm, the projections and the prompt are frozen, no training
can leave it.
"""

from __future__ import annotations

from copy import copy

import pandas as pd
import torch

from helpers.prompted_sam3 import SCORE_LOGIT_CLAMP


@torch.no_grad()
def query_logit_bounds(model, processor, prompts):
    """Compute the range of logits that each prompt can get.

    Parameters
    ----------
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
        With LoRA on the text encoder the bounds are those of its present state.
    processor : transformers.Sam3Processor
    prompts : sequence of str

    Returns
    -------
    pandas.DataFrame
        Index ``prompt``. ``lowest_dot_product`` and ``highest_dot_product``: the extremes over
        all outputs of the decoder's layer norm; ``lowest_logit`` and ``highest_logit``: the same
        after the model's clamp at -12 and 12, beyond which there is no gradient either.

    Notes
    -----
    With the norm's output ``gamma * n + beta``, where ``n`` has mean 0 and a length below
    ``sqrt(d)``, and the logit ``a . h + b``: the extremes are
    ``a . beta + b -/+ sqrt(d) |v - mean(v)|`` with ``v = a * gamma``.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.eval()
    norm = base.detr_decoder.output_layer_norm
    head = copy(base.dot_product_scoring)
    head.clamp_logits = False
    tokens = processor(text=list(prompts), return_tensors="pt").to(base.device)
    mask = tokens["attention_mask"].bool()
    features = base.text_states(tokens["input_ids"], tokens["attention_mask"]).float()
    width = norm.normalized_shape[0]
    probes = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(features)
    probes = probes.expand(1, len(prompts), -1, -1)
    offset, *rows = head(probes, features, mask)[0, ..., 0].T  # the head is affine in the state
    slope = torch.stack(rows) - offset
    tilted = slope * norm.weight[:, None]
    reach = width**0.5 * (tilted - tilted.mean(0)).norm(dim=0)
    middle = norm.bias @ slope + offset
    lowest, highest = (middle - reach).float().cpu(), (middle + reach).float().cpu()
    limit = SCORE_LOGIT_CLAMP
    return pd.DataFrame(
        {
            "lowest_dot_product": lowest.tolist(),
            "highest_dot_product": highest.tolist(),
            "lowest_logit": lowest.clamp(-limit, limit).tolist(),
            "highest_logit": highest.clamp(-limit, limit).tolist(),
        },
        index=pd.Index(list(prompts), name="prompt"),
    )
