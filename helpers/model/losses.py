"""SAM3's training loss in PyTorch, equal to the numbers of Meta's own code.

A row is one image with one prompt. Queries matched with an object learn box, mask and score; all
others of a row *with* objects learn a low score; a row *without* objects teaches only the presence
token. In the variant ``early``, the loss of the failing script, it pushes every score down. SAM3's
one-to-many assignment is left out: the Hugging Face model has no such branch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou, generalized_box_iou, sigmoid_focal_loss

from helpers.errors import InputError

COST_CLASS = 2.0
COST_BBOX = 5.0
COST_GIOU = 2.0
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
POSITIVE_WEIGHT = 10.0
POSITIVE_ALPHA_EARLY = 0.5
NEGATIVE_GAMMA = 2.0
MIN_QUERIES_IN_MEAN = 200
SOFT_TARGET_ALPHA = 0.25
SOFT_TARGET_MIN = 0.01
PRESENCE_ALPHA = 0.5
MASK_FOCAL = {"alpha": 0.25, "gamma": 2.0}
SEMANTIC_FOCAL = {"alpha": 0.6, "gamma": 2.0}
EPSILON = 1e-6


class Divisors(NamedTuple):
    """Divisors of the sums over objects and rows."""

    boxes: float  # of the box and mask terms
    rows: float  # of the score terms
    masked_rows: float  # of the semantic terms


def target_counts(targets):
    """Count objects, rows, and rows with at least one cell of a mask: list of float."""
    num_boxes = sum(len(target["boxes_cxcywh"]) for target in targets)
    num_masked = sum(bool(target["masks"].any()) for target in targets)
    return [float(num_boxes), float(len(targets)), float(num_masked)]


def loss_divisors(counts, num_parts=1):
    """Turn counts, summed over the `num_parts` batches of an optimiser step, into `Divisors`."""
    boxes, rows, masked_rows = counts
    sums = (max(boxes, 1.0), rows, masked_rows + EPSILON)  # no object counts as one
    return Divisors(*(divisor / num_parts for divisor in sums))


@torch.no_grad()
def hungarian_match(outputs, targets):
    """Assign to every object the query that explains it, as Meta's ``BinaryHungarianMatcherV2`` does.

    Outputs are ``pred_logits`` (B, Q) and ``pred_boxes_cxcywh`` (B, Q, 4), the B targets hold
    ``boxes_cxcywh`` (n, 4), both in [0, 1]. Returns B pairs ``(query_idx, target_idx)`` of int64
    tensors of length min(n, Q), on the device of the logits, sorted by ``target_idx``.
    """
    pred_logits, pred_boxes = outputs["pred_logits"], outputs["pred_boxes_cxcywh"]
    matches = []
    for row, target in enumerate(targets):
        boxes = target["boxes_cxcywh"].to(pred_boxes.device)
        cost = matching_cost(pred_logits[row], pred_boxes[row], boxes)
        if not torch.isfinite(cost).all():
            raise _not_finite(row, pred_logits[row], pred_boxes[row], boxes)
        target_idx, query_idx = linear_sum_assignment(cost.T.cpu().numpy())
        pair = (torch.from_numpy(index).to(pred_logits.device) for index in (query_idx, target_idx))
        matches.append(tuple(pair))
    return matches


def matching_cost(pred_logits, pred_boxes_cxcywh, target_boxes_cxcywh):
    """Compute the cost ``2 class + 5 L1 - 2 GIoU`` of Q queries for n objects: (Q, n) float32."""
    logits = pred_logits.float()
    predicted, target = pred_boxes_cxcywh.float(), target_boxes_cxcywh.float()
    prob = logits.sigmoid()
    cost_positive = -FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * F.logsigmoid(logits)
    cost_negative = -(1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * F.logsigmoid(-logits)
    cost_bbox = torch.cdist(predicted, target, p=1)
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, target))
    giou = generalized_box_iou(*corners)
    cost_class = (cost_positive - cost_negative)[:, None]
    return COST_CLASS * cost_class + COST_BBOX * cost_bbox - COST_GIOU * giou


def _not_finite(row, pred_logits, pred_boxes_cxcywh, target_boxes_cxcywh):
    """Build the error for a row whose cost holds NaN or infinity, naming the cause."""
    named = {"pred_logits": pred_logits, "pred_boxes_cxcywh": pred_boxes_cxcywh}
    broken = [name for name, value in named.items() if not torch.isfinite(value).all()]
    fix = "training has diverged: lower training.learning_rate or use another mixed_precision"
    if not torch.isfinite(target_boxes_cxcywh).all():
        broken.append("the target boxes_cxcywh")
        fix = "run `python -m helpers check` on the data; a box of this row is not a number"
    elif not broken:
        broken = ["the overlap of a predicted and a target box that both have no area"]
        fix = "run `python -m helpers check` on the data and remove boxes without width or height"
    message = f"the matching cost is not finite because of {' and '.join(broken)}"
    return InputError(message, where=f"row {row} of the batch", fix=fix)


def box_terms(pred_boxes_cxcywh, targets, matches, num_boxes):
    """Compute L1 and GIoU loss of the matched boxes, and the IoU (pairs,), without gradient."""
    device = pred_boxes_cxcywh.device
    predicted = torch.cat([pred_boxes_cxcywh[b, q] for b, (q, _) in enumerate(matches)]).float()
    pairs = zip(targets, matches, strict=True)
    target = torch.cat([t["boxes_cxcywh"].to(device)[i] for t, (_, i) in pairs]).float()
    predicted_xyxy = box_convert(predicted, "cxcywh", "xyxy")
    target_xyxy = box_convert(target, "cxcywh", "xyxy")
    giou = generalized_box_iou(predicted_xyxy, target_xyxy).diagonal()
    terms = {
        "loss_bbox": F.l1_loss(predicted, target, reduction="sum") / num_boxes,
        "loss_giou": (1 - giou).sum() / num_boxes,
    }
    return terms, box_iou(predicted_xyxy.detach(), target_xyxy).diagonal()


def score_terms(pred_logits, presence_logits, targets, matches, ious, variant, num_rows):
    """Compute ``loss_ce`` of the query scores (B, Q) and ``presence_loss`` of the presence (B, 1).

    ``native``: matched ``10 BCE(z, t)``, others ``p^2 BCE(z, 0)``; rows without objects are zeros in
    the mean over B * max(Q, 200). ``early``: matched ``0.5 BCE(z, t)``, others ``BCE(z, 0)``, all
    rows alike. In both ``t = max(0.01, p^0.25 IoU^0.75)`` without gradient, and `num_rows` is B.
    """
    logits = pred_logits.float()
    prob = logits.sigmoid()
    rows = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(matches)])
    queries = torch.cat([q for q, _ in matches])
    soft = prob.detach()[rows, queries] ** SOFT_TARGET_ALPHA * ious ** (1 - SOFT_TARGET_ALPHA)
    soft_target = torch.zeros_like(logits)
    soft_target[rows, queries] = soft.clamp(min=SOFT_TARGET_MIN)
    matched = torch.zeros_like(logits, dtype=torch.bool)
    matched[rows, queries] = True

    bce = F.binary_cross_entropy_with_logits(logits, soft_target, reduction="none")
    if variant == "early":
        loss = torch.where(matched, POSITIVE_ALPHA_EARLY * bce, bce)
        loss_ce = loss.sum() / (num_rows * loss.shape[1] + EPSILON)
        return {"loss_ce": loss_ce, "presence_loss": torch.zeros_like(loss_ce.detach())}

    present = torch.stack([(t["boxes_cxcywh"][:, 2:] > 0).all(1).any() for t in targets]).to(logits)
    loss = torch.where(matched, POSITIVE_WEIGHT * bce, prob**NEGATIVE_GAMMA * bce)
    loss = loss * present[:, None]
    presence_logits = presence_logits.float()[:, 0]
    presence = F.binary_cross_entropy_with_logits(presence_logits, present, reduction="sum")
    return {
        "loss_ce": loss.sum() / (num_rows * max(logits.shape[1], MIN_QUERIES_IN_MEAN)),
        "presence_loss": PRESENCE_ALPHA * presence / num_rows,
    }


def mask_terms(pred_masks, targets, matches, num_boxes):
    """Compute focal and dice loss of the valid matched masks, at the size of the targets."""
    pairs = []
    for row, (target, (query_idx, target_idx)) in enumerate(zip(targets, matches, strict=True)):
        if "mask_valid" in target:
            valid = target["mask_valid"].to(target_idx.device)[target_idx] > 0
            query_idx, target_idx = query_idx[valid], target_idx[valid]
        if len(query_idx):
            masks = target["masks"].to(pred_masks.device)[target_idx].float()
            pairs.append((pred_masks[row, query_idx][:, None], masks))
    loss_mask, loss_dice = _map_losses(pairs, pred_masks, MASK_FOCAL)
    return {"loss_mask": loss_mask / num_boxes, "loss_dice": loss_dice / num_boxes}


def semantic_terms(semantic_logits, targets, num_rows=None):
    """Compute focal and dice loss of the (B, 1, h, w) map against the unions of masks; empty ones skip."""
    pairs = []
    for row, target in enumerate(targets):
        masks = target["masks"].to(semantic_logits.device)
        if masks.any():
            union = (masks > 0).any(0, keepdim=True).float()
            pairs.append((semantic_logits[row : row + 1], union))
    focal, dice = _map_losses(pairs, semantic_logits, SEMANTIC_FOCAL)
    num_rows = len(pairs) + EPSILON if num_rows is None else num_rows
    return {"loss_semantic_seg": focal / num_rows, "loss_semantic_dice": dice / num_rows}


def _map_losses(pairs, outputs, settings):
    """Sum focal (mean over cells) and dice loss of (n, 1, h, w) logits and (n, H, W) masks."""
    nothing = outputs[:0].float().sum()  # can be differentiated also without a pair
    focal, dice = [nothing], [nothing]
    for logits, masks in pairs:
        size = masks.shape[-2:]
        logits = F.interpolate(logits.float(), size=size, mode="bilinear").squeeze(1)
        focal.append(sigmoid_focal_loss(logits, masks, **settings).mean((1, 2)).sum())
        prob, true = logits.sigmoid().flatten(1), masks.flatten(1)
        common = (prob * true).sum(1)
        dice.append((1 - (2 * common + 1) / (prob.sum(1) + true.sum(1) + 1)).sum())
    return torch.stack(focal).sum(), torch.stack(dice).sum()


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
        ``pred_logits`` (B, Q); ``pred_boxes_cxcywh`` (B, Q, 4) in [0, 1]; ``presence_logits``
        (B, 1); ``pred_masks`` (B, Q, h, w) logits; ``semantic_logits`` (B, 1, h, w); optionally
        ``aux``, a list of dicts with the first three, one for each earlier decoder layer.
    targets : list of dict
        B dicts: ``boxes_cxcywh`` (n, 4) in [0, 1], ``masks`` (n, H, W) of 0 and 1, optionally
        ``mask_valid`` (n,), 0 where an object has no mask (its mask must then be all zero).
    variant : {"native", "early"}
        Meta's published setting, or that of the failing script.
    divisors : Divisors, optional
        By default those of this batch. A trainer passes those of a whole optimiser step.

    Returns
    -------
    dict of str to torch.Tensor
        Float32 scalars: the unweighted terms of `WEIGHTS` of the final layer; for ``native`` also
        ``aux0.loss_ce`` and so on for each earlier layer; and ``total``. Their source is
        ``sam3/train/loss/loss_fns.py`` of facebookresearch/sam3 at 99d02f2.
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
    """Add up terms times the weight of their name; ``aux0.loss_ce`` takes that of ``loss_ce``."""
    pairs = [(name.rpartition(".")[2], value) for name, value in terms.items()]
    return torch.stack([weights[name] * value for name, value in pairs if name in weights]).sum()


def _layer_terms(layer, targets, matches, variant, divisors):
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
        if problem := _problem_of(target):
            raise InputError(problem, where=f"targets[{row}]")


def _problem_of(target):
    """Return what is wrong with the targets of a row, or None."""
    if missing := {"boxes_cxcywh", "masks"} - set(target):
        return f"missing {sorted(missing)}"
    boxes = target["boxes_cxcywh"]
    counts = {name: len(target[name]) for name in target if name in _PER_OBJECT}
    if len(set(counts.values())) > 1:
        return f"numbers of objects differ: {counts}"
    if boxes.shape[1:] != (4,):
        return f"boxes_cxcywh has shape {tuple(boxes.shape)}"
    if len(boxes) and (boxes.min() < -0.01 or boxes.max() > 1.01):
        reach = f"{boxes.min():g} to {boxes.max():g}"
        return f"boxes_cxcywh reaches from {reach}; they are fractions of the image, in [0, 1]"
    return None


def _check_shapes(outputs, num_dims, num_rows, where):
    """Refuse missing outputs, and any whose rank or number of rows is not as documented."""
    if missing := set(num_dims) - set(outputs):
        raise InputError(f"missing {sorted(missing)}", where=where)
    for name, rank in num_dims.items():
        shape = tuple(outputs[name].shape)
        if len(shape) != rank or shape[0] != num_rows:
            message = f"{name} has shape {shape}, expected {rank} dimensions and {num_rows} rows"
            raise InputError(message, where=where)
