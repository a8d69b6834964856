"""From model outputs to detections: scores, boxes in pixels, masks at the size of the image.

The score of a query is its probability times that of presence. A detection counts from the
threshold on, as in Meta's cgF1 evaluator; SAM3's own post-processing asks for more than it.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from helpers.data.masks import mask_to_rle
from helpers.errors import check_probability

PROBABILITIES = ("presence_prob", "max_query_prob", "max_score")
PIXELS_AT_ONCE = 2**24  # of masks that are upsampled together, 64 MB of logits; one mask at least


@dataclass(frozen=True)
class RawPrediction:
    """Everything the model said about one prompt on one image, before any threshold."""

    image: str
    prompt: str
    height: int  # of the upright image, in pixels
    width: int
    query_logits: np.ndarray  # (Q,) float32, clamped to [-12, 12] by the model
    presence_logit: float  # clamped to [-10, 10] by the model
    boxes_xyxy: np.ndarray  # (Q, 4) float32 in pixels, not clipped to the image
    mask_logits: np.ndarray  # (Q, h, w) float32 on the model's grid
    semantic_logits: np.ndarray  # (h, w) float32, all pixels that belong to the prompt

    @property
    def query_prob(self):
        """(Q,) sigmoid of the query logits."""
        return torch.from_numpy(self.query_logits).sigmoid().numpy()

    @property
    def presence_prob(self):
        """Sigmoid of the presence logit."""
        return float(torch.tensor(self.presence_logit).sigmoid())

    @property
    def scores(self):
        """(Q,) product of `query_prob` and `presence_prob`."""
        return self.query_prob * np.float32(self.presence_prob)

    @property
    def max_query_prob(self):
        """The highest query probability."""
        return float(self.query_prob.max())

    @property
    def max_score(self):
        """The highest score."""
        return float(self.scores.max())


def reaches(scores, threshold):
    """Return which scores, of any shape, are at least a threshold in [0, 1], in float64 as printed."""
    return np.asarray(scores, dtype=np.float64) >= threshold


def raw_predictions(outputs, described):
    """Make one `RawPrediction`, on the CPU, of each of B rows (image, prompt, height, width)."""
    names = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks", "semantic_logits")
    tensors = [outputs[name].detach().float().cpu() for name in names]
    predictions = []
    for (image, prompt, height, width), *row in zip(described, *tensors, strict=True):
        logits, presence, boxes, masks, semantic = row
        boxes_xyxy = (boxes * torch.tensor([width, height, width, height])).numpy()
        numbers = (logits.numpy(), presence.item(), boxes_xyxy, masks.numpy(), semantic[0].numpy())
        predictions.append(RawPrediction(image, prompt, height, width, *numbers))
    return predictions


def detect(raw, score_threshold, mask_threshold=0.5, max_detections=None):
    """Keep the queries that reach a score and give them masks at the size of the image.

    A query is kept from its threshold on, a pixel above its own. Returns a list as
    `Prediction.detections`, at most `max_detections`; duplicates stay, as in SAM3 itself.
    """
    check_probability(score_threshold, "score_threshold")
    check_probability(mask_threshold, "mask_threshold")
    scores = raw.scores
    order = np.argsort(-scores, kind="stable")
    best = order[reaches(scores[order], score_threshold)][:max_detections]
    boxes_xyxy = np.clip(raw.boxes_xyxy[best], 0, [raw.width, raw.height] * 2)
    detections = []
    step = max(1, PIXELS_AT_ONCE // (raw.height * raw.width))
    for start in range(0, len(best), step):
        part, boxes = best[start : start + step], boxes_xyxy[start : start + step]
        masks = masks_at_image_size(raw.mask_logits[part], raw.height, raw.width, mask_threshold)
        detections += [
            {"score": float(score), "box_xyxy": box.tolist(), "mask_rle": mask_to_rle(mask)}
            for score, box, mask in zip(scores[part], boxes, masks, strict=True)
        ]
    return detections


def masks_at_image_size(mask_logits, height, width, mask_threshold):
    """Upsample (n, h, w) logits bilinearly, then threshold them: (n, height, width) bool."""
    logits, settings = torch.from_numpy(mask_logits)[None], {"mode": "bilinear"}
    upsampled = torch.nn.functional.interpolate(logits, size=(height, width), **settings)[0]
    return (upsampled.sigmoid() > mask_threshold).numpy()


def output_table(raws):
    """Describe raw outputs by the numbers that a zero detection is diagnosed with.

    Parameters
    ----------
    raws : sequence of RawPrediction

    Returns
    -------
    pandas.DataFrame
        One row each: ``image_id``, ``prompt``; ``logit_min``, ``logit_median``, ``logit_max`` over
        the queries; ``presence_prob``, ``max_query_prob`` and ``max_score``, in [0, 1];
        ``semantic_mean`` and ``semantic_max``, probabilities over the pixels of the semantic map.
    """
    rows = []
    for raw in raws:
        logits = raw.query_logits
        semantic = 1 / (1 + np.exp(-raw.semantic_logits.astype(np.float64)))
        spread = (float(logits.min()), float(np.median(logits)), float(logits.max()))
        highest = (raw.presence_prob, raw.max_query_prob, raw.max_score)
        rows.append((raw.image, raw.prompt, *spread, *highest, semantic.mean(), semantic.max()))
    columns = ["image_id", "prompt", "logit_min", "logit_median", "logit_max", "presence_prob"]
    columns += ["max_query_prob", "max_score", "semantic_mean", "semantic_max"]
    return pd.DataFrame(rows, columns=columns)
