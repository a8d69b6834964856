"""The score of the clinic: which patients were treated, and how many treatments a cure took."""

from pathlib import Path

import pandas as pd

from helpers.errors import InputError
from helpers.files import read_json, write_json

SCORE_FILE = "score.json"
CURED, ANSWER_READ = "cured", "answer read first"


class Score:
    """A count that outlives the kernel, kept in a folder as ``score.json``.

    Only different treatments count, and none after the cure or after the answer was read: the same
    patient can be admitted again without a change of its score.

    Parameters
    ----------
    folder : os.PathLike
        The folder of a clinic.

    Raises
    ------
    helpers.errors.InputError
        If the file is damaged.
    """

    def __init__(self, folder):
        self.path = Path(folder) / SCORE_FILE
        _ = self.patients

    @property
    def patients(self):
        """Map ward and case, ``"06/1"``, to a dict of ``treatments`` and ``outcome`` or None."""
        fix = "remove this file; the score then begins anew"
        content = read_json(self.path, fix) if self.path.is_file() else {}
        for name, entry in content.items():
            treatments = entry.get("treatments") if isinstance(entry, dict) else None
            is_sound = isinstance(treatments, list) and set(map(type, treatments)) <= {str}
            if not is_sound or entry.get("outcome", 0) not in (None, CURED, ANSWER_READ):
                raise InputError(f"{name!r} is no patient's score", where=self.path, fix=fix)
        return content

    def note(self, name, *, treatment=None, outcome=None):
        """Add a treatment of a patient, its outcome, or both; after an outcome nothing is added."""
        patients = self.patients
        entry = patients.setdefault(name, {"treatments": [], "outcome": None})
        if entry["outcome"] is None:
            if treatment not in (None, *entry["treatments"]):
                entry["treatments"].append(treatment)
            entry["outcome"] = outcome
            write_json(self.path, dict(sorted(patients.items())))

    def counts(self):
        """Return how many patients were treated, and cured at the first attempt, later, not yet."""
        entries = self.patients.values()
        attempts = [len(one["treatments"]) for one in entries if one["outcome"] == CURED]
        counts = {"treated": len(entries), "cured at the first attempt": attempts.count(1)}
        counts |= {"cured later": len(attempts) - attempts.count(1)}
        return counts | {"not cured": len(entries) - len(attempts)}

    @property
    def sentence(self):
        """The counts in one line."""
        treated, *others = self.counts().items()
        listed = ", ".join(f"{number} {name}" for name, number in others)
        return (
            f"Your score: {treated[1]} patient{'' if treated[1] == 1 else 's'} treated, {listed}."
        )

    @property
    def table(self):
        """One row per patient: exercise, case, number of treatments, outcome; a `pandas.DataFrame`."""
        rows = []
        for name, entry in self.patients.items():
            exercise, _, case = name.rpartition("/")
            row = {"exercise": exercise, "case": case, "treatments": len(entry["treatments"])}
            rows.append(row | {"outcome": entry["outcome"] or "not cured yet"})
        return pd.DataFrame(rows, columns=["exercise", "case", "treatments", "outcome"])
