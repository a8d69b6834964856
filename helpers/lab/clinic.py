"""The clinic: runs that are broken in a way you do not know, to be diagnosed and mended.

A case, drawn by its number, is a fault of `helpers.lab.faults`. It stays in the code of this process
until it is treated, the next patient comes, or the clinic is closed.
"""

import difflib
import weakref
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean as mean

import numpy as np
import pandas as pd

from helpers.causes import CAUSES
from helpers.config import load_config
from helpers.data.dataset import load_dataset
from helpers.detect.metrics import evaluate_queries, union_iou
from helpers.detect.queries import predict_split
from helpers.diagnose.diagnosis import diagnose
from helpers.errors import InputError
from helpers.files import WALL_CRACKS, read_json, write_json
from helpers.lab.faults import FAULTS, HEALTHY, RUN_FOLDER, planted
from helpers.train.run import METRICS_FILE, RUN_CONFIG, load_run

SCORE_THRESHOLD = 0.3
LEAST_IOU = 0.5
MARGIN = 0.1  # share of the images or prompts that may be judged otherwise than by the healthy run
LEAST_AP50_SHARE = 0.75  # part of the healthy run's AP50 that a cured one has to reach
EPOCHS = "scale.num_epochs=0.06"  # for all runs, which are compared: three on the embedded base
WARDS = {
    "01": ("crowd", "images turned", "orientation ignored", "masks swallowed"),
    "02": ("wrong keys", "empty", "emptied by a transform"),
    "03": (
        "flag without effect",
        "lora b frozen",
        "text features detached",
        "names of another model",
    ),
    "04": ("no absent prompts", "score weight zero", "presence at its clamp"),
    "05": ("finest level dropped", "loader without effect", "decoder zeroed"),
}
"""Lesson to the `FAULTS` of its patients: those that show in the signs after a short training."""
WARDS["06"] = tuple(name for ward in WARDS.values() for name in ward)
WARDS["07"] = ("images turned", "crowd", "empty", "trained as object")
HEALTHY_FOLDER, RECIPE_FILE, PATIENT_FOLDER = "healthy", "recipe.json", "patient"
DRAW_SEED = 6  # orders the faults of a ward; fixed, so that a case stays what it is
_OPEN_CLINICS = weakref.WeakSet()


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


def take_signs(folder, truth):
    """Measure what the run in a folder detects on a split with right annotations."""
    try:
        run = load_run(folder)
        answers = predict_split(
            run.model, run.processor, truth, absent_prompts=run.config.evaluation.absent_prompts
        )
        return signs_of(answers)
    except Exception as error:  # a fault may stop the pipeline anywhere: that is a sign too
        return VitalSigns(remark=f"raised {type(error).__name__}")


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
    """A run with one fault: its folder, its signs on admission, and the treatments tried so far."""

    def __init__(self, clinic, fault, run_folder, signs):
        self._clinic, self._fault = clinic, fault
        self._guess, self._is_planted = None, True
        self.folder = run_folder  # the healthy run's after a cure that reached into it
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
        """Run the diagnosis with the fault in place; it is refused before there is a guess."""
        self._require_guess("the diagnosis")
        return diagnose(self.folder)

    def treat(self, cause):
        """Put right what a cause says is wrong.

        If it is the cause, the fault is taken back, and a run that it reached into is replaced by the
        healthy one: to train again without the fault is the healthy run's recipe, seed for seed. If it
        is not, what is put right was right before, and nothing changes.
        """
        self.treatments.append(check_cause(cause, "treatment"))
        if cause != self._fault.cause or not self._is_planted:
            return
        self._clinic.discharge()
        self._is_planted = False
        if self._fault.trains or self._fault.spoil_run is not None:
            self.folder = self._clinic.healthy

    def reveal(self):
        """Say what was done to the run; it is refused before there is a guess."""
        self._require_guess("the answer")
        fault = self._fault
        right = "as guessed" if self.guess == fault.cause else f"the guess was {self.guess}"
        return (
            f"{fault.cause}, {right}.\n"
            f"What was done: {fault.what}\nWhat you see: {fault.symptom}\n"
            f"Cure: {CAUSES[fault.cause].fix}"
        )

    def _require_guess(self, what):
        if self.guess is None:
            raise InputError(
                f"{what} comes after your guess",
                where="patient",
                fix="set patient.guess to a cause, see helpers.causes.CAUSES",
            )


