import pandas as pd
import pytest

from data.experiments import make_confusion
from data.experiments.make_confusion import CONFUSION_TABLE, HEALTHY_RUNS, run_laboratory
from helpers.causes import CAUSES
from helpers.lab.faults import FAULTS
from helpers.lab.statistics import NOTHING, confusion_figure, score


def table_of(*rows):
    """Rows of (planted, cause, found)."""
    return pd.DataFrame(
        [
            {"planted": name, "cause": cause, "first": (found.split() or [NOTHING])[0], "found": found}
            for name, cause, found in rows
        ]
    )  # fmt: skip


def test_score_by_hand():
    counts = score(
        table_of(
            ("a", "no_objects", "no_objects at_clamp"),
            ("b", "at_clamp", "no_objects at_clamp"),
            ("c", "overtrained", "no_objects"),
            ("d", "overtrained", ""),
            ("healthy 1", NOTHING, ""),
            ("healthy 2", NOTHING, "at_clamp"),
        )
    )
    assert counts == {
        "faults": 4,
        "named_first": 0.25,
        "among_found": 0.5,
        "healthy_runs": 2,
        "false_alarms": 1,
        "not_first": ["b", "c", "d"],
        "missed": ["c", "d"],
    }


def test_the_figure_marks_what_was_planted_and_what_was_found():
    table = table_of(("a", "no_objects", "no_objects at_clamp"), ("healthy 1", NOTHING, ""))
    ax = confusion_figure(table).axes[0]
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["no_objects", "at_clamp", NOTHING]
    marks = [(line.get_marker(), line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines]
    assert marks == [("o", 0, 0), ("s", 0, 0), ("s", 1, 0), ("o", 2, 1), ("s", 2, 1)]


def test_what_was_judged_is_not_judged_again(tmp_path, monkeypatch):
    calls = []

    def jobs(function, missing, *, description, done, workers):
        for name, *_ in missing:
            calls.append(name)
            cause = FAULTS[name].cause if name in FAULTS else NOTHING
            yield {"planted": name, "cause": cause, "first": cause, "found": cause}

    monkeypatch.setattr(make_confusion, "run_jobs", jobs)
    table = run_laboratory(tmp_path)
    assert len(calls) == len(table) == len(FAULTS) + len(HEALTHY_RUNS)
    assert score(table)["named_first"] == 1
    (tmp_path / "wrong_keys.json").unlink()
    calls.clear()
    run_laboratory(tmp_path)
    assert calls == ["wrong keys"]


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(CONFUSION_TABLE, keep_default_na=False)


def test_the_committed_table_has_every_fault_and_three_healthy_runs(committed):
    assert committed["planted"].tolist() == [*HEALTHY_RUNS, *FAULTS]
    for row in committed.itertuples():
        if row.planted in FAULTS:
            assert row.cause == FAULTS[row.planted].cause
        assert set(row.found.split()) <= set(CAUSES)


def test_the_committed_table_keeps_what_the_laboratory_promises(committed):
    counts = score(committed)
    assert counts["named_first"] >= 0.9
    assert counts["missed"] == []
    assert counts["false_alarms"] == 0
