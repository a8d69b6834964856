"""The clinic: runs that are broken in a way you do not know, to be diagnosed and fixed.

A case, drawn by its number, is a fault of `helpers.lab.faults` in the script of `helpers.lab.careless`.
"""

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean
from types import SimpleNamespace

import numpy as np
import pandas as pd

from helpers.causes import CAUSES
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.images import open_upright
from helpers.data.masks import mask_to_rle
from helpers.data.records import absent_candidates, present_prompts
from helpers.detect.metrics import evaluate_queries, union_iou
from helpers.detect.queries import SCORE_FLOOR, query_of
from helpers.diagnose.diagnosis import diagnose
from helpers.errors import InputError
from helpers.files import CONFIGS, WALL_CRACKS, read_json, resolve, write_json
from helpers.lab.careless import Careless
from helpers.lab.faults import FAULTS, HEALTHY, RUN_FOLDER, alive, planted
from notebooks.score import ANSWER_READ, CURED, Score

SCORE_THRESHOLD = 0.3
LEAST_IOU = 0.5
MARGIN = 0.1  # share of the images or prompts that may be judged otherwise than by the healthy run
LEAST_AP50_SHARE = 0.75  # part of the healthy run's AP50 that a cured one has to reach
EPOCHS = 2  # of every training: all are compared with one another
ABSENT_WORDS = ("joint", "moss", "dog")
WARDS = {
    "01": ("crowd", "images turned", "orientation ignored", "masks swallowed"),
    "02": ("wrong keys", "empty", "emptied by a transform"),
    "03": ("flag without effect", "names of another model", "lora b frozen"),
    "04": ("presence at its clamp", "score weight zero", "sigmoid twice"),
    "05": ("threshold fixed", "loader without effect", "presence left out"),
}
"""Lesson to the `FAULTS` of its patients: those that show in the signs after a short training."""
WARDS["06"] = tuple(name for ward in WARDS.values() for name in ward)
WARDS["07"] = ("images turned", "crowd", "empty", "trained as object")
HEALTHY_FOLDER, RECIPE_FILE, PATIENT_FOLDER = "healthy", "healthy.json", "patient"
DRAW_SEED = 6  # orders the faults of a ward; fixed, so that a case stays what it is


@dataclass(frozen=True)
class VitalSigns:
    """What is detected on the validation split, as shares of its images or absent prompts."""

    found: float = 0.0  # images with an object on which it is detected
    outlined: float = 0.0  # the same, with an IoU of at least 0.5
    false_alarms: float = 0.0  # absent prompts that are detected
    AP50: float = 0.0  # of the evaluation; 0 where it has no meaning
    presence: float = 0.0  # factor of the score, mean over the images with an object
    best_query: float = 0.0  # the other factor
    remark: str = ""  # what was raised instead of an answer


@dataclass(frozen=True)
class CureReport:
    """Signs of the healthy run, of the patient on admission, and of the patient now."""

    healthy: VitalSigns
    admission: VitalSigns
    now: VitalSigns

    @property
    def cured(self):
        """True if the patient detects what the healthy run detects, within the margins."""
        return not deviations(self.now, self.healthy)

    @property
    def table(self):
        """One row per measurement, one column per sign."""
        signs = {"healthy run": self.healthy, "on admission": self.admission, "now": self.now}
        return signs_table(signs)

    @property
    def sentence(self):
        """Whether detections came back, with the numbers that say so."""
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
        One row per name; the columns are the shares in [0, 1] of `VitalSigns`.
    """
    table = pd.DataFrame([asdict(value) for value in signs.values()], index=list(signs))
    return table.drop(columns="remark")


def deviations(signs, healthy):
    """Map each sign that is worse than the healthy run's, beyond its margin, to what is wrong."""
    least = {"found": healthy.found - MARGIN, "outlined": healthy.outlined - MARGIN}
    least |= {"AP50": healthy.AP50 * LEAST_AP50_SHARE}
    most, worse = healthy.false_alarms + MARGIN, {}
    for name, limit in least.items():
        if getattr(signs, name) < limit:
            worse[name] = f"{name} is {getattr(signs, name):.2f}, at least {limit:.2f} is healthy"
    if signs.false_alarms > most:
        text = f"false_alarms is {signs.false_alarms:.2f}, at most {most:.2f} is healthy"
        worse["false_alarms"] = text
    return worse | ({"remark": signs.remark} if signs.remark else {})


