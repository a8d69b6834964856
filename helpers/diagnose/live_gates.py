"""Gates on the pipeline as it runs: what its loss rewards, and what its detection makes of outputs."""

import inspect
from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from transformers import set_seed

from helpers.data.dataset import PromptCollator, PromptDataset, load_dataset
from helpers.data.images import open_upright
from helpers.detect.detections import masks_at_image_size, raw_predictions, reaches
from helpers.diagnose.patient import Evidence, LivePatient, evidence_if, gate
from helpers.errors import InputError
from helpers.files import progress_bar
from helpers.model.lora import add_lora, component_of
from helpers.model.losses import sam3_losses
from helpers.model.prompted import PromptedSam3, base_of, loss_inputs
from helpers.model.sam3 import best_device, load_base

SURE_LOGIT = 8.0  # of a perfect prediction; its sigmoid differs from 1 by 0.0003
LEAST_RISE = 1e-4  # of a loss, relative, when the prediction gets worse in one respect
UNLEARNABLE = 0.9  # of the loss of a silent prediction that a perfect one may cost at most
LOW, HIGH = 0.02, 0.5  # thresholds that a detection is asked with
SCORE_GAP, PIXEL_GAP, LEAST_MASK_IOU = 2e-3, 2.0, 0.7
"""How far results may be from ours: scores, box corners, and the masks of the same query."""
FOREIGN_WORDS = ("zebra", "violin")
NUM_PICTURES = 3
_RESULT_NAMES = {"scores": "score", "boxes": "box", "masks": "mask"}
LEARNED = 0.1  # of the first loss of a batch that is trained on alone
LOSS_GATES, DETECT_GATES = [], []


def forward(patient, batch):
    """Run the model on a batch of `LivePatient`."""
    inputs = {name: tensor.to(patient.device) for name, tensor in batch["inputs"].items()}
    if not isinstance(base_of(patient.model), PromptedSam3):
        inputs["pixel_values"] = inputs["pixel_values"][inputs.pop("image_index")]
    return patient.model(**inputs)


def loss_of(patient, outputs, targets):
    """Return the loss as a scalar tensor."""
    value = patient.loss(outputs, send_to_device(targets, patient.device))  # as a Trainer does
    if isinstance(value, Mapping):
        value = value.get("loss", value.get("total"))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        fix = "return a scalar, or terms with their sum as 'loss' or 'total'"
        raise InputError(f"loss returns a {type(value).__name__}", where="loss", fix=fix)
    return value.reshape(())


def objects_batch(patient):
    """Return the first batch with an object."""
    for batch in patient.batches:
        if any(query["is_positive"] for query, _ in batch["rows"]):
            return batch
    raise InputError("no object is in the batches", where="batches")


@gate(LOSS_GATES, "loss of a batch", "finite, above 0, with a gradient in every part of LoRA")
def loss_of_a_batch(patient):
    """Compute the loss of a batch with objects as the training does, and its gradient."""
    batch = patient.loss and objects_batch(patient)
    patient.model.train()
    with torch.random.fork_rng():
        loss = loss_of(patient, forward(patient, batch), batch["targets"])
    text = f"the loss of a batch with objects is {float(loss.detach()):.4g}"
    if not loss.isfinite():
        return text, [Evidence("not_finite", 1.0, text)]
    if loss == 0:
        return text, [Evidence("no_objects", 1.0, f"{text}: nothing is compared")]
    named = {n: p for n, p in patient.model.named_parameters() if p.requires_grad}
    if not named:
        return f"{text}; no parameter is set to be trained, so no gradient was asked", []
    gradients, norms = [None] * len(named), {}
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        part = component_of(name.removeprefix("base_model.model.")) or "other modules"
        norms[part] = norms.get(part, 0.0) + (0.0 if gradient is None else float(gradient.norm()))
    text += "; norm of the gradient: " + ", ".join(f"{k} {v:.2g}" for k, v in norms.items())
    if not np.isfinite(sum(norms.values())):
        return text, [Evidence("not_finite", 1.0, text)]
    unasked = {"geometry_encoder"} | ({"mask_decoder"} if not patient.trains_masks else set())
    idle = [name for name, norm in norms.items() if not norm and name not in unasked]
    reason = f"no gradient arrives in {', '.join(idle)}: {text}"
    return text, evidence_if(idle, "adapter_at_zero", 0.8 if any(norms.values()) else 1.0, reason)


def changed(outputs, **changes):
    """Return outputs of the same class with other tensors, for those names that it has."""
    changes = {name: value for name, value in changes.items() if name in outputs}
    return type(outputs)(**{**outputs, **changes})


