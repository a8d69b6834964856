"""One-to-one assignment of queries to objects, as Meta's ``BinaryHungarianMatcherV2`` does it.

SAM3's one-to-many assignment is left out: the Hugging Face model has no such branch.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from helpers.errors import InputError

COST_CLASS = 2.0
COST_BBOX = 5.0
COST_GIOU = 2.0
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


@torch.no_grad()
def hungarian_match(outputs, targets):
    """Assign to every object the query that explains it, at the least total cost.

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
    """Compute the cost ``2 class + 5 L1 - 2 GIoU`` of Q queries for n objects: (Q, n) float32.

    The class cost is ``-a (1-p)^g log p + (1-a) p^g log(1-p)`` with a = 0.25 and g = 2.
    """
    logits = pred_logits.float()
    predicted, target = pred_boxes_cxcywh.float(), target_boxes_cxcywh.float()
    prob = logits.sigmoid()
    cost_positive = -FOCAL_ALPHA * (1 - prob) ** FOCAL_GAMMA * F.logsigmoid(logits)
    cost_negative = -(1 - FOCAL_ALPHA) * prob**FOCAL_GAMMA * F.logsigmoid(-logits)
    cost_bbox = torch.cdist(predicted, target, p=1)
    giou = generalized_box_iou(
        box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy")
    )
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
