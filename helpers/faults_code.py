"""Faults in the code of loss, matching, prediction, evaluation and port, to be planted on purpose.

Each wraps one function of the pipeline for a while; see `helpers.planting`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch

from helpers import (
    detections,
    evaluation,
    loss_terms,
    losses,
    matching,
    prediction_queries,
    prompted_sam3,
    sam3,
)
from helpers.planting import Fault, replaced, replaced_method

REWARDED_QUERIES = 4
SHORT = ("scale.num_epochs=0.04",)
"""Two epochs of the 50 that the config asks for."""


def _weights_changed(change):
    """Return a patch that adds the terms up with other weights."""

    @contextmanager
    def patch():
        original = losses.weighted_sum

        def weighted_sum(terms, weights):
            return original(terms, change(weights))

        with replaced("losses.weighted_sum", weighted_sum):
            yield

    return patch


@contextmanager
def _sum_instead_of_mean():
    original = loss_terms.loss_divisors

    def loss_divisors(*args, **kwargs):
        return original(*args, **kwargs)._replace(boxes=1.0)

    with replaced("loss_terms.loss_divisors", loss_divisors):
        yield


@contextmanager
def _double_sigmoid():
    original = loss_terms.score_terms

    def score_terms(pred_logits, *args, **kwargs):
        return original(pred_logits.sigmoid(), *args, **kwargs)

    with replaced("loss_terms.score_terms", score_terms):
        yield


@contextmanager
def _several_queries_per_object():
    original = matching.hungarian_match

    def hungarian_match(outputs, targets):
        repeated = [
            {"boxes_cxcywh": target["boxes_cxcywh"].repeat(REWARDED_QUERIES, 1)}
            for target in targets
        ]
        counts = [max(len(target["boxes_cxcywh"]), 1) for target in targets]
        pairs = zip(original(outputs, repeated), counts, strict=True)
        return [(query_idx, target_idx % count) for (query_idx, target_idx), count in pairs]

    with replaced("matching.hungarian_match", hungarian_match):
        yield


@contextmanager
def _presence_forgotten():
    scores = property(lambda raw: raw.query_prob)
    with replaced_method(detections.RawPrediction, "scores", scores):
        yield


@contextmanager
def _threshold_literal():
    original = detections.detect

    def detect(raw, score_threshold, mask_threshold=0.5, max_detections=None):
        return original(raw, 0.5, mask_threshold, max_detections)

    with replaced("detections.detect", detect):
        yield


@contextmanager
def _masks_changed(change):
    original = detections.masks_at_image_size

    def masks_at_image_size(mask_logits, height, width, mask_threshold):
        return change(original, mask_logits, height, width, mask_threshold)

    with replaced("detections.masks_at_image_size", masks_at_image_size):
        yield


def _logits_above_probability(original, mask_logits, height, width, mask_threshold):
    """Compare the logit itself with the threshold: 0.5 then cuts at a probability of 0.62."""
    as_probability = float(torch.tensor(mask_threshold).sigmoid())
    return original(mask_logits, height, width, as_probability)


def _at_grid_size(original, mask_logits, height, width, mask_threshold):
    """Leave masks at the size of the model's grid."""
    return original(mask_logits, *mask_logits.shape[-2:], mask_threshold)


@contextmanager
def _answers_to_the_next_question():
    original = prediction_queries.queries_from_outputs

    def queries_from_outputs(outputs, batch, *args, **kwargs):
        names = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks", "semantic_logits")
        moved = {name: outputs[name].roll(1, dims=0) for name in names}
        return original(moved, batch, *args, **kwargs)

    with replaced("prediction_queries.queries_from_outputs", queries_from_outputs):
        yield


@contextmanager
def _absent_prompts_dropped():
    original = evaluation.evaluate_queries

    def evaluate_queries(queries, score_threshold):
        asked = [query for query in queries if query["gt"]]
        return original(asked or queries, score_threshold)

    with replaced("evaluation.evaluate_queries", evaluate_queries):
        yield


@contextmanager
def _masks_missing_in_validation():
    def queries_from_outputs(outputs, asked, dataset, mask_threshold):
        raise KeyError("masks")

    with replaced("prediction_queries.queries_from_outputs", queries_from_outputs):
        yield


@contextmanager
def _finest_level_dropped():
    original = prompted_sam3.repeat_vision_embeds

    def repeat_vision_embeds(vision_embeds, image_index, num_prompts):
        repeated = original(vision_embeds, image_index, num_prompts)
        finest, *others = repeated.fpn_hidden_states
        return replace(repeated, fpn_hidden_states=(torch.zeros_like(finest), *others))

    with replaced("prompted_sam3.repeat_vision_embeds", repeat_vision_embeds):
        yield