def perfect(outputs, rows):
    """Return outputs that say exactly what the rows of a batch hold: query n finds object n."""
    names = ("pred_logits", "presence_logits", "pred_masks", "semantic_seg")
    logits, presence, masks, semantic = (torch.full_like(outputs[n], -SURE_LOGIT) for n in names)
    boxes = outputs["pred_boxes"].clone()
    for row, (_, objects) in enumerate(rows):
        targets = objects["boxes_cxcywh"][: logits.shape[1]]
        if not (count := len(targets)):
            continue
        logits[row, :count] = presence[row] = SURE_LOGIT
        boxes[row, :count] = box_convert(targets, "cxcywh", "xyxy").to(boxes)
        if objects["masks"].numel():
            grid = functional.interpolate(objects["masks"][None, :count].float(), masks.shape[-2:])
            masks[row, :count] = SURE_LOGIT * (2 * grid[0].to(masks) - 1)
            semantic[row] = masks[row, :count].amax(0)
    certain = {"pred_logits": logits, "presence_logits": presence, "pred_masks": masks}
    certain |= {"semantic_seg": semantic, "semantic_logits": semantic, "aux": []}
    return changed(_with_boxes(outputs, boxes), **certain)


def _with_boxes(outputs, boxes):
    """Return outputs with other boxes, corners in [0, 1]."""
    centres = box_convert(boxes, "xyxy", "cxcywh")
    return changed(outputs, pred_boxes=boxes, pred_boxes_cxcywh=centres)


def _cost(patient, outputs, targets):
    """Return the loss of a prediction as a float; inf if the loss refuses it."""
    try:
        return float(loss_of(patient, outputs, targets))
    except (ValueError, AssertionError, RuntimeError):
        return float("inf")


