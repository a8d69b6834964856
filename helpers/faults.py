"""All faults of the laboratory by name; see `helpers.planting` for what a fault is.

They lie where they live: in files and prompts (`helpers.faults_data`), in the code of the pipeline
(`helpers.faults_code`), in what a run leaves (`helpers.faults_checkpoint`), in the course of the
training (`helpers.faults_training`). No other part of the package knows of them.
"""

from __future__ import annotations

import pandas as pd

from helpers.causes import CAUSES, LEFT_OUT
from helpers.faults_checkpoint import CHECKPOINT_FAULTS
from helpers.faults_code import CODE_FAULTS
from helpers.faults_data import DATA_FAULTS
from helpers.faults_prompts import PROMPT_FAULTS
from helpers.faults_training import TRAINING_FAULTS

FAULTS = DATA_FAULTS | PROMPT_FAULTS | CODE_FAULTS | TRAINING_FAULTS | CHECKPOINT_FAULTS


def faults_frame():
    """Return the faults as a table, in the order of the catalogue.

    Returns
    -------
    pandas.DataFrame
        Index ``row`` and ``fault``; columns ``cause``, ``what``, ``signature``, ``cure``. Rows of
        the catalogue that are left out have no fault and their reason as ``what``.
    """
    rows = [(f.row, name, f.cause, f.what, f.signature, f.cure) for name, f in FAULTS.items()]
    rows += [(row, "", "", reason, "", "") for row, reason in LEFT_OUT.items()]
    columns = ["row", "fault", "cause", "what", "signature", "cure"]
    table = pd.DataFrame(rows, columns=columns)
    order = table["row"].map(lambda row: (int(row.rstrip("b")), row))
    return table.loc[order.sort_values(kind="stable").index].set_index(["row", "fault"])


def rows_covered():
    """Return the rows of the catalogue of which a fault is planted, as a set of texts."""
    return {CAUSES[fault.cause].row for fault in FAULTS.values()}