@contextmanager
def _autocast_left_on():
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        yield


@contextmanager
def _decoder_zeroed():
    original = sam3.load_base

    def load_base(*args, **kwargs):
        model, processor = original(*args, **kwargs)
        for parameter in model.detr_decoder.parameters():
            torch.nn.init.zeros_(parameter)
        return model, processor

    with replaced("sam3.load_base", load_base):
        yield


CODE_FAULTS = {
    "mask weight times 100": Fault(
        "loss_weights",
        "the mask term is weighted 100 times as much as published",
        "the loss falls, the scores stay where they were",
        settings=SHORT,
        patch=_weights_changed(lambda weights: weights | {"loss_mask": 100 * weights["loss_mask"]}),
    ),
    "score weight zero": Fault(
        "loss_weights",
        "the score terms have weight 0",
        "boxes and masks improve, no score ever rises: nothing is detected",
        settings=SHORT,
        patch=_weights_changed(
            lambda weights: weights | dict.fromkeys(("loss_ce", "presence_loss"), 0.0)
        ),
    ),
    "sum instead of mean": Fault(
        "loss_weights",
        "box and mask terms are summed over the objects instead of averaged",
        "the loss is several times as high, and the higher the more objects a batch has",
        settings=SHORT,
        patch=_sum_instead_of_mean,
    ),
    "double sigmoid": Fault(
        "ported_loss",
        "the score loss takes the sigmoid of probabilities",
        "the score term cannot fall, the scores are not calibrated",
        settings=SHORT,
        patch=_double_sigmoid,
    ),
    "several queries per object": Fault(
        "one_to_many_matching",
        f"the matching rewards {REWARDED_QUERIES} queries for each object",
        "more detections lie on a better one, the longer it is trained: 36 % after five epochs, "
        "at most 19 % in healthy runs",
        settings=SHORT,
        patch=_several_queries_per_object,
    ),
    "presence forgotten": Fault(
        "presence_ignored",
        "the score is the query probability alone",
        "absent prompts get high scores; scores differ from those of the training's validation",
        patch=_presence_forgotten,
        trains=False,
    ),
    "threshold literal": Fault(
        "threshold_ignored",
        "detections are cut at 0.5 whatever threshold is asked for",
        "lowering the threshold brings no detection back",
        patch=_threshold_literal,
        trains=False,
    ),
    "mask logits as probabilities": Fault(
        "mask_threshold_on_logits",
        "mask logits are compared with the probability threshold",
        "masks are eroded, thin ones vanish; boxes and scores are right",
        patch=lambda: _masks_changed(_logits_above_probability),
        trains=False,
    ),
    "masks at grid size": Fault(
        "mask_threshold_on_logits",
        "masks stay at the size of the model's grid",
        "the evaluation refuses the masks, or every metric is 0",
        patch=lambda: _masks_changed(_at_grid_size),
        trains=False,
    ),
    "answers to the next question": Fault(
        "evaluation_mismatch",
        "the evaluation takes the answer to a prompt for that to the next one",
        "pictures look right, AP is near 0",
        patch=_answers_to_the_next_question,
        trains=False,
    ),
    "absent prompts dropped": Fault(
        "evaluation_mismatch",
        "the evaluation leaves absent prompts out",
        "metrics look good, but the detector fires on everything",
        patch=_absent_prompts_dropped,
        trains=False,
    ),
    "masks missing in validation": Fault(
        "validation_crash",
        "the validation asks its batch for a key that is not there",
        "the training ends with KeyError: 'masks' after the first epoch",
        settings=("scale.num_epochs=0.02",),
        patch=_masks_missing_in_validation,
    ),
    "finest level dropped": Fault(
        "port_divergence",
        "the finest level of the vision features is lost on the way to the mask decoder",
        "scores are as before, masks are coarse or empty",
        patch=_finest_level_dropped,
        trains=False,
    ),
    "autocast left on": Fault(
        "port_divergence",
        "a notebook cell left autocast on",
        "outputs change in the third digit, in every model of the process",
        patch=_autocast_left_on,
        trains=False,
    ),
    "decoder zeroed": Fault(
        "blank_base",
        "the weights of the base's DETR decoder are all zero",
        "nothing is found, neither with the adapter nor without it",
        patch=_decoder_zeroed,
        trains=False,
    ),
}
