"""What a run detects, in a few numbers, and whether they came back after a cure.

The numbers are measured through the pipeline as it stands in this process, so that a fault in the
code shows in them too. The truth they are compared with is read before any fault is planted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import pandas as pd

from helpers import evaluation, prediction, prediction_queries, prompt_scores, prompts, run_folder
from helpers.errors import InputError

SCORE_THRESHOLD = 0.3
LEAST_IOU = 0.5
MARGIN = 0.1
"""Share of the images or prompts that may be judged otherwise than by the healthy run."""
LEAST_AP50_SHARE = 0.75
"""Part of the healthy run's AP50 that a cured one has to reach."""


@dataclass(frozen=True)
class VitalSigns:
    """What is detected on the validation split.

    Attributes
    ----------
    found : float
        Share of the images with an object of a category on which that category is detected.
    outlined : float
        Share of those images whose detections have an IoU of at least 0.5 with the objects.
    false_alarms : float
        Share of the absent prompts, one per image that does not show it, that are detected.
    AP50 : float
        What the evaluation says; 0 where it has no meaning.
    presence, best_query : float
        The two factors of the score, as means over the images that show the category: presence
        probability, and probability of the best query. They explain, and are not judged.
    remark : str
        What was raised instead of an answer; empty if nothing was.
    """

    found: float = 0.0
    outlined: float = 0.0
    false_alarms: float = 0.0
    AP50: float = 0.0
    presence: float = 0.0
    best_query: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class CureReport:
    """Signs of the healthy run, of the patient on admission, and of the patient now."""

    healthy: VitalSigns
    admission: VitalSigns
    now: VitalSigns

    @property
    def cured(self):
        """bool: True if the patient detects what the healthy run detects, within the margins."""
        return not deviations(self.now, self.healthy)

    @property
    def table(self):
        """`pandas.DataFrame`: one row per measurement, one column per sign."""
        return signs_table(
            {"healthy run": self.healthy, "on admission": self.admission, "now": self.now}
        )

    @property
    def sentence(self):
        """str: whether detections came back, with the numbers that say so."""
        if worse := deviations(self.now, self.healthy):
            return f"Still ill: {'; '.join(worse.values())}."
        changes = [
            f"{name} {getattr(self.admission, name):.2f} to {getattr(self.now, name):.2f}"
            for name in deviations(self.admission, self.healthy)
            if name != "remark"
        ]
        return f"Cured: every sign is healthy again ({', '.join(changes) or 'it can be measured'})."


def signs_table(signs):
    """Set signs below one another.

    Parameters
    ----------
    signs : dict of str to VitalSigns

    Returns
    -------
    pandas.DataFrame
        One row per name, one column per sign.
    """
    table = pd.DataFrame([asdict(one) for one in signs.values()], index=list(signs))
    return table.drop(columns="remark")


def deviations(signs, healthy):
    """Say where the signs of a run are worse than those of a healthy one.

    Parameters
    ----------
    signs, healthy : VitalSigns

    Returns
    -------
    dict of str to str
        Sign to what is wrong with it; empty if the run is as good as the healthy one, within
        `MARGIN` and `LEAST_AP50_SHARE`.
    """
    limits = {
        "found": healthy.found - MARGIN,
        "outlined": healthy.outlined - MARGIN,
        "AP50": healthy.AP50 * LEAST_AP50_SHARE,
    }
    worse = {
        name: f"{name} is {getattr(signs, name):.2f}, at least {limit:.2f} is healthy"
        for name, limit in limits.items()
        if getattr(signs, name) < limit
    }
    most = healthy.false_alarms + MARGIN
    if signs.false_alarms > most:
        worse["false_alarms"] = (
            f"false_alarms is {signs.false_alarms:.2f}, at most {most:.2f} is healthy"
        )
    return worse | ({"remark": signs.remark} if signs.remark else {})


def prepare_questions(truth, absent_prompts):
    """Decide what to ask every image, before a fault can have a say in it.

    Parameters
    ----------
    truth : helpers.records.Split
        Right annotations.
    absent_prompts : sequence of str
        Nouns to ask where the image shows nothing of the kind, besides the names of the categories.

    Returns
    -------
    list of (helpers.records.ImageRecord, list of str, list of str)
        Image, present prompts, absent prompts.

    Raises
    ------
    InputError
        If no image shows an object: then there is nothing to detect.
    """
    if not truth.num_objects:
        raise InputError("no image shows an object", where=truth.root, fix="use another split")
    nouns = list(dict.fromkeys([*truth.categories, *absent_prompts]))
    return [
        (
            record,
            list(prompts.present_prompts(record, truth.categories)),
            prompts.absent_candidates(record, nouns),
        )
        for record in truth.records
    ]


def take_signs(folder, truth, questions):
    """Measure what a run detects.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.
    truth : helpers.records.Split
        Right annotations of the images, for the evaluation.
    questions : list
        From `prepare_questions`, for the detections.

    Returns
    -------
    VitalSigns
        With a remark, and zeros where nothing could be measured, if the pipeline raises.
    """
    signs = {}
    try:
        run = run_folder.load_run(folder)
        signs = _detected(prediction.Predictor(run.model, run.processor), questions)
        queries = prediction_queries.predict_split(
            run.model, run.processor, truth, absent_prompts=run.config.evaluation.absent_prompts
        )
        metrics = evaluation.evaluate_queries(queries, SCORE_THRESHOLD)
    except Exception as error:  # a fault may stop the pipeline anywhere: that is a sign too
        return VitalSigns(**signs, remark=f"raised {type(error).__name__}")
    return VitalSigns(**signs, AP50=metrics["AP50"] or 0.0)


def _detected(predictor, questions):
    """Ask every image, as a user would."""
    found, outlined, false_alarms, factors = [], [], [], []
    for record, present, absent in questions:
        for answer in predictor.predict(record.path, [*present, *absent], SCORE_THRESHOLD):
            if answer.prompt in absent:
                false_alarms.append(bool(answer.detections))
                continue
            found.append(bool(answer.detections))
            factors.append((answer.presence_prob, answer.max_query_prob))
            wanted = [item for item in record.objects if item.category == answer.prompt]
            query = prompt_scores.as_queries([answer], [replace(record, objects=tuple(wanted))])
            outlined.append((evaluation.union_iou(query, 0) or 0) >= LEAST_IOU)
    return {
        "found": sum(found) / len(found),
        "outlined": sum(outlined) / len(outlined),
        "false_alarms": sum(false_alarms) / max(len(false_alarms), 1),
        "presence": sum(presence for presence, _ in factors) / len(factors),
        "best_query": sum(best for _, best in factors) / len(factors),
    }
