"""Gates on what the trained model answers and on what it learned, beside what its base answers.

Each looks at the best query of a prompt: most queries of a healthy detector are near the bottom. A
behaviour may have several reasons, so its evidence is indirect.
"""

import numpy as np
import torch
from torchvision.ops import box_iou

from helpers.data.records import absent_candidates, present_prompts
from helpers.detect.knowledge import is_locked
from helpers.detect.predictor import untrained_prompts
from helpers.diagnose.data_gates import MIN_IMAGES
from helpers.diagnose.patient import FOUND, Evidence, Inapplicable, evidence_if, gate, stated
from helpers.errors import InputError
from helpers.model.audit import prompt_embeddings
from helpers.model.lora import WORD_PARTS, component_of, lora_layers
from helpers.model.prompted import PRESENCE_LOGIT_CLAMP

OUT_OF_DOMAIN = ("zebra", "violin")  # words that no dataset of this kind shows
NUM_ABSENT = 4  # absent words asked
MAX_ABSENT_SHARE, MAX_PRESENCE_ABSENT = 0.3, 0.5
"""Mean best score of absent words over that of present ones, and mean presence of absent words.
Healthy runs: 0.00 on walls and masonry, 0.16 and 0.17 on the few potholes."""
LEAST_PRESENT = 0.1  # mean best score of present words below which there is nothing to compare
AT_CLAMP, MAX_AT_CLAMP = 0.999, 0.5  # share of words with presence at the clamp; healthy runs: 0
GOOD_IOU, LOW_SCORE, MAX_UNDERSOLD = 0.5, 0.3, 0.5
"""An object is undersold if a box has this IoU and no query of the prompt this score. Share of the
located objects; healthy runs: 0 of them, with 0.14 to 0.86 of the objects located."""
MORE_LOCATED = 0.2  # share of the objects to locate beyond the base, which also has boxes
HIDDEN = 0.1  # best score of a word that does not answer
MISSED_BY = 0.5  # of the median score where the object is annotated
MISSED_SHARE = 0.25  # of the images without annotation; healthy: at most 0.25, 4 of 16
MIN_APART = 0.9  # share of pairs ordered rightly; healthy: 0.99 or more, half the labels: 0.77
MIN_SEEN = 0.1  # best score where the object is annotated, below which the model sees nothing
MAX_UPDATE = 0.6
"""Median norm of the update over that of the weights it is added to. Healthy runs of the embedded
base: 0.13 to 0.27, no single module above 0.38."""
COSINE_RISE = 0.1
"""Rise of the mean cosine between trained words and others over that of the base. Healthy runs fall
or stay, at text updates of 0.2 of the weights; distorted ones rise by 0.05 to 0.32, at 8 or more."""
BEHAVIOUR_GATES = []


def _present(examination):
    """List (record, word, its objects) for each trained word that an image shows."""
    categories, prompt = examination.split("valid").categories, examination.config.data.prompt
    present = [
        (record, word, objects)
        for record in examination.few
        for word, objects in present_prompts(record, categories, prompt).items()
    ]
    if not present:
        raise InputError("no image shows a trained word", where=examination.data_dir)
    return present


def _of_present(examination, *, adapted=True):
    present = _present(examination)
    answers = examination.raws(dict.fromkeys(word for _, word, _ in present), adapted=adapted)
    return [answers[record.image_id, word] for record, word, _ in present]


def _mean(answers, name):
    return float(np.mean([getattr(one, name) for one in answers])) if answers else float("nan")


@gate(BEHAVIOUR_GATES, "words in the picture", f"a mean best score of {LEAST_PRESENT:g} or more")
def run_beside_base(examination):
    """Compare the two factors of the score of present words with those of the base."""
    texts, means = [], {}
    for name in ("base", "run"):
        answers = _of_present(examination, adapted=name == "run")
        factors = ("max_score", "presence_prob", "max_query_prob")
        score, *means[name] = (_mean(answers, factor) for factor in factors)
        presence, query = means[name]
        low = "presence" if presence < query else "query"
        texts.append(
            f"{name}: best score {score:.3f}, presence {presence:.3f}, best query {query:.3f} "
            f"(the lower factor is the {low})"
        )
    text = f"means over words in the picture: {'; '.join(texts[::-1])}"
    if score >= LEAST_PRESENT:
        return text, []
    adapted = {component_of(name) for name, _ in lora_layers(examination.loaded.model)}
    if adapted and WORD_PARTS.isdisjoint(adapted) and is_locked(*means["base"]):
        listed = ", ".join(sorted(adapted))
        text += f"; the base refuses them, and LoRA is in {listed} only, where no word is learned"
        return text, [Evidence("word_locked_in_base", 0.85, text)]
    raise InputError(f"{text}: it finds next to nothing, for a reason that no gate may see")


