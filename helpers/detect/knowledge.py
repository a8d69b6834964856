"""How well a model knows a word, measured before any training."""

from __future__ import annotations

import pandas as pd
import scipy  # loads scipy.stats, which takes seconds, when it is first used

from helpers.data.records import true_objects
from helpers.detect.predictor import check_prompts, raw_outputs
from helpers.errors import InputError

LOCKED_PRESENCE, LOCKED_QUERY = 1e-3, 0.1
"""A word is locked below both. Means of presence and best query on the bases of graded knowledge
(`data/tiny_sam3_half_known`): 0.00005 and at most 0.09 where a word was never met, at least 0.02
and 0.45 where any knowledge of "crack" had opened the vocabulary."""
KNOWN_SHARE = 0.85
ADVICE = {
    "known": "known: detected without training; if your run detects nothing, it destroyed this",
    "half known": "half known: a run that reads its objects learns it, text encoder frozen or not",
    "open": "open: detected nowhere, but not locked; what a run needs then was not measured",
    "locked": "locked: it takes objects, the same word in training, and LoRA on the text encoder "
    "or the DETR encoder, all at once",
}


def word_knowledge(model, processor, split, words=None, *, threshold=0.3):
    """Ask a model for words on the images that show them.

    Parameters
    ----------
    model, processor
        From `helpers.model.load_base`, or with an adapter.
    split : helpers.data.Split
        Images with objects. A word that is none of its categories is asked wherever there are any.
    words : sequence of str, optional
        By default the categories.
    threshold : float
        Score in [0, 1] from which an image counts as detected.

    Returns
    -------
    pandas.DataFrame
        Index ``word``; ``images``, ``presence_prob`` and ``max_query_prob`` (means), ``detected``
        (share of the images) with its 95 % interval (Wilson) ``low`` and ``high``, and
        ``knowledge``: "known", "half known", "open" (neither detected nor locked) or "locked".

    Raises
    ------
    InputError
        When no image shows an object.
    """
    words = check_prompts(list(split.categories) if words is None else words)
    shown = {
        record.image_id: {item.category for item in true_objects(record)}
        for record in split.records
    }
    prompts = {
        name: [word for word in words if word in nouns or (nouns and word not in split.categories)]
        for name, nouns in shown.items()
    }
    answers = pd.DataFrame(
        [
            {"word": raw.prompt, "score": raw.max_score}
            | {name: getattr(raw, name) for name in ("presence_prob", "max_query_prob")}
            for raw in raw_outputs(model, processor, split.records, prompts)
        ],
        columns=["word", "score", "presence_prob", "max_query_prob"],
    )
    rows = {}
    for word in words:
        answered = answers[answers["word"] == word]
        if answered.empty:
            raise InputError(
                f"no image shows {word!r}",
                where=f"{split.root}, {split.name}",
                fix="name a split with objects of this word",
            )
        count, hits = len(answered), int((answered["score"] >= threshold).sum())
        interval = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
        means = answered[["presence_prob", "max_query_prob"]].mean()
        locked = means["presence_prob"] < LOCKED_PRESENCE and means["max_query_prob"] < LOCKED_QUERY
        known = "known" if hits / count >= KNOWN_SHARE else "half known" if hits else "open"
        rows[word] = {"images": count, **means, "detected": hits / count}
        rows[word] |= {"low": interval.low, "high": interval.high}
        rows[word]["knowledge"] = "locked" if locked else known
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("word")