class Clinic(AbstractContextManager):
    """Where patients are admitted: one healthy run for comparison, and one bed.

    The healthy run is made once for a folder and is used by all exercises. A clinic is also a
    context manager; leaving it, deleting it, or opening another takes its fault out of the code.

    Parameters
    ----------
    folder, data_dir : os.PathLike
        Where runs go, and the dataset.
    profile, settings : str, sequence of str
        Overlay and overrides of the config.
    seed : int
        Of every training.
    """

    def __init__(self, folder, *, data_dir=WALL_CRACKS, profile="tiny", seed=42, settings=()):
        for clinic in list(_OPEN_CLINICS):
            clinic.close()
        _OPEN_CLINICS.add(self)
        self._bed = ExitStack()
        weakref.finalize(self, self._bed.close)
        self.folder = Path(folder)
        self._recipe = {
            "data_dir": str(data_dir),
            "profile": str(profile),
            "settings": [EPOCHS, f"training.seed={seed}", *settings],
        }
        self.healthy = self.folder / HEALTHY_FOLDER / RUN_FOLDER
        recipe = self.healthy.parent / RECIPE_FILE
        is_finished = recipe.is_file() and (self.healthy / METRICS_FILE).is_file()
        if not is_finished or read_json(recipe, "remove the folder") != self._recipe:
            with self.planted(HEALTHY, self.healthy.parent):
                write_json(recipe, self._recipe)
        config = load_config(self.healthy / RUN_CONFIG)
        self._truth = load_dataset(config, data_dir).split(config.data.val_split)
        if not self._truth.num_objects:
            fix = "use another dataset"
            raise InputError("no image shows an object", where=self._truth.root, fix=fix)
        self.signs = take_signs(self.healthy, self._truth)

    def close(self, *error):
        """Take the fault of the last patient out of the code of this process."""
        self._bed.close()

    discharge = __exit__ = close

    def admit(self, ward, case):
        """Draw a fault of a ward of `WARDS`, plant it, and return the `Patient`.

        The same ``case``, a whole number from 0, draws the same fault. The patient before is discharged.
        """
        if ward not in WARDS:
            raise InputError(f"no ward {ward!r}", where="clinic", fix=f"choose from {list(WARDS)}")
        if isinstance(case, bool) or not isinstance(case, int) or case < 0:
            raise InputError(f"case is {case!r}", where="clinic", fix="give a whole number from 0")
        names = WARDS[ward]
        order = np.random.default_rng(DRAW_SEED).permutation(len(names))
        fault = FAULTS[names[order[case % len(names)]]]
        self.discharge()
        folder = self.folder / f"{PATIENT_FOLDER}_{ward}_{case}"
        run = self._bed.enter_context(self.planted(fault, folder))
        return Patient(self, fault, run, take_signs(run, self._truth))

    def suspects(self, ward):
        """Return the causes that a patient of a ward may have, in their order."""
        possible = {FAULTS[name].cause for name in WARDS[ward]}
        return [code for code in CAUSES if code in possible]

    def check_cure(self, patient):
        """Say whether detections came back, in a `CureReport`: it measures and compares no name."""
        return CureReport(self.signs, patient.signs, take_signs(patient.folder, self._truth))

    def planted(self, fault, folder):
        """Plant a fault in a run of this clinic's recipe, as long as the others."""
        settings = tuple(text for text in fault.settings if ".num_epochs=" not in text)
        fault = replace(fault, settings=settings)
        return planted(fault, folder, healthy=self.healthy, **self._recipe)


def check_cause(code, name):
    """Return a key of `helpers.causes.CAUSES`, or refuse it and name the closest."""
    if code is ...:
        raise InputError(f"the {name} is still ...", where="exercise", fix="fill in a cause")
    if code not in CAUSES:
        close = difflib.get_close_matches(str(code), CAUSES, n=1, cutoff=0.3)
        fix = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"the {name} {code!r} is no cause",
            where="patient",
            fix=f"{fix}The codes are the keys of helpers.causes.CAUSES",
        )
    return code
