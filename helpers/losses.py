"""SAM3's training loss in PyTorch, equal to the numbers of Meta's own code.

A row is one image with one prompt. Queries that a Hungarian matching gives to an object learn
box, mask and score; all other queries of a row *with* objects learn a low score; a row *without*
objects teaches only the presence token (variant ``native``). The variant ``early`` is the loss of
the script that this workbook is about: there rows without objects push every score down.

Left out on purpose: the one-to-many branch (see `helpers.matching`), and the factor sqrt(B) that
Meta's published training configs put on the total.
"""

from __future__ import annotations

import torch

from helpers.errors import InputError
from helpers.loss_terms import (
    box_terms,
    loss_divisors,
    mask_terms,
    score_terms,
    semantic_terms,
    target_counts,
)
from helpers.matching import hungarian_match

NATIVE_WEIGHTS = {
    "loss_ce": 20.0,
    "presence_loss": 20.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_mask": 200.0,
    "loss_dice": 10.0,
    "loss_semantic_seg": 20.0,
    "loss_semantic_dice": 30.0,
}
EARLY_WEIGHTS = {
    "loss_ce": 2.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_mask": 5.0,
    "loss_dice": 5.0,
}
WEIGHTS = {"native": NATIVE_WEIGHTS, "early": EARLY_WEIGHTS}

_LAYER_KEYS = {"pred_logits": 2, "pred_boxes_cxcywh": 3, "presence_logits": 2}
_OUTPUT_KEYS = {**_LAYER_KEYS, "pred_masks": 4, "semantic_logits": 4}
_PER_OBJECT = ("boxes_cxcywh", "masks", "mask_valid")


def sam3_losses(outputs, targets, variant="native", *, divisors=None):
    """Compute every term of SAM3's loss and their weighted total.

    Parameters
    ----------
    outputs : dict
        ``pred_logits`` (B, Q) logits; ``pred_boxes_cxcywh`` (B, Q, 4) in [0, 1];
        ``presence_logits`` (B, 1); ``pred_masks`` (B, Q, h, w) logits; ``semantic_logits``
        (B, 1, h, w); optionally ``aux``, a list of dicts with the first three, one for each
        earlier decoder layer.
    targets : list of dict
        B dicts: ``boxes_cxcywh`` (n, 4) in [0, 1], ``masks`` (n, H, W) of 0 and 1, optionally
        ``mask_valid`` (n,), 0 where an object has no mask (its mask must then be all zero).
        n may be 0; H, W may differ from h, w and between rows.
    variant : {"native", "early"}
        Meta's published setting, or that of the failing script.
    divisors : helpers.loss_terms.Divisors, optional
        By default those of this batch. A trainer passes those of a whole optimiser step.

    Returns
    -------
    dict of str to torch.Tensor
        Scalars, float32: the unweighted terms ``loss_ce``, ``presence_loss``, ``loss_bbox``,
        ``loss_giou``, ``loss_mask``, ``loss_dice``, ``loss_semantic_seg``,
        ``loss_semantic_dice`` of the final layer; for ``native`` also ``aux0.loss_ce`` and so on
        (ce, presence, bbox, giou of each earlier layer); and ``total``, `weighted_sum` of them
        all with ``WEIGHTS[variant]``. ``total`` can always be differentiated, also when no row
        has an object.

    Raises
    ------
    InputError
        For an unknown variant, missing keys, shapes that disagree, boxes that are not fractions
        of the image, and for matching costs that are not finite.

    Notes
    -----
    Forms and constants are those of facebookresearch/sam3 at 99d02f2,
    ``sam3/train/loss/loss_fns.py``. Everything is computed in float32.
    """
    _check(outputs, targets, variant)
    if divisors is None:
        divisors = loss_divisors(target_counts(targets))
    matches = hungarian_match(outputs, targets)
    terms = _layer_terms(outputs, targets, matches, variant, divisors)
    terms |= mask_terms(outputs["pred_masks"], targets, matches, divisors.boxes)
    terms |= semantic_terms(outputs["semantic_logits"], targets, divisors.masked_rows)
    if variant == "native":
        for index, layer in enumerate(outputs.get("aux") or ()):
            layer_matches = hungarian_match(layer, targets)
            layer_terms = _layer_terms(layer, targets, layer_matches, variant, divisors)
            terms |= {f"aux{index}.{name}": value for name, value in layer_terms.items()}
    terms["total"] = weighted_sum(terms, WEIGHTS[variant])
    return terms


def weighted_sum(terms, weights):
    """Add up loss terms, each times the weight of its name.

    Parameters
    ----------
    terms : dict of str to torch.Tensor
        Terms as `sam3_losses` returns them. ``aux0.loss_ce`` takes the weight of ``loss_ce``.
    weights : dict of str to float
        Weight by name; a term without a weight is left out.

    Returns
    -------
    torch.Tensor
        Scalar.
    """
    weighted = [
        weights[name.rpartition(".")[2]] * value
        for name, value in terms.items()
        if name.rpartition(".")[2] in weights
    ]
    return torch.stack(weighted).sum()


def _layer_terms(layer, targets, matches, variant, divisors):
    """Compute the four terms that every decoder layer has."""
    terms, ious = box_terms(layer["pred_boxes_cxcywh"], targets, matches, divisors.boxes)
    logits, presence = layer["pred_logits"], layer["presence_logits"]
    return terms | score_terms(logits, presence, targets, matches, ious, variant, divisors.rows)


def _check(outputs, targets, variant):
    """Refuse what would broadcast or train silently into something else."""
    if variant not in WEIGHTS:
        raise InputError(f"unknown loss variant {variant!r}", fix=f"use one of {list(WEIGHTS)}")
    if not targets:
        raise InputError("no rows: a loss needs at least one image with a prompt", where="targets")
    _check_shapes(outputs, _OUTPUT_KEYS, len(targets), "outputs")
    for index, layer in enumerate(outputs.get("aux") or ()):
        _check_shapes(layer, _LAYER_KEYS, len(targets), f"outputs['aux'][{index}]")
    for row, target in enumerate(targets):
        where = f"targets[{row}]"
        if missing := {"boxes_cxcywh", "masks"} - set(target):
            raise InputError(f"missing {sorted(missing)}", where=where)
        boxes = target["boxes_cxcywh"]
        counts = {name: len(target[name]) for name in target if name in _PER_OBJECT}
        if len(set(counts.values())) > 1:
            raise InputError(f"numbers of objects differ: {counts}", where=where)
        if boxes.shape[1:] != (4,):
            raise InputError(f"boxes_cxcywh has shape {tuple(boxes.shape)}", where=where)
        if len(boxes) and (boxes.min() < -0.01 or boxes.max() > 1.01):
            raise InputError(
                f"boxes_cxcywh reaches from {boxes.min():g} to {boxes.max():g}",
                where=where,
                fix="give centre, width and height as fractions of the image, in [0, 1]",
            )


def _check_shapes(outputs, num_dims, num_rows, where):
    """Refuse missing outputs, and any whose rank or number of rows is not as documented."""
    if missing := set(num_dims) - set(outputs):
        raise InputError(f"missing {sorted(missing)}", where=where)
    for name, rank in num_dims.items():
        shape = tuple(outputs[name].shape)
        if len(shape) != rank or shape[0] != num_rows:
            raise InputError(
                f"{name} has shape {shape}, expected {rank} dimensions and {num_rows} rows",
                where=where,
            )
