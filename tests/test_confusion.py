import shutil

import pandas as pd
import pytest
from scipy.stats import binomtest

from data.experiments import make_confusion
from data.experiments.cells import TABLES
from data.experiments.make_confusion import (
    CONFUSION_TABLE,
    HEALTHY_RUNS,
    OWN_RUNS,
    VIEWS,
    run_laboratory,
)
from data.experiments.statistics import (
    BLIND,
    LATE,
    MISLED,
    NOTHING,
    RIGHT,
    WRONG,
    confusion_figure,
    outcomes_of,
    score,
)
from helpers.causes import CAUSES
from helpers.lab.faults import FAULTS, RUN_FOLDER


def table_of(*rows):
    """Rows of (planted, cause, found, whether it can be seen)."""
    return pd.DataFrame(
        [
            {"planted": name, "view": "files", "cause": cause, "seen": seen,
             "first": (found.split() or [NOTHING])[0], "found": found}
            for name, cause, found, seen in rows
        ]
    )  # fmt: skip


def test_score_by_hand():
    counts = score(
        table_of(
            ("a", "no_objects", "no_objects at_clamp", True),
            ("b", "at_clamp", "no_objects at_clamp", True),
            ("c", "overtrained", "no_objects", True),
            ("d", "overtrained", "", True),
            ("e", "overtrained", "", False),
            ("healthy 1", NOTHING, "", True),
            ("healthy 2", NOTHING, "at_clamp", True),
        )
    )
    assert counts == {
        "faults": 4,
        "named_first": 0.25,
        "among_found": 0.5,
        "unseen": 1,
        "healthy_runs": 2,
        "false_alarms": 1,
        "not_first": ["b (files)", "c (files)", "d (files)"],
        "missed": ["c (files)", "d (files)"],
    }


def test_the_figure_marks_what_was_planted_and_what_was_found():
    table = table_of(
        ("a", "no_objects", "no_objects at_clamp", True),
        ("b", "at_clamp", "", False),
        ("healthy 1", NOTHING, "", True),
    )
    figure = confusion_figure(table, blocks=2)
    labels = [[label.get_text() for label in ax.get_yticklabels()] for ax in figure.axes]
    assert labels == [["a", "b"], ["healthy 1"]]
    marks = [[(line.get_marker(), *line.get_ydata()) for line in ax.lines] for ax in figure.axes]
    assert marks == [[("o", 0), (".", 1)], [("o", 0)]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [RIGHT, BLIND]


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (("a", "no_objects", "no_objects at_clamp", True), RIGHT),
        (("a", "no_objects", "at_clamp no_objects", True), LATE),
        (("a", "no_objects", "at_clamp", True), WRONG),
        (("a", "no_objects", "", True), WRONG),
        (("a", "no_objects", "", False), BLIND),
        (("a", "no_objects", "at_clamp", False), MISLED),
        (("healthy 1", NOTHING, "", True), RIGHT),
        (("healthy 1", NOTHING, "at_clamp", True), WRONG),
    ],
)
def test_an_examination_ends_in_one_of_five_ways(row, outcome):
    assert outcomes_of(table_of(row)).tolist() == [outcome]


def test_what_was_judged_is_not_judged_again(tmp_path, monkeypatch):
    calls = []

    def jobs(function, missing, *, description, workers):
        for name, output_dir, _ in missing:
            calls.append(name)
            cause = FAULTS[name].cause if name in FAULTS else NOTHING
            (output_dir / name.replace(" ", "_") / RUN_FOLDER).mkdir(parents=True)
            row = {"planted": name, "cause": cause, "first": cause, "found": cause, "seen": True}
            yield [row | {"view": view} for view in VIEWS]

    monkeypatch.setattr(make_confusion, "run_jobs", jobs)
    table = run_laboratory(tmp_path, photographs=["somewhere/masonry"])
    assert calls[0] == "healthy 1"
    assert len(calls) == len(FAULTS) + len(HEALTHY_RUNS) + len(OWN_RUNS) + 1
    assert set(table["planted"]) >= {"healthy masonry", *FAULTS}
    assert score(table)["named_first"] == 1
    (tmp_path / "wrong_keys.json").unlink()
    shutil.rmtree(tmp_path / "wrong_keys")
    calls.clear()
    assert len(run_laboratory(tmp_path, names=["wrong keys"])) == 2 * len(VIEWS)
    assert calls == ["wrong keys"]


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(CONFUSION_TABLE, keep_default_na=False)


def test_the_committed_table_has_every_fault_and_the_healthy_runs(committed):
    healthy = committed[committed["cause"] == NOTHING]["planted"]
    assert set(committed["planted"]) - set(healthy) == set(FAULTS)
    assert {*HEALTHY_RUNS, *OWN_RUNS} <= set(healthy)
    for row in committed.itertuples():
        if row.planted in FAULTS:
            assert row.cause == FAULTS[row.planted].cause
        assert set(row.found.split()) <= set(CAUSES)


def test_the_committed_table_keeps_what_the_laboratory_promises(committed):
    counts = score(committed)
    assert counts["named_first"] >= 0.9
    assert counts["false_alarms"] == 0


def test_the_page_says_what_the_committed_table_says(committed):
    counts = score(committed)
    is_unseen = (committed["cause"] != NOTHING) & (committed["seen"].astype(str) != "True")
    named = int((committed[is_unseen]["first"] != NOTHING).sum())
    # The two examinations of one run are not independent: the interval is one over faults.
    faults = committed[(committed["cause"] != NOTHING) & ~is_unseen]["planted"].nunique()
    low, high = binomtest(faults, faults).proportion_ci(method="wilson")
    page = " ".join((TABLES / "README.md").read_text(encoding="utf-8").split())
    for text in (
        f"named first: {faults} of {faults} faults** (95 % interval {100 * low:.0f} to "
        f"{100 * high:.0f} %), in all {counts['faults']} examinations",
        f"{counts['unseen']} examinations cannot see their fault",
        f"In {counts['unseen'] - named} of them no cause is named; in {named} the diagnosis names",
        f"{counts['healthy_runs']} examinations of healthy runs name no cause",
    ):
        assert text in page, text
    assert counts["named_first"] == 1
