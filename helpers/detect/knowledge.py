"""How well a model knows a word, before any training; and what is kept of it afterwards."""

import sys

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes seconds, when it is first used

from helpers.data.records import ObjectAnnotation, nouns_overlap, true_objects, true_rle
from helpers.detect.detections import detect, output_table
from helpers.detect.metrics import coco_ap, mask_ious
from helpers.detect.predictor import check_prompts, raw_outputs
from helpers.detect.queries import SCORE_FLOOR, query_of
from helpers.errors import InputError
from helpers.files import progress_bar

LOCKED_PRESENCE, LOCKED_QUERY = 1e-3, 0.1
"""A word is locked below both. Means of presence and best query on the bases of graded knowledge
(`data/tiny_sam3_half_known`): 0.00005 and at most 0.09 where a word was never met, at least 0.02
and 0.45 where any knowledge of "crack" had opened the vocabulary."""
KNOWN_SHARE = 0.85
CLEAR_YES, CLEAR_NO = 0.5, 0.1
"""An answer is a clear yes from the one score on, and a clear no below the other."""
DUPLICATE_IOU = 0.5
ON_ANNOTATION = 0.3  # share of the area from which an answer means what is annotated there


def word_knowledge(model, processor, split, words=None, *, threshold=0.3):
    """Ask a model for words on the images that show them; one that none shows is an InputError.

    A word that is no category of the split is asked wherever there are objects. An image counts as
    detected from a score of ``threshold`` in [0, 1] on. Returns a pandas.DataFrame by ``word``:
    ``images``, ``presence_prob`` and ``max_query_prob`` (means), ``detected`` (share of the images)
    with its 95 % interval (Wilson) ``low`` and ``high``, and ``knowledge``: "known", "half known",
    "open" (neither detected nor locked) or "locked".
    """
    words = check_prompts(list(split.categories) if words is None else words)
    prompts, foreign = {}, set(words).difference(split.categories)
    for record in split.records:
        nouns = {item.category for item in true_objects(record)}
        asked = nouns | foreign if nouns else nouns
        prompts[record.image_id] = [word for word in words if word in asked]
    answers = output_table(raw_outputs(model, processor, split.records, prompts))
    rows = {}
    for word in words:
        answered = answers[answers["prompt"] == word]
        if answered.empty:
            message = f"no image shows {word!r}"
            fix = "name a split with objects of this word"
            raise InputError(message, where=f"{split.root}, {split.name}", fix=fix)
        count, hits = len(answered), int((answered["max_score"] >= threshold).sum())
        interval = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
        means = answered[["presence_prob", "max_query_prob"]].mean()
        locked = means["presence_prob"] < LOCKED_PRESENCE and means["max_query_prob"] < LOCKED_QUERY
        known = "known" if hits / count >= KNOWN_SHARE else "half known" if hits else "open"
        rows[word] = {"images": count, **means, "detected": hits / count, **interval._asdict()}
        rows[word]["knowledge"] = "locked" if locked else known
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("word")


def clear_answers(model, processor, records, words):
    """Take what a model is sure of as annotation: its detections that are clear and no duplicates.

    Returns ``image_id`` to a dict of each clearly detected word to a tuple of `ObjectAnnotation`, and
    the frozenset of all words that may be in the picture. A detection that lies on an object with
    another name in the annotations makes no answer.
    """
    answers, words = {}, check_prompts(list(words))
    with progress_bar(len(records), "asking the base", disable=not sys.stderr.isatty()) as bar:
        for record in records:
            detected, possible = {}, set()
            for raw in raw_outputs(model, processor, [record], words):
                objects = _objects_of(detect(raw, CLEAR_YES), raw.prompt, record)
                if raw.max_score >= CLEAR_NO:
                    possible.add(raw.prompt)
                if objects:
                    detected[raw.prompt] = objects
            answers[record.image_id] = detected, frozenset(possible)
            bar.update()
    return answers


def _objects_of(detections, word, record):
    """Turn detections, best first, into objects, without duplicates and what is annotated."""
    others = [item for item in true_objects(record) if not nouns_overlap(item.category, word)]
    annotated = [true_rle(record, item) for item in others]
    objects, rles = [], []
    for detection in detections:
        rle = detection["mask_rle"]
        # the IoU with a crowd is the share of the own area
        on_annotation = mask_ious([rle], annotated, is_crowd=True).max(initial=0)
        overlap = mask_ious([rle], rles).max(initial=0)
        if on_annotation < ON_ANNOTATION and overlap < DUPLICATE_IOU:
            objects.append(ObjectAnnotation(word, tuple(detection["box_xyxy"]), rle))
            rles.append(rle)
    return tuple(objects)


def retention(model, processor, split, words):
    """Compare what an adapted model answers with the clear answers of its base, on any images.

    Parameters
    ----------
    model : peft.PeftModel
        Its base is the model with the adapter switched off.
    processor : transformers.Sam3Processor
    split : helpers.data.Split
        Images, annotated or not. What lies on an object annotated as something else does not count.
    words : sequence of str
        That the base knows.

    Returns
    -------
    dict
        ``words``; ``objects``, those of the base; ``AP`` and ``AP50`` in [0, 1], average precision of
        the masks with the base's as truth, 1 if nothing has changed, None if the base detects
        nothing; ``by_word``, the AP of each word that the base detects; ``false_positive_rate``, the share of the questions with a clear no of the base to
        which the adapted model says yes.

    Raises
    ------
    InputError
        If there is no adapter.
    """
    if not hasattr(model, "disable_adapter"):
        raise InputError("a base has no adapter to compare it with", fix="name a run")
    with model.disable_adapter():
        answers = clear_answers(model, processor, split.records, words)
    by_image = {record.image_id: record for record in split.records}
    queries, false_yes = [], []
    for raw in raw_outputs(model, processor, split.records, list(words)):
        detected, possible = answers[raw.image]
        if raw.prompt in detected:
            record = by_image[raw.image]
            queries.append(query_of(raw, detect(raw, SCORE_FLOOR), record, detected[raw.prompt]))
        elif raw.prompt not in possible:
            false_yes.append(raw.max_score >= CLEAR_YES)
    precision = coco_ap(queries) if queries else {"AP": None, "AP50": None}
    by_word = {word: [query for query in queries if query.prompt == word] for word in words}
    return {
        "words": list(words),
        "objects": sum(len(query.gt) for query in queries),
        "AP": precision["AP"],
        "AP50": precision["AP50"],
        "by_word": {word: coco_ap(own)["AP"] for word, own in by_word.items() if own},
        "false_positive_rate": float(np.mean(false_yes)) if false_yes else None,
    }
