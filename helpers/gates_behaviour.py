"""Gates on what the trained model answers, always beside what its base answers.

Each looks at the best query of a prompt, not at the mean over the queries: most queries of a healthy
detector are near the bottom. A behaviour may have several reasons, so its evidence is indirect.
"""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import box_iou

from helpers import prediction
from helpers.errors import InputError
from helpers.evidence import Evidence, Gate
from helpers.gates_learning import LEARNING_GATES
from helpers.prompted_sam3 import PRESENCE_LOGIT_CLAMP
from helpers.prompts import absent_candidates, present_prompts

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
        return "no picture was given", []
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