@gate(LOSS_GATES, "loss and objects", "least for a perfect prediction, more for every mistake")
@torch.no_grad()
def loss_and_objects(patient):
    """Compare the loss of a perfect prediction with those of predictions with one mistake."""
    batch = patient.loss and objects_batch(patient)
    patient.model.eval()
    rows, targets = batch["rows"], batch["targets"]
    best = perfect(forward(patient, batch), rows)
    logits, boxes = best["pred_logits"], best["pred_boxes"]
    twin_logits, twins, as_written = logits.clone(), boxes.clone(), boxes.clone()
    for row, (_, objects) in enumerate(rows):
        count = min(len(objects["boxes_cxcywh"]), logits.shape[1] // 2)
        twin_logits[row, count : 2 * count] = SURE_LOGIT if count else -SURE_LOGIT
        twins[row, count : 2 * count] = boxes[row, :count]
        as_written[row, :count] = objects["boxes_cxcywh"][:count].to(boxes)
    centres = box_convert(boxes, "xyxy", "cxcywh")
    moved = torch.cat([(centres[..., :2] + 0.5) % 1, centres[..., 2:] / 2], -1)
    masks = ("pred_masks", "semantic_seg", "semantic_logits")
    blank = {name: torch.full_like(best[name], -SURE_LOGIT) for name in masks if name in best}
    mistakes = {
        "silent": changed(best, pred_logits=torch.full_like(logits, -SURE_LOGIT)),
        "boxes elsewhere": _with_boxes(best, box_convert(moved, "cxcywh", "xyxy")),
        "no outline": changed(best, **blank),
        "every object twice": changed(_with_boxes(best, twins), pred_logits=twin_logits),
        "centres as corners": _with_boxes(best, as_written),
    }
    least = float(loss_of(patient, best, targets))
    if not np.isfinite(least):
        raise InputError(f"the loss of a perfect prediction is {least}", where="loss")
    costs = {name: _cost(patient, outputs, targets) for name, outputs in mistakes.items()}
    listed = ", ".join(f"{name} {cost:.4g}" for name, cost in costs.items())
    text = f"a perfect prediction costs {least:.4g}; {listed}"
    rises = {name: cost - least > LEAST_RISE * abs(least) for name, cost in costs.items()}
    if costs["centres as corners"] < least * (1 - LEAST_RISE):
        return text, [Evidence("wrong_box_targets", 0.95, text)]
    parts = {"scores": "silent", "boxes": "boxes elsewhere", "outlines": "no outline"}
    unseen = [part for part, mistake in parts.items() if not rises[mistake]]
    if len(unseen) == len(parts):
        return text, [Evidence("no_objects", 1.0, f"the loss does not see the objects: {text}")]
    if {"scores", "boxes"} & {*unseen}:
        reason = f"{' and '.join(unseen)} count for nothing: {text}"
        return text, [Evidence("loss_weights", 1.0, reason)]
    if not rises["every object twice"]:
        return text, [Evidence("one_to_many_matching", 0.9, text)]
    reason = f"a perfect prediction costs nearly as much as a silent one: {text}"
    return text, evidence_if(least > UNLEARNABLE * costs["silent"], "ported_loss", 0.9, reason)


def pictures(patient):
    """List (PIL image, word) to detect: the image that was named, or some of the dataset."""
    if patient.image is not None:
        return [(open_upright(patient.image), word) for word in patient.words]
    shown = [(record, item.category) for record in patient.few for item in record.objects[:1]]
    found = [(open_upright(record.path), word) for record, word in shown[:NUM_PICTURES]]
    return found + [(picture, word) for (picture, _) in found[:1] for word in FOREIGN_WORDS]


def detections_of(patient, picture, word, **threshold):
    """Ask the patient's own detection; list of (score, box (4,) or None, mask or None)."""
    answer = patient.detect(picture, word, **threshold)
    if isinstance(answer, Mapping):
        given = {key: answer[name] for name, key in _RESULT_NAMES.items() if name in answer}
        answer = [{key: values[n] for key, values in given.items()}
                  for n in range(len(given.get("score", [0])))]  # fmt: skip
    for one in answer:
        if "score" not in one:
            fix = "see helpers.diagnose.LivePatient"
            raise InputError("detect returns no score", where="detect", fix=fix)
    return [(float(one["score"]), one.get("box"), one.get("mask")) for one in answer]


def _captured(patient, picture, word, **threshold):
    """Run the patient's detection; its detections and the outputs of the model within, or None."""
    outputs = []
    hook = base_of(patient.model).register_forward_hook(lambda *given: outputs.append(given[-1]))
    try:
        found = detections_of(patient, picture, word, **threshold)
    finally:
        hook.remove()
    if not outputs:
        return found, None
    last = dict(outputs[-1])
    if len(last["pred_logits"]) != 1:
        raise InputError("detect asks several prompts at once", fix="ask a single one")
    last.setdefault("semantic_logits", last["semantic_seg"])
    width, height = picture.size
    return found, raw_predictions(last, [("picture", word, height, width)])[0]


def score_forms(raw):
    """Return ways to turn outputs into scores: name to (Q,); the right one is ``score``."""
    return {
        "score": raw.scores,
        "score without presence": raw.query_prob,
        "score with presence twice": raw.query_prob * raw.presence_prob**2,
        "sigmoid taken twice": raw.presence_prob / (1 + np.exp(-raw.query_prob)),
        "logit": raw.query_logits,
    }


def _is_among(scores, values):
    """Return whether each score is one of the values, within `SCORE_GAP`."""
    return bool((np.abs(np.subtract.outer(scores, values)).min(1) < SCORE_GAP).all())


@gate(DETECT_GATES, "detection", "scores, boxes and masks of the outputs, above the threshold")
@torch.no_grad()
def detection(patient):
    """Compare the patient's own detection with ours, on the very outputs of its model."""
    patient.detect, patient.model.eval()
    takes_threshold = "threshold" in inspect.signature(patient.detect).parameters
    low = {"threshold": LOW} if takes_threshold else {}
    texts, evidence = [], []
    for picture, word in pictures(patient):
        found, raw = _captured(patient, picture, word, **low)
        if is_apart := raw is None:  # they come from another model object than the outputs
            raw = patient.predictor(adapted=True).raw(picture, [word])[0]
            everything = dict.fromkeys(low, 0.0)
            if base_asked := _base_asked(patient, picture, word, raw.scores, everything):
                evidence += base_asked
                continue
        scores, forms = [score for score, _, _ in found], score_forms(raw)
        best = max(scores, default=0)
        texts.append(f"'{word}': {len(found)}, best {best:.3f}, ours {raw.max_score:.3f}")
        if not scores:
            expected = int(reaches(raw.scores, LOW if takes_threshold else HIGH).sum())
            reason = f"'{word}': nothing is returned, the outputs hold {expected} detections"
            evidence += evidence_if(expected, "threshold_ignored", 0.9, reason)
        elif not _is_among(scores, forms["score"]):
            names = [name for name, values in forms.items() if _is_among(scores, values)]
            name = names[0] if names else "number of no known form"
            reason = f"'{word}': the scores are each a {name}"
            evidence.append(Evidence("presence_ignored", 0.95 if names else 0.6, reason))
        else:
            evidence += _places(raw, word, found, is_apart)
            high = detections_of(patient, picture, word, threshold=HIGH) if takes_threshold else []
            least = min((score for score, _, _ in high), default=1.0)
            is_lost = takes_threshold and not high and raw.max_score >= HIGH
            reason = f"'{word}': a threshold of {HIGH:g} leaves scores of {least:.3f} or more"
            evidence += evidence_if(least < HIGH or is_lost, "threshold_ignored", 0.95, reason)
    return f"detections: {'; '.join(texts)}", evidence


def _base_asked(patient, picture, word, of_run, threshold):
    """Return evidence if detections, made without the model, have the scores (Q,) of its base."""
    of_base = patient.predictor(adapted=False).raw(picture, [word])[0].scores
    scores = [score for score, _, _ in detections_of(patient, picture, word, **threshold)]
    text = f"'{word}': detect does not ask the model that was given; its best score is the base's, "
    text += f"{of_base.max():.3f}, where the model says {of_run.max():.3f}"
    is_other = abs(of_run.max() - of_base.max()) > SCORE_GAP or not _is_among(scores, of_run)
    is_base = bool(scores) and _is_among(scores, of_base) and is_other
    return evidence_if(is_base, "weights_not_loaded", 1.0, text)


def _places(raw, word, found, is_apart):
    """Compare boxes and masks of detections with those of the queries of the same score."""
    evidence, gaps, ious, shown = [], [], [], []
    limits = [raw.width, raw.height] * 2
    ours = np.clip(raw.boxes_xyxy, 0, limits)
    for score, box, mask in found:
        same = np.flatnonzero(np.abs(raw.scores - score) < SCORE_GAP)
        if box is not None:
            box = np.clip(torch.as_tensor(box).cpu().numpy(), 0, limits)
            gaps.append(np.abs(ours[same] - box).max(1).min())
        if mask is not None:
            mask = np.asarray(torch.as_tensor(mask).cpu() > 0).squeeze()
            right = masks_at_image_size(raw.mask_logits[same], raw.height, raw.width, 0.5)
            is_resized = mask.shape == (raw.height, raw.width)
            ious.append(max(_iou(mask, one) for one in right) if is_resized else 0.0)
            shown.append(is_resized and mask.any())
    if gaps and np.median(gaps) > PIXEL_GAP:
        text = f"'{word}': box corners are {np.median(gaps):.1f} pixels (median) from the outputs'"
        evidence.append(Evidence("boxes_misplaced", 0.95, text))
    if ious and np.median(ious) < LEAST_MASK_IOU:
        text = f"'{word}': masks have an IoU of {np.median(ious):.2f} (median) with the outputs'"
        is_port = is_apart and all(shown)  # a mistake of the size or the threshold leaves less
        cause = "port_divergence" if is_port else "mask_threshold_on_logits"
        evidence.append(Evidence(cause, 0.8 if is_port else 0.95, text))
    return evidence


def _iou(first, second):
    union = (first | second).sum()
    return (first & second).sum() / union if union else 1.0


def overfit_one_batch(patient, *, steps=100, learning_rate=1e-3, progress=False):
    """Train on one batch alone, the first test of any pipeline: its loss must come near zero.

    Parameters
    ----------
    patient : LivePatient
        With ``model``, ``batches``, ``loss``; its weights are put back afterwards.
    steps : int
        Of AdamW, at most: it ends when the loss is learned.
    learning_rate : float
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    dict
        ``first`` and ``last`` loss, ``steps`` taken, ``objects`` and ``prompts`` of the batch, and
        ``learned``: whether the loss fell below `LEARNED` of the first.
    """
    batch, model = objects_batch(patient), patient.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        message = "no parameter is set to be trained"
        raise InputError(message, where="model", fix="set requires_grad")
    before = [parameter.detach().clone() for parameter in trained]
    optimizer, losses = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0), []
    with patient.at_rest(), progress_bar(steps, "overfit", "step", disable=not progress) as bar:
        model.eval()  # without dropout
        for _ in range(steps):
            loss = loss_of(patient, forward(patient, batch), batch["targets"])
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]) or losses[-1] < LEARNED * losses[0]:
                break
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            bar.update()
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return {
        "first": losses[0],
        "last": losses[-1],
        "steps": len(losses) - 1,
        "prompts": len(batch["rows"]),
        "objects": sum(len(objects["boxes_cxcywh"]) for _, objects in batch["rows"]),
        "learned": bool(losses[-1] < LEARNED * losses[0]),
    }


def patient_of_config(config):
    """Return the `LivePatient` that a training with a config starts with."""
    base, split = config.model.model_dump(), load_dataset(config).split(config.data.train_split)
    set_seed(config.training.seed)
    model, processor = load_base(base.pop("name"), **base)
    data = PromptDataset.from_config(config, split, model, processor)
    size, collate = config.training.batch_size, PromptCollator(processor)
    loader = DataLoader(data, batch_size=size, collate_fn=collate)

    def loss(outputs, targets):
        return sam3_losses(loss_inputs(outputs), targets, config.loss.variant)

    model = add_lora(model, config.lora).to(best_device())
    return LivePatient(model=model, processor=processor, batches=loader, loss=loss)
