"""The catalogue of causes: what can be wrong with a run that detects nothing.

A cause is planted by `helpers.lab`, named by `helpers.diagnose` and stopped by `helpers.train`. All
three speak of it by its key in the table ``data/causes.csv``.
"""

from __future__ import annotations

import csv
from typing import NamedTuple

from helpers.files import DATA

CAUSES_TABLE = DATA / "causes.csv"
NOT_TESTED = "not tested here: "
"""Start of the column ``test`` where this project cannot show a cause; the reason follows."""
STAGES = (
    "files",
    "data",
    "prompts",
    "base",
    "adapter",
    "loss",
    "training",
    "checkpoint",
    "prediction",
    "evaluation",
)
"""Where a cause lives, in the order in which data flows: an earlier one explains later oddities."""


class Cause(NamedTuple):
    """One row of the catalogue.

    Attributes
    ----------
    stage : str
        One of `STAGES`.
    title, symptom : str
        What is wrong, and what one sees of it.
    test : str
        Gate, finding or command that shows it.
    fix : str
        What to do.
    source : str
        Public reports of it, separated by spaces.
    confusable : str
        Another cause that looks the same, and what tells them apart; empty if there is none.
    """

    stage: str
    title: str
    symptom: str
    test: str
    fix: str
    source: str
    confusable: str

    @property
    def row(self):
        """Empty: causes have names, no numbers."""
        return ""


def _read_table():
    """Return the rows of the table, a dict of key to `Cause` in the order of the stages."""
    with CAUSES_TABLE.open(encoding="utf-8", newline="") as file:
        return {row.pop("cause"): Cause(**row) for row in csv.DictReader(file)}


_TABLE = _read_table()
CAUSES = {key: cause for key, cause in _TABLE.items() if not cause.test.startswith(NOT_TESTED)}
"""The causes that this project can show, by key."""
LEFT_OUT = {
    key: cause.test.removeprefix(NOT_TESTED) for key, cause in _TABLE.items() if key not in CAUSES
}
"""The other causes of the catalogue, with the reason why they are not tested here."""
