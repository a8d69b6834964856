"""The clinic: runs that are broken in a way you do not know, to be diagnosed and mended.

A case is a fault of `helpers.faults`, drawn by its number. It is planted where it lives and stays
in the code of this process until it is treated or the next patient comes, so there is one bed. The
production path is not changed.
"""

from __future__ import annotations

import difflib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from helpers.causes import CAUSES
from helpers.config import load_config
from helpers.config_data import read_config_split
from helpers.diagnosis import diagnose
from helpers.errors import InputError
from helpers.faults import FAULTS
from helpers.files import read_json, write_json
from helpers.paths import WALL_CRACKS
from helpers.planting import RUN_FOLDER, planted
from helpers.run_folder import METRICS_FILE, RUN_CONFIG
from helpers.vital_signs import CureReport, prepare_questions, take_signs

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
"""Lesson to the faults of `helpers.faults.FAULTS` that a patient of it may have: those that show in
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
    signs : helpers.vital_signs.VitalSigns
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
        helpers.diagnosis.Diagnosis
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
        self._truth = read_config_split(config, config.data.val_split, data_dir)
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
        """Take the signs of a run; see `helpers.vital_signs.take_signs`."""
        return take_signs(folder, self._truth, self._questions)

    def check_cure(self, patient):
        """Say whether detections came back.

        Parameters
        ----------
        patient : Patient

        Returns
        -------
        helpers.vital_signs.CureReport
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
