"""The clinic: runs that are broken in a way you do not know, to be diagnosed and mended.

A case is a fault of `helpers.faults`, drawn by its number. It is planted where it lives and stays
in the code of this process until it is treated or the next patient comes, so there is one bed. The
production path is not changed.
"""

from __future__ import annotations

import difflib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.causes import CAUSES
from helpers.config import load_config
from helpers.data import prompts
from helpers.data.dataset import load_dataset
from helpers.detect import metrics as evaluation
from helpers.detect import predictor as prediction
from helpers.detect import queries as prediction_queries
from helpers.detect import queries as prompt_scores
from helpers.diagnose.diagnosis import diagnose
from helpers.errors import InputError
from helpers.files import WALL_CRACKS, read_json, write_json
from helpers.lab.faults import FAULTS
from helpers.lab.planting import RUN_FOLDER, planted
from helpers.train import run as run_folder
from helpers.train.run import METRICS_FILE, RUN_CONFIG

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
    truth : helpers.data.records.Split
        Right annotations.
    absent_prompts : sequence of str
        Nouns to ask where the image shows nothing of the kind, besides the names of the categories.

    Returns
    -------
    list of (helpers.data.records.ImageRecord, list of str, list of str)
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
    truth : helpers.data.records.Split
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


EPOCHS = "scale.num_epochs=0.06"
"""Three epochs on the embedded base, for the healthy run, the patients that train and their cure:
they are compared with one another, so none may be shorter."""
WARDS = {
    "01": ("all crowd", "images turned", "orientation ignored", "masks swallowed"),
    "02": ("wrong keys", "empty lists", "emptied by a transform"),
    "03": (
        "flag without effect",
        "lora b frozen",
        "text features detached",
        "names of another model",
    ),
    "04": ("no absent prompts", "score weight zero", "presence at its clamp"),
    "05": ("finest level dropped", "loader without effect", "decoder zeroed"),
}
"""Lesson to the faults of `helpers.lab.faults.FAULTS` that a patient of it may have: those that show in
the vital signs after a short training."""
WARDS["06"] = tuple(name for ward in WARDS.values() for name in ward)
WARDS["07"] = ("images turned", "all crowd", "empty lists", "trained as object")
HEALTHY_FOLDER, RECIPE_FILE, PATIENT_FOLDER = "healthy", "recipe.json", "patient"
DRAW_SEED = 6
"""Orders the faults of a ward; fixed, so that a case stays what it is."""
_BED = ExitStack()


class Patient:
    """A run with one fault.

    Attributes
    ----------
    folder : pathlib.Path
        The run folder; another one after a cure that had to train again.
    signs : helpers.lab.clinic.VitalSigns
        What was detected on admission.
    treatments : list of str
        What was tried, in order.
    """

    def __init__(self, clinic, fault, case_folder, run_folder):
        self._clinic, self._fault, self._case_folder = clinic, fault, case_folder
        self._guess = None
        self._is_planted = True
        self.folder = run_folder
        self.signs = clinic.measure(run_folder)
        self.treatments = []

    @property
    def guess(self):
        """str: the cause you suspect, a key of `helpers.causes.CAUSES`; None before you say so."""
        return self._guess

    @guess.setter
    def guess(self, code):
        self._guess = check_cause(code, "guess")

    def diagnose(self):
        """Run the diagnosis with the fault in place; it is refused before there is a guess.

        Returns
        -------
        helpers.diagnose.diagnosis.Diagnosis
        """
        self._ask_for_guess("the diagnosis")
        return diagnose(self.folder)

    def treat(self, cause):
        """Put right what a cause says is wrong: data, settings and code of that cause.

        If it is the cause, the fault is taken back and the run is made again as far as the fault
        reached into it: a fault of the training needs a new training. If it is not, what is put
        right was right before, and nothing changes.

        Parameters
        ----------
        cause : str
            Key of `helpers.causes.CAUSES`.
        """
        self.treatments.append(check_cause(cause, "treatment"))
        if cause != self._fault.cause or not self._is_planted:
            return
        _BED.close()
        self._is_planted = False
        if self._fault.trains:
            self.folder = self._clinic.make(None, self._case_folder / "treated")
        elif self._fault.spoil_run is not None:
            self.folder = self._clinic.healthy

    def reveal(self):
        """Say what was done to the run; it is refused before there is a guess.

        Returns
        -------
        str
            Cause, what was done, and what it looks like from outside.
        """
        self._ask_for_guess("the answer")
        fault = self._fault
        right = "as guessed" if self.guess == fault.cause else f"the guess was {self.guess}"
        return (
            f"{fault.cause} (row {fault.row}), {right}.\n"
            f"What was done: {fault.what}\nWhat one sees: {fault.signature}\nCure: {fault.cure}"
        )

    def _ask_for_guess(self, wanted):
        """Refuse what would give the answer away too early."""
        if self.guess is None:
            raise InputError(
                f"{wanted} comes after your guess",
                where="patient",
                fix="set patient.guess to a cause, see helpers.causes.CAUSES",
            )


