"""A score threshold for each word, chosen on pictures, and how far it can be trusted."""

import numpy as np
import pandas as pd

from helpers.detect.metrics import detection_counts
from helpers.errors import InputError, check_probability, explain
from helpers.files import read_json

THRESHOLDS_FILE = "thresholds.json"  # of a run, from `calibrate`
GOALS = ("f1", "precision", "recall")
MAX_CUTS = 1000  # thresholds that are tried
TAILS = [0.025, 0.975]  # of every interval


def choose_thresholds(queries, goal="f1", least=0.9, *, num_resamples=1000, seed=0):
    """Choose a score threshold for each word, on pictures that are not the test split.

    Parameters
    ----------
    queries : sequence of Query
        Of the validation split, with absent prompts; a word that no picture shows is left out.
    goal : str
        "f1": the highest F1. "precision" or "recall": of the thresholds that reach `least`, the one
        with the most of the other.
    least : float
        In [0, 1].
    num_resamples, seed : int
        Of the bootstrap over pictures.

    Returns
    -------
    pandas.DataFrame
        Index ``word``: ``threshold``, its 95 % bootstrap interval ``low`` and ``high``,
        ``precision``, ``recall``, ``f1``, ``f1_low`` and ``f1_high`` at it, ``images``, ``objects``.
        InputError if a word reaches the goal at no threshold.
    """
    check_probability(least, "least")
    if goal not in GOALS:
        raise InputError(f"there is no goal {goal!r}", fix=f"one of {', '.join(GOALS)}")
    rows, rng = {}, np.random.default_rng(seed)
    for word in dict.fromkeys(query.prompt for query in queries if query.is_positive):
        own = [query for query in queries if query.prompt == word]
        scores = np.unique(np.concatenate([[1.0], *(query.scores for query in own)]))
        places = np.linspace(0, len(scores) - 1, min(len(scores), MAX_CUTS)).astype(int)
        cuts = scores[places]
        count, hits, num_gt = detection_counts(
            own, cuts
        )  # (queries, cuts), (queries, cuts), (queries,)
        ones = np.ones((1, len(own)))
        weights = rng.multinomial(len(own), ones[0] / len(own), num_resamples)
        curves = _curves(np.vstack([ones, weights]), count, hits, num_gt)
        chosen = _best(curves, goal, least)
        if chosen[0] < 0:
            text = "no detection is right" if goal == "f1" else f"no threshold has {goal} {least:g}"
            raise InputError(text, where=repr(word), fix="train longer, or lower the goal")
        place = chosen[0]
        low, high = _interval(cuts[chosen[1:][chosen[1:] >= 0]])
        f1_low, f1_high = _interval(curves["f1"][1:, place])
        rows[word] = {"threshold": cuts[place], "low": low, "high": high}
        rows[word] |= {name: curve[0, place] for name, curve in curves.items()}
        rows[word] |= {"f1_low": f1_low, "f1_high": f1_high}
        rows[word] |= {"images": len(own), "objects": int(num_gt.sum())}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("word")


def _curves(weights, count, hits, num_gt):
    """Compute precision, recall and F1, (resamples, cuts) each, for weights (resamples, queries)."""
    count, hits, num_gt = weights @ count, weights @ hits, (weights @ num_gt)[:, None]
    with np.errstate(invalid="ignore"):
        return {
            "precision": np.nan_to_num(hits / count),
            "recall": np.nan_to_num(hits / num_gt),
            "f1": np.nan_to_num(2 * hits / (count + num_gt)),
        }


def _best(curves, goal, least):
    """Return the place of the best cut in each resample, -1 where no cut reaches the goal."""
    value = curves[{"f1": "f1", "precision": "recall", "recall": "precision"}[goal]]
    reached = curves[goal] >= least if goal != "f1" else value > 0
    return np.where(reached.any(1), np.where(reached, value, -1).argmax(1), -1)


def _interval(values):
    return np.quantile(values, TAILS).tolist()


def read_thresholds(folder, is_needed=True):
    """Return word to ``threshold``, ``low``, ``high`` of a run; {} if it has, and needs, none."""
    path = folder / THRESHOLDS_FILE
    fix = f"choose them with 'python -m helpers calibrate --adapter {folder}'"
    if not path.is_file():
        if not is_needed:
            return {}
        raise InputError("no thresholds were chosen for this run", where=path, fix=fix)
    content = read_json(path, fix=fix)
    with explain((KeyError, TypeError, AttributeError), "is no calibration", where=path, fix=fix):
        names = ("threshold", "low", "high")
        chosen = {word: {one: row[one] for one in names} for word, row in content["words"].items()}
    for word, row in chosen.items():
        for name, value in row.items():
            check_probability(value, f"{name} of {word!r}", path)
    return chosen