@gate(BEHAVIOUR_GATES, "presence at its clamp", f"at most {MAX_AT_CLAMP:.0%} of the words")
def presence_at_clamp(examination):
    """Count the present words whose presence logit has no gradient upwards any more."""
    words = [*OUT_OF_DOMAIN, *_absent_words(examination)]
    present, absent = [], []
    for adapted in (True, False):
        present.append(_share_at_clamp(_of_present(examination, adapted=adapted)))
        absent.append(_share_at_clamp(examination.raws(words, adapted=adapted).values()))
    (share, base_share), (others, base_others) = present, absent
    text = (
        f"presence stands at {-PRESENCE_LOGIT_CLAMP:g} for {share:.0%} of the words in the picture "
        f"(base {base_share:.0%}) and {others:.0%} of absent words (base {base_others:.0%})"
    )
    # A word that the base does not know stands there before training; so absent words count too.
    is_fault = share > MAX_AT_CLAMP and others > max(MAX_AT_CLAMP, base_others)
    return text, evidence_if(is_fault, "at_clamp", 1.0, text)


def _share_at_clamp(answers):
    logits = np.array([answer.presence_logit for answer in answers])
    return (logits <= -AT_CLAMP * PRESENCE_LOGIT_CLAMP).mean()


@gate(BEHAVIOUR_GATES, "absent words", f"score below {MAX_ABSENT_SHARE:.0%} of present ones")
def words_told_apart(examination):
    """Compare the best scores of present, absent and foreign words."""
    words = _absent_words(examination)
    answers = examination.raws(words)
    absent = [
        answers[record.image_id, word]
        for record in examination.few
        for word in absent_candidates(record, words)
    ]
    foreign = _mean(list(examination.raws(OUT_OF_DOMAIN).values()), "max_score")
    present, score = _mean(_of_present(examination), "max_score"), _mean(absent, "max_score")
    presence = _mean(absent, "presence_prob")
    text = (
        f"mean best score of present words {present:.3f}, of absent words {score:.3f} (presence "
        f"{presence:.3f}), of foreign words {foreign:.3f}"
    )
    if present < LEAST_PRESENT or not absent:
        return text, []
    is_fault = max(score, foreign) > MAX_ABSENT_SHARE * present or presence > MAX_PRESENCE_ABSENT
    return text, evidence_if(is_fault, "only_positive_prompts", 0.7, text, is_direct=False)


def _absent_words(examination):
    config = examination.config
    words = dict.fromkeys((*config.evaluation.absent_prompts, *config.data.negative_prompts))
    own = {word for _, word, _ in _present(examination)}
    return [word for word in words if word not in own][:NUM_ABSENT]


@gate(BEHAVIOUR_GATES, "boxes and scores", "where a box is right, a score is high")
def boxes_and_scores(examination):
    """Look for objects whose box is right while no score of the word is high."""
    present, shares = _present(examination), []
    for adapted in (True, False):
        ious, scores = [], []
        answers = _of_present(examination, adapted=adapted)
        for (_, _, objects), raw in zip(present, answers, strict=True):
            boxes_xyxy = torch.tensor([item.box_xyxy for item in objects], dtype=torch.float32)
            ious += box_iou(torch.from_numpy(raw.boxes_xyxy), boxes_xyxy).max(0).values.tolist()
            scores += [raw.max_score] * len(objects)
        located = np.array(ious) > GOOD_IOU
        undersold = located & (np.array(scores) < LOW_SCORE)
        shares.append((located.mean(), undersold.sum() / max(located.sum(), 1)))
    (located, undersold), (base_located, _) = shares
    text = (
        f"{located:.0%} of the objects have a box with an IoU above {GOOD_IOU:g} (base "
        f"{base_located:.0%}); of these, {undersold:.0%} have no score above {LOW_SCORE:g}"
    )
    is_fault = located > base_located + MORE_LOCATED and undersold > MAX_UNDERSOLD
    return text, evidence_if(is_fault, "low_confidence", 0.8, text, is_direct=False)


@gate(BEHAVIOUR_GATES, "own picture", "the word asked of it answers")
def own_picture(examination):
    """Say what run and base answer about the user's own picture, and which word would do."""
    if examination.image is None:
        raise Inapplicable("no picture was given")
    trained = stated(lambda: examination.trained_words) or ()
    words = list(dict.fromkeys((*examination.words, *trained)))
    run, base = examination.predictor(adapted=True), examination.predictor(adapted=False)
    answers = (predictor.raw(examination.image, words) for predictor in (run, base))
    texts, means = [], {}
    for now, before in zip(*answers, strict=True):
        means[now.prompt] = now.max_score
        texts.append(
            f"{now.prompt!r} scores {now.max_score:.3f}, presence {now.presence_prob:.3f} times "
            f"query {now.max_query_prob:.3f}; base {before.max_score:.3f}"
        )
    text = f"{examination.image.name}: {'; '.join(texts)}"
    is_silent = any(means[word] < HIDDEN for word in untrained_prompts(examination.words, trained))
    is_fault = is_silent and max((means[word] for word in trained), default=0) > FOUND
    return text, evidence_if(is_fault, "other_training_prompt", 0.8, text, is_direct=False)


