import json

import pytest
from tiny_random import save_tiny_base, tiny_run_config, write_dataset

from helpers.__main__ import main
from helpers.causes import CAUSES, LEFT_OUT, STAGES
from helpers.diagnose import diagnosis
from helpers.diagnose.diagnosis import Diagnosis, diagnose, pass_gate, rank
from helpers.diagnose.examination import FAILED, NOT_CHECKED, OK, Evidence, Gate, GateResult
from helpers.errors import InputError
from helpers.lab.faults import FAULTS, faults_frame, rows_covered
from helpers.train.training import train

ROWS = {*(str(number) for number in range(1, 36)), "1b"}


def result_of(*evidence):
    return GateResult("a gate", FAILED, "measured", "expected", tuple(evidence))


def codes(*results):
    return [cause.code for cause in rank(results)]


def test_causes_are_ordered_by_stage_and_every_row_has_a_fault_or_a_reason():
    stages = [STAGES.index(cause.stage) for cause in CAUSES.values()]
    assert stages == sorted(stages)
    assert rows_covered() | set(LEFT_OUT) == ROWS
    assert not rows_covered() & set(LEFT_OUT)
    assert {fault.cause for fault in FAULTS.values()} == set(CAUSES)
    assert all(fault.what and fault.signature and fault.cure for fault in FAULTS.values())


def test_the_table_of_faults_is_in_the_order_of_the_catalogue():
    table = faults_frame()
    assert len(table) == len(FAULTS) + len(LEFT_OUT)
    numbers = [int(row.rstrip("b")) for row in table.index.get_level_values("row")]
    assert numbers == sorted(numbers)


def test_a_cause_is_as_likely_as_its_strongest_evidence():
    one = result_of(
        Evidence("low_confidence", 0.6, "weak"), Evidence("low_confidence", 0.7, "strong")
    )
    [cause] = rank([one])
    assert (cause.code, cause.row, cause.confidence) == ("low_confidence", "17", 0.7)
    assert cause.evidence == ("strong", "weak")
    assert cause.fix == CAUSES["low_confidence"].fix


def test_an_earlier_observation_explains_a_later_behaviour():
    behaviour = Evidence("low_confidence", 0.8, "scores are low", is_direct=False)
    observed = Evidence("no_objects", 1.0, "0 objects")
    assert codes(result_of(behaviour)) == ["low_confidence"]
    assert codes(result_of(behaviour), result_of(observed)) == ["no_objects"]
    later = Evidence("validation_crash", 1.0, "KeyError")
    assert codes(result_of(behaviour), result_of(later)) == ["validation_crash", "low_confidence"]


def test_equal_causes_are_ranked_by_stage():
    evidence = [Evidence(code, 1.0, "seen") for code in ("validation_crash", "loss_weights")]
    assert codes(result_of(*evidence)) == ["loss_weights", "validation_crash"]


def test_weak_evidence_names_no_cause():
    assert codes(result_of(Evidence("at_clamp", 0.4, "a slip"))) == []
    gate = Gate("name", "expected", lambda _: ("text", [Evidence("at_clamp", 0.4, "a slip")]))
    assert pass_gate(gate, None).status == OK


def test_a_gate_that_cannot_be_asked_or_crashes_is_a_result():
    def refuse(_):
        raise InputError("nothing to ask", fix="train")

    def crash(_):
        raise KeyError("masks")

    for examine, text in (
        (refuse, "nothing to ask. Fix: train"),
        (crash, "raised KeyError: 'masks'"),
    ):
        result = pass_gate(Gate("name", "expected", examine), None)
        assert (result.status, result.measured) == (NOT_CHECKED, text)


def test_the_text_names_gates_causes_and_what_was_left_open():
    gates = (
        result_of(Evidence("no_objects", 1.0, "0 of 57 objects")),
        GateResult("another gate", NOT_CHECKED, "no model", "a model"),
    )
    text = Diagnosis(rank(gates), gates).summary()
    assert "1. no annotated object reached the loss [no_objects, row 1]" in text
    assert "evidence: 0 of 57 objects" in text
    assert "not checked: another gate" in text
    assert "no cause found" in Diagnosis((), gates[1:]).summary()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the random base."""
    folder = tmp_path_factory.mktemp("diagnosis")
    base, data = save_tiny_base(folder / "base"), write_dataset(folder / "data")
    config = tiny_run_config(base, data, "scale.num_epochs=0.02", "guards.adapter_at_zero=false")
    train(config, output_dir=folder / "run", progress=False)
    return folder / "run"


def test_every_gate_answers_about_a_real_run(run):
    asked = []
    found = diagnose(run, on_gate=asked.append)
    assert [gate.name for gate in asked] == [gate.name for gate in diagnosis.GATES]
    assert not [gate for gate in found.gates if "raised" in gate.measured]
    names = [gate.name for gate in diagnosis.GATES]
    assert len(names) == len(set(names))


def test_the_command_answers_in_json_and_by_its_status(run, monkeypatch, capsys):
    bad = Gate("bad", "well", lambda _: ("ill", [Evidence("at_clamp", 1.0, "seen")]))
    good = Gate("good", "well", lambda _: ("well", []))
    monkeypatch.setattr(diagnosis, "GATES", (good,))
    assert main(["diagnose", "--adapter", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "healthy": True,
        "causes": [],
        "gates": [{"name": "good", "status": "ok", "measured": "well", "expected": "well"}],
    }
    monkeypatch.setattr(diagnosis, "GATES", (good, bad))
    assert main(["diagnose", "--adapter", str(run), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["healthy"]
    [cause] = document["causes"]
    assert set(cause) == {"code", "row", "confidence", "evidence", "fix"}
    assert (cause["code"], cause["row"], cause["evidence"]) == ("at_clamp", "18", ["seen"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "nowhere"], "holds no config.yaml"),
        (["--data", "nowhere"], "no such dataset"),
        (["--image", "nowhere.jpg"], "no such image"),
    ],
)
def test_what_is_not_there_is_unusable_input(run, capsys, options, message):
    options = options if "--adapter" in options else ["--adapter", str(run), *options]
    assert main(["diagnose", *options]) == 2
    assert message in capsys.readouterr().err
