"""From model outputs to detections: scores, boxes in pixels, masks at the size of the image.

The score of a query is ``sigmoid(query logit) * sigmoid(presence logit)``. Both factors are kept,
because "no detection" has another cause when presence is low than when the queries are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask

from helpers.errors import check_probability

MASKS_AT_ONCE = 32


@dataclass(frozen=True)
class RawPrediction:
    """Everything the model said about one prompt on one image, before any threshold.

    Attributes
    ----------
    image, prompt : str
        What was looked at and asked for.
    height, width : int
        Size of the upright image in pixels.
    query_logits : numpy.ndarray
        (Q,) float32, clamped to [-12, 12] by the model.
    presence_logit : float
        Clamped to [-10, 10] by the model.
    boxes_xyxy : numpy.ndarray
        (Q, 4) float32 in pixels, not clipped to the image.
    mask_logits : numpy.ndarray
        (Q, h, w) float32 on the model's grid.
    semantic_logits : numpy.ndarray
        (h, w) float32, the map of all pixels that belong to the prompt.
    """

    image: str
    prompt: str
    height: int
    width: int
    query_logits: np.ndarray
    presence_logit: float
    boxes_xyxy: np.ndarray
    mask_logits: np.ndarray
    semantic_logits: np.ndarray

    @property
    def query_prob(self):
        """numpy.ndarray: (Q,) sigmoid of the query logits."""
        return torch.from_numpy(self.query_logits).sigmoid().numpy()

    @property
    def presence_prob(self):
        """float: sigmoid of the presence logit."""
        return float(torch.tensor(self.presence_logit).sigmoid())

    @property
    def scores(self):
        """numpy.ndarray: (Q,) product of `query_prob` and `presence_prob`."""
        return self.query_prob * np.float32(self.presence_prob)

    @property
    def max_query_prob(self):
        """float: the highest query probability."""
        return float(self.query_prob.max())

    @property
    def max_score(self):
        """float: the highest score."""
        return float(self.scores.max())


def raw_predictions(outputs, described):
    """Take model outputs apart, one `RawPrediction` per row.

    Parameters
    ----------
    outputs : helpers.model.sam3.PromptedSam3Output or dict
        ``pred_logits`` (B, Q), ``presence_logits`` (B, 1), ``pred_boxes`` (B, Q, 4) xyxy in
        [0, 1], ``pred_masks`` (B, Q, h, w), ``semantic_logits`` (B, 1, h, w).
    described : sequence of tuple
        B tuples ``(image, prompt, height, width)``.

    Returns
    -------
    list of RawPrediction
        On the CPU.
    """
    names = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks", "semantic_logits")
    tensors = [outputs[name].detach().float().cpu() for name in names]
    predictions = []
    for row, (image, prompt, height, width) in enumerate(described):
        logits, presence, boxes, masks, semantic = (tensor[row] for tensor in tensors)
        predictions.append(
            RawPrediction(
                image=image,
                prompt=prompt,
                height=height,
                width=width,
                query_logits=logits.numpy(),
                presence_logit=presence.item(),
                boxes_xyxy=(boxes * torch.tensor([width, height, width, height])).numpy(),
                mask_logits=masks.numpy(),
                semantic_logits=semantic[0].numpy(),
            )
        )
    return predictions


def detect(raw, score_threshold, mask_threshold=0.5, max_detections=None):
    """Keep the queries above a threshold and give them masks at the size of the image.

    Parameters
    ----------
    raw : RawPrediction
    score_threshold : float
        In [0, 1]; a query is kept if its score is greater.
    mask_threshold : float
        In [0, 1]; a pixel belongs to the mask if its probability is greater.
    max_detections : int, optional
        Keep at most the best this many.

    Returns
    -------
    list of dict
        See `Prediction.detections`. There is no suppression of duplicates, as in SAM3 itself.

    Raises
    ------
    InputError
        For a threshold that is no probability.
    """
    check_probability(score_threshold, "score_threshold")
    check_probability(mask_threshold, "mask_threshold")
    scores = raw.scores
    order = np.argsort(-scores, kind="stable")
    kept = order[scores[order] > score_threshold][:max_detections]
    limits = [raw.width, raw.height, raw.width, raw.height]
    boxes_xyxy = np.clip(raw.boxes_xyxy[kept], 0, limits)
    rles = _encode(raw.mask_logits[kept], raw.height, raw.width, mask_threshold)
    return [
        {"score": float(score), "box_xyxy": box.tolist(), "mask_rle": rle}
        for score, box, rle in zip(scores[kept], boxes_xyxy, rles, strict=True)
    ]


def masks_at_image_size(mask_logits, height, width, mask_threshold):
    """Upsample mask logits bilinearly, then compare their probability with a threshold.

    Parameters
    ----------
    mask_logits : numpy.ndarray
        (n, h, w) float32.
    height, width : int
        Size of the image in pixels.
    mask_threshold : float
        In [0, 1].

    Returns
    -------
    numpy.ndarray
        (n, height, width) bool.
    """
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(mask_logits)[None],
        size=(height, width),
        mode="bilinear",
        align_corners=False,
    )[0]
    return (upsampled.sigmoid() > mask_threshold).numpy()


def _encode(mask_logits, height, width, mask_threshold):
    """Turn (n, h, w) logits into COCO compressed run lengths, a few masks at a time."""
    rles = []
    for start in range(0, len(mask_logits), MASKS_AT_ONCE):
        logits = mask_logits[start : start + MASKS_AT_ONCE]
        masks = masks_at_image_size(logits, height, width, mask_threshold)
        rles += coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [
        {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        for rle in rles
    ]