class Clinic:
    """Where patients are admitted: one healthy run for comparison, and one bed.

    The healthy run is made once for a folder and is used by all exercises.

    Parameters
    ----------
    folder : os.PathLike
        For the healthy run and the patients.
    data_dir : os.PathLike
        Dataset.
    profile : str
        Overlay of the config.
    seed : int
        Of every training.
    settings : sequence of str
        Further config overrides.
    """

    def __init__(self, folder, *, data_dir=WALL_CRACKS, profile="tiny", seed=42, settings=()):
        _BED.close()
        self.folder = Path(folder)
        self._recipe = {
            "data_dir": str(data_dir),
            "profile": str(profile),
            "settings": [EPOCHS, f"training.seed={seed}", *settings],
        }
        self.healthy = self._healthy_run()
        config = load_config(self.healthy / RUN_CONFIG)
        self._truth = load_dataset(config, data_dir).split(config.data.val_split)
        self._questions = prepare_questions(self._truth, config.evaluation.absent_prompts)
        self.signs = self.measure(self.healthy)

    def admit(self, ward, case):
        """Draw a fault, plant it, and take the signs of the run; the patient before is discharged.

        Parameters
        ----------
        ward : str
            Key of `WARDS`.
        case : int
            At least 0; the same number draws the same fault, the next one another.

        Returns
        -------
        Patient
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
        run = _BED.enter_context(self._planted(fault, folder))
        return Patient(self, fault, folder, run)

    def suspects(self, ward):
        """Return the causes that a patient of a ward may have: list of str, in their order."""
        possible = {FAULTS[name].cause for name in WARDS[ward]}
        return [code for code in CAUSES if code in possible]

    def discharge(self):
        """Take the fault of the last patient out of the code of this process."""
        _BED.close()

    def measure(self, folder):
        """Take the signs of a run; see `helpers.lab.clinic.take_signs`."""
        return take_signs(folder, self._truth, self._questions)

    def check_cure(self, patient):
        """Say whether detections came back.

        Parameters
        ----------
        patient : Patient

        Returns
        -------
        helpers.lab.clinic.CureReport
            Measured now; no name is compared.
        """
        return CureReport(self.signs, patient.signs, self.measure(patient.folder))

    def make(self, fault, folder):
        """Make a run with the recipe of the clinic and return its folder."""
        with self._planted(fault, folder) as run:
            return run

    def _planted(self, fault, folder):
        """Plant a fault, or None, in a run of this clinic's recipe, as long as the others."""
        if fault is not None:
            others = tuple(one for one in fault.settings if ".num_epochs=" not in one)
            fault = replace(fault, settings=others)
        return planted(fault, folder, healthy=self.healthy, **self._recipe)

    def _healthy_run(self):
        """Return the healthy run, made with this recipe now or before."""
        folder = self.folder / HEALTHY_FOLDER
        run, recipe = folder / RUN_FOLDER, folder / RECIPE_FILE
        if (
            recipe.is_file()
            and (run / METRICS_FILE).is_file()
            and read_json(recipe, "remove the folder") == self._recipe
        ):
            return run
        with planted(None, folder, **self._recipe):
            write_json(recipe, self._recipe)
        return run


def check_cause(code, name):
    """Return a code of a cause, or refuse it and name the closest.

    Parameters
    ----------
    code : str
    name : str
        What it is meant as, for the message.

    Returns
    -------
    str

    Raises
    ------
    InputError
        If it is no key of `helpers.causes.CAUSES`, or still the ``...`` of an exercise.
    """
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
