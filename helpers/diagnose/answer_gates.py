"""Gates on what the trained model answers, always beside what its base answers.

Each looks at the best query of a prompt, not at the mean over the queries: most queries of a healthy
detector are near the bottom. A behaviour may have several reasons, so its evidence is indirect.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou
from transformers import set_seed

from helpers.data.prompts import absent_candidates, present_prompts
from helpers.detect import predictor as prediction
from helpers.diagnose.examination import Evidence, Gate, Inapplicable
from helpers.errors import InputError
from helpers.model import audit as adapter_audit
from helpers.model import lora as adapters
from helpers.model.lora import component_of, lora_layers
from helpers.model.prompted import PRESENCE_LOGIT_CLAMP, model_inputs
from helpers.train import trainer

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
    if not own:
        raise InputError("no word was trained with objects", where=examination.folder)
    if not others:
        raise Inapplicable(
            "there are no other words to compare with", where="data.negative_prompts"
        )
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
        raise Inapplicable(f"the base finds {len(known)} of {len(words)} other words on the images")
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
    model = adapters.add_lora(examination.fresh_base()[0], config.lora)
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


OUT_OF_DOMAIN = ("zebra", "violin")
"""Words that no dataset of this kind shows."""
NUM_ABSENT = 4
"""Absent words asked."""
MAX_ABSENT_SHARE, MAX_PRESENCE_ABSENT = 0.3, 0.5
"""Mean best score of absent words over that of present ones, and mean presence of absent words.
Healthy runs: 0.00 on walls and masonry, 0.16 and 0.17 on the few potholes."""
LEAST_PRESENT = 0.1
"""Mean best score of present words below which there is nothing to compare."""
AT_CLAMP = 0.999
MAX_AT_CLAMP = 0.5
"""Share of the present words whose presence stands at its lower clamp; healthy runs: 0."""
GOOD_IOU, LOW_SCORE, MAX_UNDERSOLD = 0.5, 0.3, 0.5
"""An object is undersold if a box has this IoU and no query of the prompt this score. Share of the
located objects; healthy runs: 0 of them, with 0.14 to 0.86 of the objects located."""
MORE_LOCATED = 0.2
"""Share of the objects that the run must locate beyond its base, which also has boxes."""
FOUND, HIDDEN = 0.3, 0.1
"""A word that answers, and one that does not, on the same pictures."""


def _present(examination):
    """List (record, trained word, its objects), one for each word that an image shows."""
    categories, prompt = examination.split("valid").categories, examination.config.data.prompt
    present = [
        (record, word, objects)
        for record in examination.few
        for word, objects in present_prompts(record, categories, prompt).items()
    ]
    if not present:
        raise InputError("no image shows a trained word", where=examination.data_dir)
    return present


def _answers(examination, words, *, adapted=True):
    """Ask words of the run or the base: dict of (image_id, word) to `RawPrediction`."""
    return examination.raws(list(words), adapted=adapted, records=examination.few)


def _of_present(examination, *, adapted=True):
    """Return the answers to the words that the images show."""
    present = _present(examination)
    words = dict.fromkeys(word for _, word, _ in present)
    answers = _answers(examination, words, adapted=adapted)
    return [answers[record.image_id, word] for record, word, _ in present]


def _mean(answers, name):
    """Average a property of answers; NaN without any."""
    return float(np.mean([getattr(one, name) for one in answers])) if answers else float("nan")


def run_beside_base(examination):
    """Compare the two factors of the score of present words with those of the base."""
    texts = []
    for name, adapted in (("run", True), ("base", False)):
        answers = _of_present(examination, adapted=adapted)
        score, presence, query = (
            _mean(answers, one) for one in ("max_score", "presence_prob", "max_query_prob")
        )
        low = "presence" if presence < query else "query"
        texts.append(
            f"{name}: best score {score:.3f}, presence {presence:.3f}, best query {query:.3f} "
            f"(the lower factor is the {low})"
        )
    return f"of words in the picture, {'; '.join(texts)}", []


def presence_at_clamp(examination):
    """Count the present words whose presence logit has no gradient upwards any more."""
    low = -AT_CLAMP * PRESENCE_LOGIT_CLAMP
    run = [one.presence_logit for one in _of_present(examination)]
    base = [one.presence_logit for one in _of_present(examination, adapted=False)]
    words = [*OUT_OF_DOMAIN, *_absent_words(examination)]
    others = {
        name: np.mean(
            [one.presence_logit <= low for one in _answers(examination, words, adapted=on).values()]
        )
        for name, on in (("run", True), ("base", False))
    }
    share, base_share = np.mean(np.array(run) <= low), np.mean(np.array(base) <= low)
    text = (
        f"presence stands at {-PRESENCE_LOGIT_CLAMP:g} for {share:.0%} of the words in the picture "
        f"(base {base_share:.0%}) and {others['run']:.0%} of absent words "
        f"(base {others['base']:.0%})"
    )
    # A word that the base does not know stands there before training; so absent words count too.
    if share > MAX_AT_CLAMP and others["run"] > max(MAX_AT_CLAMP, others["base"]):
        return text, [Evidence("at_clamp", 1.0, text)]
    return text, []


def words_told_apart(examination):
    """Compare the best scores of present, absent and foreign words."""
    present = _of_present(examination)
    absent = _absent_answers(examination)
    foreign = list(_answers(examination, OUT_OF_DOMAIN).values())
    score, presence = _mean(present, "max_score"), _mean(absent, "presence_prob")
    text = (
        f"mean best score of present words {score:.3f}, of absent words "
        f"{_mean(absent, 'max_score'):.3f} (presence {presence:.3f}), of foreign words "
        f"{_mean(foreign, 'max_score'):.3f}"
    )
    if score < LEAST_PRESENT or not absent:
        return text, []
    ratio = max(_mean(absent, "max_score"), _mean(foreign, "max_score")) / score
    if ratio > MAX_ABSENT_SHARE or presence > MAX_PRESENCE_ABSENT:
        return text, [Evidence("only_positive_prompts", 0.7, text, is_direct=False)]
    return text, []


def _absent_words(examination):
    """List some words that are asked as absent, in training or validation."""
    config = examination.config
    words = dict.fromkeys((*config.evaluation.absent_prompts, *config.data.negative_prompts))
    own = {word for _, word, _ in _present(examination)}
    return [word for word in words if word not in own][:NUM_ABSENT]


def _absent_answers(examination):
    """Return the answers to words that the image does not show."""
    words = _absent_words(examination)
    answers = _answers(examination, words)
    return [
        answers[record.image_id, word]
        for record in examination.few
        for word in absent_candidates(record, words)
    ]


def boxes_and_scores(examination):
    """Look for objects whose box is right while no score of the word is high."""
    present = _present(examination)
    shares = {}
    for adapted in (True, False):
        answers = _of_present(examination, adapted=adapted)
        ious, scores = [], []
        for (_, _, objects), raw in zip(present, answers, strict=True):
            boxes_xyxy = torch.tensor([item.box_xyxy for item in objects], dtype=torch.float32)
            best = box_iou(torch.from_numpy(raw.boxes_xyxy), boxes_xyxy).max(0).values
            ious += best.tolist()
            scores += [raw.max_score] * len(objects)
        located = np.array(ious) > GOOD_IOU
        undersold = located & (np.array(scores) < LOW_SCORE)
        shares[adapted] = located.mean(), undersold.sum() / max(located.sum(), 1)
    (located, undersold), (base_located, _) = shares[True], shares[False]
    text = (
        f"{located:.0%} of the objects have a box with an IoU above {GOOD_IOU:g} (base "
        f"{base_located:.0%}); of these, {undersold:.0%} have no score above {LOW_SCORE:g}"
    )
    if located > base_located + MORE_LOCATED and undersold > MAX_UNDERSOLD:
        return text, [Evidence("low_confidence", 0.8, text, is_direct=False)]
    return text, []


def words_on_same_image(examination):
    """Ask the word that is asked now and the trained ones about the same images."""
    trained = list(examination.files.prompts["prompts"])
    if not trained:
        raise InputError("no word was trained with objects", where=examination.folder)
    records = [record for record in examination.few if record.objects]
    words = list(dict.fromkeys((*examination.asked, *trained)))
    answers = _answers(examination, words)
    means = {
        word: _mean([answers[record.image_id, word] for record in records], "max_score")
        for word in words
    }
    text = "mean best score on the same images: " + ", ".join(
        f"{word!r} {mean:.3f}{'' if word in trained else ' (not trained)'}"
        for word, mean in means.items()
    )
    return text, _wrong_word(text, means, examination.asked, trained)


def _wrong_word(text, means, asked, trained):
    """Return evidence if an untrained word is silent where a trained one answers."""
    unknown = prediction.untrained_prompts(asked, trained)
    silent = [word for word in unknown if means[word] < HIDDEN]
    if silent and max(means[word] for word in trained) > FOUND:
        return [Evidence("other_training_prompt", 0.8, text, is_direct=False)]
    return []


def own_picture(examination):
    """Say what run and base answer about the user's own picture, and which word would do."""
    if examination.image is None:
        raise Inapplicable("no picture was given")
    trained = list(examination.files.prompts["prompts"])
    words = list(dict.fromkeys((*examination.asked, *trained)))
    run = prediction.Predictor(examination.loaded.model, examination.loaded.processor)
    base = prediction.Predictor(*examination.base)
    texts, means = [], {}
    for now, before in zip(
        run.raw(examination.image, words), base.raw(examination.image, words), strict=True
    ):
        means[now.prompt] = now.max_score
        texts.append(
            f"{now.prompt!r} scores {now.max_score:.3f}, presence {now.presence_prob:.3f} times "
            f"query {now.max_query_prob:.3f}; base {before.max_score:.3f}"
        )
    text = f"{examination.image.name}: {'; '.join(texts)}"
    return text, _wrong_word(text, means, examination.asked, trained)


BEHAVIOUR_GATES = (
    Gate("run beside base", "the run scores the words in the picture higher", run_beside_base),
    Gate("presence at its clamp", f"at most {MAX_AT_CLAMP:.0%} of the words", presence_at_clamp),
    Gate("absent words", f"score below {MAX_ABSENT_SHARE:.0%} of present ones", words_told_apart),
    Gate("boxes and scores", "where a box is right, a score is high", boxes_and_scores),
    Gate("words on the same image", "the word asked now answers too", words_on_same_image),
    Gate("own picture", "the word asked of it answers", own_picture),
    *LEARNING_GATES,
)
