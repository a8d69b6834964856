"""Gates on what training did: the size of the update, the words, what is left of the base."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from helpers import adapter_audit, adapters, sam3, trainer
from helpers.adapter_targets import component_of, lora_layers
from helpers.errors import InputError
from helpers.evidence import Evidence, Gate
from helpers.prompt_rows import model_inputs

MAX_UPDATE = 0.6
"""Median norm of the update over that of the weights it is added to. Healthy runs of the embedded
base: 0.13 to 0.27, no single module above 0.38."""
FORGOTTEN = 0.2
"""Share of the base's answers that are left. Healthy runs of the embedded base keep none of its ten
words either, so this speaks only beside an update above `MAX_UPDATE`."""
KNOWN_SCORE, KEPT_SCORE, LEAST_KNOWN = 0.5, 0.3, 4
MAX_COSINE, COSINE_RISE = 0.85, 0.1
"""Mean cosine between trained words and all others. The embedded base: 0.64 to 0.74; healthy runs:
-0.58 to 0.73, never above their base. That absent words draw near each other, up to 0.92 on
masonry, is no fault: they all mean no."""
LEAST_BEST, LOST_SHARE, LEAST_POINTS = 0.1, 0.5, 4
"""A validation metric that was this high, lost this share again, over so many validations. The
noisiest healthy run (potholes) never rose above 0.06."""
OVERFIT_IMAGES, OVERFIT_STEPS = 3, 20
"""Healthy on walls: the loss falls from 120 to 14, the score rises from 0.00 to 0.21."""
_TEXT = "text_encoder"


@torch.no_grad()
def size_of_update(examination):
    """Compare the norm of each update with that of the weights it is added to."""
    medians = _update_medians(examination)
    text = "median norm of update over weights: " + ", ".join(
        f"{name} {value:.2f}" for name, value in medians.items()
    )
    large = [name for name, value in medians.items() if value > MAX_UPDATE]
    # Where the text encoder alone is outgrown, its words have the say: see `words_apart`.
    evidence = [Evidence("overtrained", 0.95, text)] if set(large) - {_TEXT} else []
    return text, evidence


def _update_medians(examination):
    """Return the median over the modules of each component: dict of str to float."""
    ratios = {}
    for name, layer in lora_layers(examination.loaded.model):
        weights = layer.get_base_layer().weight.float().norm()
        for adapter in layer.lora_A:
            update = layer.get_delta_weight(adapter).float().norm()
            ratios.setdefault(component_of(name), []).append(float(update / weights))
    return {name: float(np.median(values)) for name, values in ratios.items()}


def words_apart(examination):
    """Compare the embeddings of trained words with those of others, before and after training."""
    own = list(examination.files.prompts["prompts"])
    others = [word for word in examination.config.data.negative_prompts if word not in own]
    if not (own and others):
        raise InputError("there are no other words to compare with", where="data.negative_prompts")
    before = _mean_cosine(*examination.base, own, others)
    after = _mean_cosine(examination.loaded.model, examination.loaded.processor, own, others)
    text = (
        f"mean cosine between {', '.join(own)} and {len(others)} other words: {after:.3f}, in the "
        f"base {before:.3f}"
    )
    if after > MAX_COSINE and after > before + COSINE_RISE:
        return text, [Evidence("text_distorted", 0.95, text)]
    return text, []


def _mean_cosine(model, processor, own, others):
    """Average the cosine over all pairs of a trained and another word."""
    embedded = adapter_audit.prompt_embeddings(model, processor, [*own, *others])
    embedded = torch.nn.functional.normalize(embedded, dim=1)
    return float((embedded[: len(own)] @ embedded[len(own) :].T).mean())


def known_words(examination):
    """Ask the run for what its base finds with certainty."""
    config, records = examination.config, examination.few
    contents = {word for record in records for word in record.contents}
    words = dict.fromkeys((*sorted(contents), *config.evaluation.absent_prompts))
    own = set(examination.files.prompts["prompts"])
    words = [word for word in words if word not in own]
    before = examination.raws(words, adapted=False, records=records) if words else {}
    known = [key for key, raw in before.items() if raw.max_score > KNOWN_SCORE]
    if len(known) < LEAST_KNOWN:
        raise InputError(f"the base finds {len(known)} of {len(words)} other words on the images")
    now = examination.raws(words, records=records)
    kept = sum(now[key].max_score > KEPT_SCORE for key in known)
    text = f"of {len(known)} answers that the base gives to other words, the run keeps {kept}"
    if kept < FORGOTTEN * len(known) and size_of_update(examination)[1]:
        return text, [Evidence("overtrained", 0.8, text, is_direct=False)]
    return text, []


def learning_curve(examination):
    """Look for a validation metric that was better long before the end."""
    metric = examination.config.evaluation.metric_for_best
    history = examination.files.history
    values = [entry.get(f"eval_{metric}", 0.0) for entry in history if "eval_loss" in entry]
    train = [entry["loss"] for entry in history if "loss" in entry]
    best = int(np.argmax(values))
    text = (
        f"{metric} on the validation split: best {values[best]:.3f} after {best + 1} of "
        f"{len(values)} epochs, {values[-1]:.3f} at the end; training loss {train[0]:.1f} at "
        f"first, {train[-1]:.1f} at the end"
    )
    early = best + 1 <= len(values) / 2 and len(values) >= LEAST_POINTS
    if early and values[best] > LEAST_BEST and values[-1] < LOST_SHARE * values[best]:
        return text, [Evidence("overtrained", 0.7, text, is_direct=False)]
    return text, []


def one_batch(examination):
    """Train a fresh adapter on one batch, to see whether this pipeline can learn at all."""
    config, dataset = examination.config, examination.train_dataset
    shown = [index for index, record in enumerate(dataset.records) if record.objects]
    if not shown:
        raise InputError("no training image shows an object", where=examination.data_dir)
    batch = examination.collator([dataset[index] for index in shown[:OVERFIT_IMAGES]])
    set_seed(config.training.seed)
    settings = config.model
    model, _ = sam3.load_base(settings.name, settings.revision, resolution=settings.resolution)
    model = adapters.add_lora(model, config.lora)
    with tempfile.TemporaryDirectory() as folder:
        loop = trainer.Sam3Trainer(
            config,
            model=model,
            args=trainer.training_arguments(config, Path(folder)),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=examination.collator,
        )
        before = _best_score(model, batch, loop.args.device)
        losses = _overfit(loop, model, batch)
    after = _best_score(model, batch, loop.args.device)
    text = (
        f"{len(losses)} steps on {len(shown[:OVERFIT_IMAGES])} images: loss {losses[0]:.1f} to "
        f"{losses[-1]:.1f}, mean best score {before:.3f} to {after:.3f}"
    )
    return text, _learning_evidence(text, model, losses)


def _overfit(loop, model, batch):
    """Take optimiser steps on one batch at the full learning rate; return the losses."""
    losses, optimizer = [], loop.create_optimizer()
    for _ in range(OVERFIT_STEPS):
        model.train()
        with loop.compute_loss_context_manager():
            loss = loop.compute_loss(model, loop._prepare_inputs(batch))
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, loop.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _best_score(model, batch, device):
    """Average the best score of the rows with objects."""
    outputs = model.eval()(**model_inputs(batch, device))
    scores = (outputs["pred_logits"].sigmoid() * outputs["presence_logits"].sigmoid()).max(1).values
    present = [bool(len(target["boxes_cxcywh"])) for target in batch["targets"]]
    return float(scores[torch.tensor(present, device=scores.device)].mean())


def _learning_evidence(text, model, losses):
    """Judge what became of the batch; that its score rises is shown, but 20 steps may be too few."""
    report = adapter_audit.adapter_report(model)
    if report.loc["total", "B_norm"] == 0:
        return [Evidence("adapter_at_zero", 0.95, f"{text}; every B of LoRA is still zero")]
    if losses[-1] > losses[0]:
        reason = f"{text}: the learning rate is too high to learn even one batch"
        return [Evidence("overtrained", 0.6, reason, is_direct=False)]
    return []


LEARNING_GATES = (
    Gate("size of the update", f"below {MAX_UPDATE:g} of the weights", size_of_update),
    Gate("words of the text encoder", "trained words stay apart from others", words_apart),
    Gate("known words", "some are still found", known_words),
    Gate("learning curve", "the metric stays near its best", learning_curve),
    Gate("one batch", "the loss falls", one_batch),
)
