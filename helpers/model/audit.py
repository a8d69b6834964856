"""What an adapter consists of, what it does to prompts, and what no adapter can do to a logit."""

import pandas as pd
import torch
from torch.nn.utils import get_total_norm

from helpers.model.lora import COMPONENTS, component_of, lora_layers
from helpers.model.prompted import base_of


def adapter_report(model):
    """Count and measure the LoRA of every component.

    Parameters
    ----------
    model : peft.PeftModel
        May be on ``meta``; what needs values is then NaN.

    Returns
    -------
    pandas.DataFrame
        One row per ``component`` and a row ``total``: ``modules`` (adapted linear layers),
        ``parameters`` (of A and B), ``share`` (of all parameters of the model), ``grad_norm``
        (Euclidean; NaN before a backward pass), ``B_norm`` (Euclidean) and ``B_nonzero``, the
        share of modules whose B, first zero, has moved.
    """
    layers = lora_layers(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    groups = {
        component: [layer for name, layer in layers if component_of(name) == component]
        for component in COMPONENTS
    }
    groups["total"] = [layer for _, layer in layers]
    rows = {name: _measure(group, total) for name, group in groups.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("component")


def _measure(layers, total):
    matrices_a = [matrix.weight for layer in layers for matrix in layer.lora_A.values()]
    matrices_b = [matrix.weight for layer in layers for matrix in layer.lora_B.values()]
    parameters = sum(matrix.numel() for matrix in matrices_a + matrices_b)
    known_b = [] if any(matrix.is_meta for matrix in matrices_b) else matrices_b
    nonzero = [bool(matrix.detach().any()) for matrix in known_b]
    return {
        "modules": len(layers),
        "parameters": parameters,
        "share": parameters / total,
        "grad_norm": _norm([m.grad for m in matrices_a + matrices_b if m.grad is not None]),
        "B_norm": _norm(known_b),
        "B_nonzero": sum(nonzero) / len(nonzero) if nonzero else float("nan"),
    }


def _norm(tensors):
    """Return the Euclidean norm of all entries of some tensors as a float; NaN without any."""
    tensors = [tensor.detach().float() for tensor in tensors]
    return float(get_total_norm(tensors)) if tensors else float("nan")


@torch.no_grad()
def prompt_embeddings(model, processor, prompts):
    """Return the text encoder's mean over the tokens of each of P prompts: (P, d) on the CPU."""
    base = base_of(model)
    tokens = processor(text=list(prompts), return_tensors="pt").to(base.device)
    features = base.text_states(tokens["input_ids"], tokens["attention_mask"])
    mask = tokens["attention_mask"][..., None].to(features)
    return ((features * mask).sum(1) / mask.sum(1)).float().cpu()