def take_signs(script, truth):
    """Measure what a script detects on a split with right annotations, as it stands."""
    try:
        return signs_of(queries_of(script, truth))
    except Exception as error:  # a fault may stop the pipeline anywhere: that is a sign too
        text = getattr(error, "message", error)  # without the path of an `InputError`
        return VitalSigns(remark=f"raised {type(error).__name__}: {text}")


def queries_of(script, split):
    """Let a script detect what is in every picture of a split, and some absent words.

    Parameters
    ----------
    script : helpers.lab.careless.Careless
    split : helpers.data.Split

    Returns
    -------
    list of Query
        As `helpers.detect.predict_split` returns them, but made by the script's own detection.
    """
    return [query for record in split.records for query in _queries(script, record, split)]


def _queries(script, record, split):
    present = present_prompts(record, split.categories)
    absent = [word for word in split.categories if word not in present]
    absent += absent_candidates(record, ABSENT_WORDS)
    picture, words, queries = open_upright(record.path), [*present, *absent], []
    outputs = script.answer(picture, words)
    presence = outputs.presence_logits[:, 0].sigmoid().tolist()
    best = outputs.pred_logits.sigmoid().amax(1).tolist()
    for row, word in enumerate(words):
        found = [
            {"score": one["score"], "box_xyxy": one["box"], "mask_rle": mask_to_rle(one["mask"])}
            for one in script.select(outputs, row, picture.size, SCORE_FLOOR)
        ]
        factors = {"presence_prob": presence[row], "max_query_prob": best[row]}
        answer = SimpleNamespace(prompt=word, max_score=presence[row] * best[row], **factors)
        queries.append(query_of(answer, found, record, present.get(word, [])))
    return queries


def signs_of(answers):
    """Compute the signs from evaluation queries, see `helpers.detect.queries`."""
    detected = {True: [], False: []}
    for query in answers:
        scores = [item["score"] for item in query.pred]
        detected[query.is_positive].append(max(scores, default=0) >= SCORE_THRESHOLD)
    present = [query for query in answers if query.is_positive]
    ious = [union_iou([query], SCORE_THRESHOLD) or 0 for query in present]
    return VitalSigns(
        found=mean(detected[True]),
        outlined=mean(iou >= LEAST_IOU for iou in ious),
        false_alarms=mean(detected[False]) if detected[False] else 0.0,
        AP50=evaluate_queries(answers, SCORE_THRESHOLD)["AP50"] or 0.0,
        presence=mean(query.presence_prob for query in present),
        best_query=mean(query.max_query_prob for query in present),
    )


class Patient:
    """A script with one fault, its signs on admission, and the treatments tried so far."""

    def __init__(self, clinic, fault, script, signs, name):
        self._clinic, self._fault, self._guess = clinic, fault, None
        self.name = name  # ward and case, "06/1"
        self.script = script  # the healthy one after a cure
        self.signs = signs
        self.treatments = []

    @property
    def guess(self):
        """The cause you suspect, a key of `helpers.causes.CAUSES`; None before you say so."""
        return self._guess

    @guess.setter
    def guess(self, code):
        self._guess = check_cause(code, "guess")

    def diagnose(self):
        """Run the diagnosis on the script as it stands; it is refused before there is a guess."""
        self._require_guess("the diagnosis")
        return diagnose(alive(self.script))

    def treat(self, cause):
        """Put right what a cause says is wrong.

        If it is the cause, the data, the setting or the line of the script is fixed and it runs
        again, which is the healthy run, seed for seed. If it is not, what is put right was right
        before, and nothing changes.
        """
        self.treatments.append(check_cause(cause, "treatment"))
        self._clinic.score.note(self.name, treatment=cause)
        if cause == self._fault.cause:
            self.script = self._clinic.script

    def reveal(self):
        """Say what was done to the run, and your score; it is refused before there is a guess.

        Reading the answer before the cure ends the treatment: the patient counts as not cured.
        """
        self._require_guess("the answer")
        fault, score = self._fault, self._clinic.score
        score.note(self.name, outcome=ANSWER_READ)
        right = "as guessed" if self.guess == fault.cause else f"the guess was {self.guess}"
        return (
            f"{fault.cause}, {right}.\n"
            f"What was done: {fault.what}\nWhat you see: {fault.symptom}\n"
            f"Cure: {CAUSES[fault.cause].fix}\n\n"
            f"{score.sentence}\n{score.table.to_string(index=False)}"
        )

    def _require_guess(self, what):
        if self.guess is None:
            fix = "set patient.guess to a cause, see helpers.causes.CAUSES"
            raise InputError(f"{what} comes after your guess", where="patient", fix=fix)


