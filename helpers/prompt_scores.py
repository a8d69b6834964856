"""Answers beside annotations: how high each prompt scores, and predictions as queries."""

from __future__ import annotations

import pandas as pd

from helpers.errors import InputError
from helpers.evaluation_queries import check_probability, check_queries


def prompt_scores(queries, score_threshold):
    """Summarise the highest score of every query, by prompt and by whether it is present.

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`, with ``presence_prob``, ``max_query_prob`` and
        ``max_score``, as `helpers.prediction_queries.predict_split` returns them.
    score_threshold : float
        In [0, 1].

    Returns
    -------
    pandas.DataFrame
        Index ``prompt`` and ``shown`` ("present" or "absent"), present ones first. Columns
        ``images``; the means ``presence``, ``max query`` and ``max score``, all in [0, 1]; and
        ``reached``, the share of the images whose highest score is at least the threshold.

    Raises
    ------
    InputError
        For a threshold that is no probability or queries that are none.
    """
    check_queries(queries)
    check_probability(score_threshold, "score_threshold")
    table = pd.DataFrame(
        {
            "prompt": query["prompt"],
            "shown": "present" if query["gt"] else "absent",
            "presence": query["presence_prob"],
            "max query": query["max_query_prob"],
            "max score": query["max_score"],
            "reached": float(query["max_score"] >= score_threshold),
        }
        for query in queries
    )
    groups = table.groupby(["prompt", "shown"])
    summary = groups.mean()
    summary.insert(0, "images", groups.size())
    return summary.sort_index(level=["shown", "prompt"], ascending=[False, True])


def as_queries(predictions, records):
    """Set predictions beside the annotated masks of their images.

    Every annotated object counts as what the prompt asked for, whatever its category: the question
    is how much of what was marked is an object at all.

    Parameters
    ----------
    predictions : sequence of helpers.prediction.Prediction
        Made on the files of `records`.
    records : sequence of helpers.records.ImageRecord

    Returns
    -------
    list of dict
        See `helpers.evaluation_queries`.

    Raises
    ------
    InputError
        For a prediction on an image that no record names.
    """
    by_path = {str(record.path): record for record in records}
    queries = []
    for one in predictions:
        if one.image not in by_path:
            raise InputError("no record of this image", where=one.image, fix="pass its split")
        record = by_path[one.image]
        queries.append(
            {
                "image_id": record.image_id,
                "prompt": one.prompt,
                "height": one.height,
                "width": one.width,
                "gt": [dict(item.rle) for item in record.objects if item.rle is not None],
                "pred": [
                    {"rle": found["mask_rle"], "score": found["score"]} for found in one.detections
                ],
                "presence_prob": one.presence_prob,
                "max_query_prob": one.max_query_prob,
                "max_score": one.max_score,
            }
        )
    return queries
