"""The catalogue of causes: what can be wrong with a run that detects nothing.

A cause is planted by `helpers.lab`, named by `helpers.diagnose` and stopped by `helpers.train`. All
three speak of it by its key in the table ``data/causes.csv``.
"""

import csv
from typing import NamedTuple

from helpers.files import DATA

CAUSES_TABLE = DATA / "causes.csv"
NOT_TESTED = "not tested here: "
"""Start of the column ``test`` where this project cannot show a cause; the reason follows."""


class Cause(NamedTuple):
    """One row of the catalogue."""

    stage: str  # one of `STAGES`
    title: str
    symptom: str  # what one sees of it
    test: str  # gate, finding or command that shows it
    fix: str
    source: str  # public reports of it, separated by spaces
    confusable: str  # another cause that looks the same, and what tells them apart; may be empty


with CAUSES_TABLE.open(encoding="utf-8", newline="") as _file:
    TABLE = {row.pop("cause"): Cause(**row) for row in csv.DictReader(_file)}
"""The whole catalogue, by key."""
STAGES = tuple(dict.fromkeys(cause.stage for cause in TABLE.values()))
"""Where a cause lives, in the order in which data flows: an earlier one explains later oddities."""
CAUSES = {key: cause for key, cause in TABLE.items() if not cause.test.startswith(NOT_TESTED)}
"""The causes that this project can show, by key."""
LEFT_OUT = {
    key: cause.test.removeprefix(NOT_TESTED) for key, cause in TABLE.items() if key not in CAUSES
}
"""The other causes of the catalogue, with the reason why they are not tested here."""
