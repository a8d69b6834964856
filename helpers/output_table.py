"""The raw outputs of a model on many images as one table, before any threshold."""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers.prediction import Predictor

_COLUMNS = [
    "image_id",
    "prompt",
    "logit_min",
    "logit_median",
    "logit_max",
    "presence_prob",
    "max_query_prob",
    "max_score",
    "semantic_mean",
    "semantic_max",
]


def raw_outputs(model, processor, records, prompts):
    """Ask a model the same prompts on many images.

    Parameters
    ----------
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
    processor : transformers.Sam3Processor
    records : sequence of helpers.records.ImageRecord
        I images.
    prompts : sequence of str or dict of str to sequence of str
        The prompts of every image, or a dict from ``image_id`` to the prompts of that image.

    Returns
    -------
    list of helpers.detections.RawPrediction
        One per image and prompt; ``image`` is the ``image_id``. An image without prompts has none.
    """
    predictor = Predictor(model, processor)
    raws = []
    for record in records:
        asked = prompts[record.image_id] if isinstance(prompts, dict) else prompts
        if asked:
            raws += predictor.raw(record.path, list(asked), name=record.image_id)
    return raws


def output_table(raws):
    """Describe raw outputs by the numbers that a zero detection is diagnosed with.

    Parameters
    ----------
    raws : sequence of helpers.detections.RawPrediction
        May be empty.

    Returns
    -------
    pandas.DataFrame
        One row per prediction: ``image_id``, ``prompt``, ``logit_min``, ``logit_median``,
        ``logit_max`` (over the queries), ``presence_prob``, ``max_query_prob``, ``max_score``,
        ``semantic_mean`` and ``semantic_max`` (probabilities over the pixels of the semantic map).
    """
    rows = []
    for raw in raws:
        semantic_prob = 1 / (1 + np.exp(-raw.semantic_logits.astype(np.float64)))
        rows.append(
            {
                "image_id": raw.image,
                "prompt": raw.prompt,
                "logit_min": float(raw.query_logits.min()),
                "logit_median": float(np.median(raw.query_logits)),
                "logit_max": float(raw.query_logits.max()),
                "presence_prob": raw.presence_prob,
                "max_query_prob": raw.max_query_prob,
                "max_score": raw.max_score,
                "semantic_mean": float(semantic_prob.mean()),
                "semantic_max": float(semantic_prob.max()),
            }
        )
    return pd.DataFrame(rows, columns=_COLUMNS)