@gate(
    BEHAVIOUR_GATES,
    "objects without annotation",
    "the trained model sees nothing in images without annotation",
)
def unannotated_objects(examination):
    """Ask the trained model about images without annotation."""
    annotated = [record for record in examination.sample if record.objects]
    empty = examination.unannotated
    if min(len(annotated), len(empty)) < MIN_IMAGES:
        reason = f"{len(annotated)} images with and {len(empty)} without objects are too few"
        raise Inapplicable(f"{reason} to compare", where=examination.data_dir)
    present = {item.category for record in annotated for item in record.objects}
    control = list(examination.config.evaluation.absent_prompts)
    raws = examination.raws([*present, *control], records=[*annotated, *empty])
    texts, evidence = [], []
    for prompt in sorted(present):
        scores = [
            raws[record.image_id, prompt].max_score
            for record in annotated
            if any(item.category == prompt for item in record.objects)
        ]
        empty_scores = [raws[record.image_id, prompt].max_score for record in empty]
        least = MISSED_BY * float(np.median(scores))
        missed = [
            score >= least
            and all(raws[record.image_id, noun].max_score < least for noun in control)
            for record, score in zip(empty, empty_scores, strict=True)
        ]
        apart = float(np.mean(np.greater.outer(scores, empty_scores)))
        text = (
            f"'{prompt}' scores {np.median(scores):.2f} (median) where it is annotated, at least "
            f"half of that on {sum(missed)} of {len(empty)} images without annotation; an annotated "
            f"image scores higher in {apart:.0%} of all pairs"
        )
        texts.append(text)
        is_seen = max(scores) >= MIN_SEEN and np.mean(missed) >= MISSED_SHARE
        confidence = min(0.95, 0.85 + MIN_APART - apart)
        is_fault = is_seen and apart < MIN_APART
        evidence += evidence_if(is_fault, "labels_missing", confidence, text, is_direct=False)
    return "; ".join(texts), evidence


@gate(BEHAVIOUR_GATES, "size of the update", f"below {MAX_UPDATE:g} of the weights")
def size_of_update(examination):
    """Compare the norm of each update with that of the weights it is added to."""
    medians = _update_medians(examination)
    listed = ", ".join(f"{name} {value:.2f}" for name, value in medians.items())
    text = f"median norm of update over weights: {listed}"
    if not any(map(any, _update_ratios(examination).values())):
        reason = f"nothing was changed: {text}"
        is_saved = not examination.is_live
        return text, [Evidence("adapter_at_zero", 1.0, reason, is_direct=is_saved)]
    large = {name for name, value in medians.items() if value > MAX_UPDATE}
    # Where the text encoder alone is outgrown, its words have the say: see `words_apart`.
    return text, evidence_if(large - {"text_encoder"}, "overtrained", 0.95, text)


def _update_medians(examination):
    """Return the median over the modules of each component: dict of str to float."""
    ratios = _update_ratios(examination)
    return {name: float(np.median(values)) for name, values in ratios.items()}


@torch.no_grad()
def _update_ratios(examination):
    """Return norm of the update over norm of the weights: dict of component to list of float."""
    ratios = {}
    for name, layer in lora_layers(examination.loaded.model):
        weights = layer.get_base_layer().weight.float().norm()
        for adapter in layer.lora_A:
            update = layer.get_delta_weight(adapter).float().norm()
            ratios.setdefault(component_of(name), []).append(float(update / weights))
    if not ratios:  # a full model
        before = dict(examination.base[0].named_parameters())
        for name, after in examination.loaded.model.named_parameters():
            if after.dim() > 1 and name in before and before[name].shape == after.shape:
                weights = before[name].float().to(after.device)
                ratio = float((after.float() - weights).norm() / weights.norm().clamp(min=1e-9))
                ratios.setdefault(component_of(name), []).append(ratio)
    return ratios


@gate(BEHAVIOUR_GATES, "words of the text encoder", "trained words stay apart from others")
def words_apart(examination):
    """Compare the embeddings of trained words with those of others, before and after training."""
    own = examination.trained_words
    others = [word for word in examination.config.data.negative_prompts if word not in own]
    if not others:
        raise Inapplicable("there are no other words to compare", where="data.negative_prompts")
    run = examination.loaded
    before, after = (
        _mean_cosine(model, processor, own, others)
        for model, processor in (examination.base, (run.model, run.processor))
    )
    update = _update_medians(examination).get("text_encoder", 0.0)
    text = (
        f"mean cosine between {', '.join(own)} and {len(others)} other words: {after:.3f}, in the "
        f"base {before:.3f}; the update of the text encoder is {update:.2f} of its weights"
    )
    is_fault = after > before + (0 if update > MAX_UPDATE else COSINE_RISE)
    return text, evidence_if(is_fault, "text_distorted", 0.95, text)


def _mean_cosine(model, processor, own, others):
    embeddings = prompt_embeddings(model, processor, [*own, *others])
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    return float((embeddings[: len(own)] @ embeddings[len(own) :].T).mean())
