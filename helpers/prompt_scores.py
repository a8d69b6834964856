"""How high each prompt scores on the images that show it and on those that do not."""

from __future__ import annotations

import pandas as pd

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