class Clinic:
    """Where patients are admitted, with one healthy run of the script for comparison.

    The healthy run is made once for a folder and is used by all exercises. Its adapter, in the form
    of PEFT, is in ``healthy``, the script itself is ``script``. Treatments and cures are counted in
    ``score``.

    Parameters
    ----------
    folder, data_dir : os.PathLike
        Where runs go, and the dataset.
    profile : str
        Overlay of the config, which names the base.
    seed : int
        Of every training.
    **settings
        Of `helpers.lab.careless.Careless`.
    """

    def __init__(self, folder, *, data_dir=WALL_CRACKS, profile="tiny", seed=42, **settings):
        self.folder = Path(folder)
        self.score = Score(self.folder)
        base = load_config(CONFIGS / "crack_detection_config.yaml", profile).model.name
        self._recipe = {"data_dir": str(resolve(data_dir)), "base": base, "epochs": EPOCHS}
        self._recipe |= {"seed": seed, **settings}
        self._truth = read_split(data_dir, "valid")
        if not self._truth.num_objects:
            fix = "use another dataset"
            raise InputError("no image shows an object", where=self._truth.root, fix=fix)
        self.healthy = self.folder / HEALTHY_FOLDER / RUN_FOLDER
        record = self.folder / RECIPE_FILE
        made = read_json(record, "remove the folder") if record.is_file() else {}
        if made.get("recipe") == self._recipe:
            self.script = Careless(**self._recipe).take(self.healthy)
            self.signs = VitalSigns(**made["signs"])
        else:
            self.script = planted(HEALTHY, self.healthy.parent, **self._recipe)
            self.signs = take_signs(self.script, self._truth)
            write_json(record, {"recipe": self._recipe, "signs": asdict(self.signs)})

    def admit(self, ward, case):
        """Draw a fault of a ward of `WARDS`, run the script with it, and return the `Patient`.

        The same ``case``, a whole number from 0, draws the same fault.
        """
        if ward not in WARDS:
            raise InputError(f"no ward {ward!r}", where="clinic", fix=f"choose from {list(WARDS)}")
        if isinstance(case, bool) or not isinstance(case, int) or case < 0:
            raise InputError(f"case is {case!r}", where="clinic", fix="give a whole number from 0")
        names = WARDS[ward]
        order = np.random.default_rng(DRAW_SEED).permutation(len(names))
        fault = FAULTS[names[order[case % len(names)]]]
        folder = self.folder / f"{PATIENT_FOLDER}_{ward}_{case}"
        script = planted(fault, folder, healthy=self.healthy, **self._recipe)
        return Patient(self, fault, script, take_signs(script, self._truth), f"{ward}/{case}")

    def suspects(self, ward):
        """Return the causes that a patient of a ward may have, in their order."""
        return [code for code in CAUSES if code in {FAULTS[name].cause for name in WARDS[ward]}]

    def check_cure(self, patient):
        """Say whether detections came back, in a `CureReport`: it measures and compares no name."""
        report = CureReport(self.signs, patient.signs, take_signs(patient.script, self._truth))
        if report.cured and patient.treatments:
            self.score.note(patient.name, outcome=CURED)
        return report


def check_cause(code, name):
    """Return a key of `helpers.causes.CAUSES`, or refuse it and name the closest."""
    if code is ...:
        raise InputError(f"the {name} is still ...", where="exercise", fix="fill in a cause")
    if code not in CAUSES:
        close = difflib.get_close_matches(str(code), CAUSES, n=1, cutoff=0.3)
        fix = f"did you mean {close[0]!r}? " if close else ""
        fix += "The codes are the keys of helpers.causes.CAUSES"
        raise InputError(f"the {name} {code!r} is no cause", where="patient", fix=fix)
    return code
