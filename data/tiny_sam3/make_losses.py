"""The loss the embedded base is trained from scratch with.

It shares matching, box, mask and map terms with `helpers.model.losses`; what differs is the score term and
the extra sets of queries, see `data.tiny_sam3.make`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.models.sam3.modeling_sam3 import inverse_sigmoid

from data.tiny_sam3.make_model import spread_boxes
from helpers.model.losses import box_terms, hungarian_match, mask_terms, semantic_terms

WEIGHTS = {
    "loss_ce": 2.0,
    "presence_loss": 2.0,
    "loss_bbox": 5.0,
    "loss_giou": 2.0,
    "loss_mask": 20.0,
    "loss_dice": 3.0,
    "loss_semantic_seg": 10.0,
    "loss_semantic_dice": 2.0,
}
POSITIVE_WEIGHT = 3.0


class QueryGroups(nn.Module):
    """Query embeddings and reference boxes of the extra sets, used in training only."""

    def __init__(self, decoder, count):
        super().__init__()
        queries, width = decoder.query_embed.weight.shape
        self.embeddings = nn.ParameterList(
            [nn.Parameter(torch.randn(queries, width)) for _ in range(count)]
        )
        self.boxes = nn.ParameterList(
            [nn.Parameter(spread_boxes(queries, (g + 1) / (count + 1))) for g in range(count)]
        )

    def parameters_of(self, group):
        """Return what replaces the decoder's own queries."""
        return {
            "query_embed.weight": self.embeddings[group],
            "reference_points.weight": self.boxes[group],
        }


def encode(model, batch):
    """Run the encoders and the DETR encoder; the vision encoder sees each image once."""
    vision = model.get_vision_features(pixel_values=batch["pixel_values"])
    index = batch["image_index"]
    coarse, positions = vision.fpn_hidden_states[-2], vision.fpn_position_encoding[-2]
    text = model.get_text_features(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).pooler_output
    mask = batch["attention_mask"].bool()
    fused = model.detr_encoder(
        vision_features=[coarse[index]],
        text_features=text,
        vision_pos_embeds=[positions[index]],
        text_mask=mask,
    )
    return {
        "levels": vision.fpn_hidden_states[:-1],
        "text": text,
        "text_mask": mask,
        "fused": fused,
    }


def decode(model, encoded, rows, queries=None):
    """Run the decoder on some rows, with the model's own queries or with ``queries`` in their place."""
    fused, mask = encoded["fused"], encoded["text_mask"][rows]
    arguments = {
        "vision_features": fused.last_hidden_state[rows],
        "text_features": fused.text_features[rows],
        "vision_pos_encoding": fused.pos_embeds_flattened[rows],
        "text_mask": mask,
        "spatial_shapes": fused.spatial_shapes,
    }
    out = functional_call(model.detr_decoder, queries or {}, (), arguments)
    hidden = out.intermediate_hidden_states
    boxes = (inverse_sigmoid(out.reference_boxes) + model.detr_decoder.box_head(hidden)).sigmoid()
    logits = model.dot_product_scoring(hidden, fused.text_features[rows], mask).squeeze(-1)
    return {"hidden": hidden, "boxes": boxes, "logits": logits, "presence": out.presence_logits}


def score_loss(logits, matches, ious, num_boxes):
    """Pull matched queries to the root of their box's IoU, the others to zero, weighted by p."""
    rows = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(matches)])
    queries = torch.cat([q for q, _ in matches])
    logits = logits.float()
    target = torch.zeros_like(logits)
    target[rows, queries] = ious.clamp(min=0.01).sqrt()
    weight = logits.sigmoid().detach()
    weight[rows, queries] = POSITIVE_WEIGHT
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * loss).sum() / num_boxes


def detection_terms(decoded, targets, prefix=""):
    """Score and box terms of every decoder layer, and the last layer's matches."""
    num_boxes = max(1.0, float(sum(len(t["boxes_cxcywh"]) for t in targets)))
    terms, matches = {}, []
    for layer, (logits, boxes) in enumerate(zip(decoded["logits"], decoded["boxes"], strict=True)):
        matches = hungarian_match({"pred_logits": logits, "pred_boxes_cxcywh": boxes}, targets)
        boxed, ious = box_terms(boxes, targets, matches, num_boxes)
        terms |= {f"{prefix}{layer}.{name}": value for name, value in boxed.items()}
        terms[f"{prefix}{layer}.loss_ce"] = score_loss(logits, matches, ious, num_boxes)
    return terms, matches


def training_terms(model, groups, batch):
    """Compute all loss terms of one step and the two numbers that betray collapsed queries."""
    encoded = encode(model, batch)
    present = torch.tensor([len(t["boxes_cxcywh"]) > 0 for t in batch["targets"]])
    rows = present.nonzero()[:, 0]
    targets = [batch["targets"][row] for row in rows]
    decoded = decode(model, encoded, torch.arange(len(present)))
    labels = present.float()[None, :, None].expand_as(decoded["presence"])
    terms = {"presence_loss": F.binary_cross_entropy_with_logits(decoded["presence"], labels)}
    own = {name: decoded[name][:, rows] for name in ("hidden", "boxes", "logits")}
    masks = model.mask_decoder(
        decoder_queries=own["hidden"][-1],
        backbone_features=[level[batch["image_index"][rows]] for level in encoded["levels"]],
        encoder_hidden_states=encoded["fused"].last_hidden_state[rows],
        prompt_features=encoded["text"][rows],
        prompt_mask=encoded["text_mask"][rows],
    )
    terms |= semantic_terms(masks.semantic_seg, targets)
    if not targets:
        return terms, {}
    found, matches = detection_terms(own, targets)
    num_boxes = float(sum(len(t["boxes_cxcywh"]) for t in targets))
    terms |= found | mask_terms(masks.pred_masks, targets, matches, num_boxes)
    for group in range(len(groups.embeddings)):
        extra = decode(model, encoded, rows, groups.parameters_of(group))
        terms |= detection_terms(extra, targets, prefix=f"group{group}.")[0]
    return terms, _query_health(own, matches)


@torch.no_grad()
def _query_health(own, matches):
    probability = own["logits"][-1].sigmoid()
    matched = torch.zeros_like(probability, dtype=torch.bool)
    for row, (queries, _) in enumerate(matches):
        matched[row, queries] = True
    gap = probability[matched].mean() - probability[~matched].mean()
    return {"query_std": float(own["hidden"][-1].std(1).mean()), "score_gap": float(gap)}


def total_loss(terms, layers, groups):
    """Weigh the terms; those repeated over decoder layers and query groups are averaged over them."""
    total = 0.0
    for name, value in terms.items():
        share = 1.0 if "." not in name else 1 / layers
        share *= 1 / groups if name.startswith("group") else 1.0
        total = total + WEIGHTS[name.rpartition(".")[2]] * share * value
    return total
