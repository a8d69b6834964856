"""Logs of other scripts: read whatever their form, and what a curve alone gives away."""

import json
import math

import pandas as pd
import pytest

from helpers.__main__ import main
from helpers.diagnose.diagnosis import pass_gate
from helpers.diagnose.logs import read_log
from helpers.diagnose.patient import Patient
from helpers.diagnose.run_gates import LOG_GATES
from helpers.errors import InputError


def lines(*entries):
    return "\n".join(json.dumps(entry) for entry in entries) + "\n"


STATE = {
    "global_step": 4,
    "log_history": [
        {"step": 2, "epoch": 1.0, "loss": 9.0, "learning_rate": 1e-4},
        {"step": 2, "epoch": 1.0, "eval_loss": 8.0, "eval_runtime": 3.1},
        {"step": 4, "epoch": 2.0, "loss": 5.0},
    ],
}
YOLO = (
    "                  epoch,         train/box_loss,         train/cls_loss,       val/box_loss\n"
    "                      1,                 1.5,                 2.5,                1.25\n"
    "                      2,                 1.0,                 2.0,                1.00\n"
)


@pytest.mark.parametrize(
    ("name", "text", "loss", "valid"),
    [
        (
            "val_stats.json",
            lines(*({"epoch": n, "train_loss": 4 - n, "val_loss": 5 - n} for n in (1, 2))),
            [3, 2],
            [4, 3],
        ),
        ("trainer_state.json", json.dumps(STATE), [9, 5], [8]),
        ("results.csv", YOLO, [4, 3], []),
        ("shuffled.csv", "step,loss\n3,1.5\n1,2.5\n2,2\n", [2.5, 2, 1.5], []),
        ("resumed.csv", "step,loss\n1,3\n2,2\n1,2.5\n2,1\n", [3, 2, 2.5, 1], []),
        ("mine.csv", "step,Loss\n1,2.5\n2,\n3,1.5\n", [2.5, 1.5], []),
        ("German.csv", "Schritt;Loss\n1;2,5\n2;1,5\n", [2.5, 1.5], []),
        ("tabs.csv", "step\tloss\n1\t2.5\n2\t1.5\n", [2.5, 1.5], []),
        ("sums.csv", "step,total_loss,loss_ce,loss_bbox\n1,9,4,5\n2,7,3,4\n", [9, 7], []),
        (
            "train_stats.json",
            lines({"Losses/train_all_loss": 9, "Losses/train_all_loss_ce": 5, "Trainer/epoch": 0}),
            [9],
            [],
        ),
        ("list.json", json.dumps([{"iter": 1, "loss": 2}, {"iter": 2, "loss": "1.0"}]), [2, 1], []),
        ("nested.jsonl", lines({"losses": {"loss_ce": 1, "loss_bbox": 2}}), [3], []),
    ],
)
def test_a_log_is_read_whatever_its_form(tmp_path, name, text, loss, valid):
    (tmp_path / name).write_text(text)
    table = read_log(tmp_path / name)
    assert table["loss"].dropna().tolist() == loss
    assert (table["valid_loss"].dropna().tolist() if "valid_loss" in table else []) == valid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,mAP\n1,0.5\n", "holds no loss, but epoch, mAP"),
        ("", "holds no loss, but no number"),
        ('{"loss": 1}\n{"loss": 2', "line 2: is no JSON"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_what_is_no_log_is_refused_by_what_it_holds(tmp_path, text, message):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(InputError) as caught:
        read_log(tmp_path / "log.txt")
    assert message in str(caught.value)


[SETTINGS_GATE] = [gate for gate in LOG_GATES if gate.name == "settings in the log"]


def series(*values, valid=None):
    table = pd.DataFrame({"epoch": range(len(values)), "train_loss": values})
    return table if valid is None else table.assign(val_loss=valid)


FALLING = [20.0, 15, 12, 10, 9, 8, 7.5, 7]
UP = [9.0, 8, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("log", "causes"),
    [
        (series(*FALLING, valid=FALLING), set()),
        (series(170.0, 120, 100, 90, 80, 75, 72, 70, valid=FALLING), set()),  # 18 layers added up
        (series(3.0, 0.1, 1e-3, 9.1e-5, 3.3e-5, 3.0e-5), {"no_objects"}),
        (series(*FALLING, valid=[1e-3, 1e-4, 5e-5, 4e-5, 3e-5, 3e-5, 3e-5, 3e-5]), {"no_objects"}),
        (series(*[0.0] * 8), {"no_objects"}),
        (series(8.0, 7.0, math.nan, math.nan), {"not_finite"}),
        (series(159224.0, 10090, 10087, 10085), {"wrong_box_targets"}),
        (series(*range(600, 608)).assign(loss_bbox=118.0), {"wrong_box_targets"}),
        (series(*FALLING).assign(**{"train/box_loss": 0.6}), set()),
        (series(*[8.25] * 8), {"adapter_at_zero"}),
        (series(*FALLING, valid=UP), {"overtrained"}),
        (series(*FALLING, valid=UP[::-1]), set()),
        (series(*UP, valid=UP), set()),  # both rise: not what is called overfitting
    ],
)
def test_a_curve_names_what_it_can_show(log, causes):
    patient = Patient(log=log)
    results = [pass_gate(gate, patient) for gate in LOG_GATES if gate != SETTINGS_GATE]
    assert {result.status for result in results} <= {"ok", "failed"}
    named = {one.cause for result in results for one in result.evidence if one.confidence >= 0.5}
    assert named == causes


@pytest.mark.parametrize(
    ("rates", "stated", "status"),
    [
        ([1e-4, 8e-4, 5e-4], {"learning_rate": 1e-3}, "ok"),  # a warm-up and a decay
        ([2e-3, 1e-3], {"learning_rate": 1e-3}, "failed"),
        ([1e-4, 5e-5], {"learning_rate": 1e-3}, "failed"),
        ([1e-4], {"learning_rate": 1e-3}, "not checked"),  # one value may be that of a warm-up
        ([1e-3, 5e-4], {"num_epochs": 2}, "ok"),
        ([1e-3, 5e-4], {"num_epochs": 9}, "ok"),  # it may have been stopped
        ([1e-3, 5e-4, 1e-4], {"num_epochs": 1}, "failed"),
        ([1e-3, 5e-4], {}, "not checked"),
    ],
)
def test_the_log_is_compared_with_the_settings(rates, stated, status):
    log = series(*FALLING[: len(rates)]).assign(lr=rates)
    if len(rates) == 1:
        log = log.drop(columns="epoch")
    result = pass_gate(SETTINGS_GATE, Patient(log=log, settings={"training": stated}))
    assert result.status == status, result.measured
    assert {one.cause for one in result.evidence} <= {"dead_config_keys"}


def test_the_logit_of_the_value_without_objects_is_said():
    patient = Patient(log=series(3.0, 2 * math.log1p(math.exp(-11))))
    [result] = [pass_gate(gate, patient) for gate in LOG_GATES if "value" in gate.name]
    assert "every logit at -11.0" in result.measured


def test_a_log_alone_is_diagnosed_and_the_rest_is_asked_for(tmp_path, capsys):
    path = tmp_path / "val_stats.json"
    path.write_text(lines({"epoch": 1, "val_loss": 1e-3}, {"epoch": 2, "val_loss": 3e-5}))
    assert main(["diagnose", str(path)]) == 1
    output = capsys.readouterr().out
    assert "[no_objects]" in output
    assert "needs the dataset; give it with --data DIR" in output
    path.write_text(lines(*({"epoch": n, "val_loss": 9 - n} for n in range(6))))
    assert main(["diagnose", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 3
    output = capsys.readouterr().out
    assert "to decide it, cheapest first: the dataset, with --data DIR" in output
    assert "asked 4 of " in output
    assert "course of the loss" in (tmp_path / "page.html").read_text()
