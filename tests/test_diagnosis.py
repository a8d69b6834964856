import ast
import csv
import inspect
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.__main__ import main
from helpers.causes import CAUSES, CAUSES_TABLE, LEFT_OUT, STAGES
from helpers.checks.findings import CODES
from helpers.diagnose import answer_gates, data_gates, diagnosis, live_gates, run_gates
from helpers.diagnose.diagnosis import (
    CRASHED,
    FAILED,
    NOT_APPLICABLE,
    NOT_CHECKED,
    OK,
    GateResult,
    diagnose,
    pass_gate,
    rank,
)
from helpers.diagnose.patient import Evidence, Gate, Inapplicable
from helpers.diagnose.run_gates import FILE_GATES, RUN_GATES
from helpers.errors import InputError
from helpers.files import write_json


def result_of(*evidence):
    return GateResult("a gate", FAILED, "measured", "expected", tuple(evidence))


def codes(*results):
    return [cause.code for cause in rank(results)]


def test_the_catalogue_is_complete_and_in_the_order_of_the_stages():
    with CAUSES_TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cause"] for row in rows if row["cause"] in CAUSES] == list(CAUSES)
    assert [row["cause"] for row in rows if row["cause"] in LEFT_OUT] == list(LEFT_OUT)
    assert len(rows) == len(CAUSES) + len(LEFT_OUT)
    stages = [STAGES.index(row["stage"]) for row in rows]
    assert stages == sorted(stages)
    assert " ".join(STAGES) == (
        "files data prompts base adapter loss training checkpoint prediction evaluation"
    )
    for row in rows:
        assert all(value for key, value in row.items() if key != "confusable"), row["cause"]
        assert all(text.startswith("https://") for text in row["source"].split())


def test_every_test_of_the_catalogue_exists():
    names = {gate.name for gate in diagnosis.GATES}
    for code, cause in CAUSES.items():
        for part in cause.test.split("; "):
            where, _, subjects = part.partition(": ")
            if where == "diagnose":
                assert set(subjects.split(", ")) <= names, code
            elif where == "check":
                assert set(subjects.split(", ")) <= set(CODES), code
            else:
                assert part.startswith(("train", "make test")), code


def test_every_cause_that_a_gate_may_name_is_in_the_catalogue():
    place = {"Evidence": 0, "evidence_if": 1}
    for module in (answer_gates, data_gates, live_gates, run_gates):
        calls = [
            node
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in place
        ]
        arguments = [call.args[place[call.func.id]] for call in calls]
        causes = {node.value for node in arguments if isinstance(node, ast.Constant)}
        assert causes
        assert causes <= set(CAUSES)


def test_a_cause_is_as_likely_as_its_strongest_evidence():
    one = result_of(
        Evidence("low_confidence", 0.6, "weak"), Evidence("low_confidence", 0.7, "strong")
    )
    [cause] = rank([one])
    assert (cause.code, cause.confidence) == ("low_confidence", 0.7)
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


def test_every_gate_answers_about_a_real_run(run_folder, monkeypatch, capsys):
    monkeypatch.setattr("helpers.files.PROGRESS_DELAY", 0)
    found = diagnose(run_folder, progress=True)
    assert "diagnose" in capsys.readouterr().err
    names = [gate.name for gate in diagnosis.GATES]
    assert [gate.name for gate in found.gates] == names
    assert len(names) == len(set(names))
    assert not found.open_gates
    assert found.gates[0].status == OK


@pytest.mark.parametrize(
    ("statuses", "verdict", "status"),
    [
        ((OK, OK), "healthy", 0),
        ((OK, NOT_APPLICABLE), "healthy", 0),
        ((OK, NOT_CHECKED), "undecided", 3),
        ((CRASHED, OK), "undecided", 3),
        ((NOT_CHECKED, FAILED), "causes", 1),
        ((CRASHED, FAILED), "causes", 1),
    ],
)
def test_only_a_run_that_was_examined_is_healthy(
    run_folder, monkeypatch, capsys, statuses, verdict, status
):
    gates = tuple(Gate(f"gate {n}", "well", _answer(kind)) for n, kind in enumerate(statuses))
    monkeypatch.setattr(diagnosis, "GATES", gates)
    assert main(["diagnose", "--adapter", str(run_folder), "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["healthy"]) == (verdict, status == 0)
    assert [gate["status"] for gate in document["gates"]] == list(statuses)
    assert [cause["code"] for cause in document["causes"]] == ["at_clamp"] * (verdict == "causes")
    assert main(["diagnose", "--adapter", str(run_folder)]) == status
    text = capsys.readouterr().out
    assert ("looks healthy" in text) == (status == 0)
    assert "2 gates: " in text
    for gate in document["gates"]:
        assert gate["measured"] in text


def _answer(status):
    """Return a question that ends with some status."""

    def examine(_):
        match status:
            case "not checked":
                raise InputError("the base is not there")
            case "not applicable":
                raise Inapplicable("no picture was given")
            case "crashed":
                raise KeyError("masks")
        return "measured", [Evidence("at_clamp", 1.0, "seen")] if status == FAILED else []

    return examine


FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_report.csv",
    "base.json",
    "config.yaml",
    "curves.csv",
    "environment.json",
    "metrics.json",
    "prompts.json",
)


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def only_files(monkeypatch):
    """Ask nothing but the gate of files: it has to see damage on its own."""
    monkeypatch.setattr(diagnosis, "GATES", FILE_GATES)


def test_a_whole_run_has_no_damage(run_copy, only_files):
    assert main(["diagnose", "--adapter", str(run_copy)]) == 0
    assert {path.name for path in run_copy.iterdir() if path.is_file()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, halve, lambda path: path.write_bytes(b"")])
def test_a_damaged_run_is_never_healthy(run_copy, only_files, capsys, name, damage):
    damage(run_copy / name)
    status = 2 if name == "config.yaml" else 1
    assert main(["diagnose", "--adapter", str(run_copy)]) == status
    output = capsys.readouterr()
    assert name in output.out + output.err
    assert "looks healthy" not in output.out


def change_json(**changes):
    return lambda path: write_json(path, json.loads(path.read_text()) | changes)


def change_table(change):
    return lambda path: change(pd.read_csv(path)).to_csv(path, index=False)


def change_weights(change):
    return lambda path: save_file({k: change(t) for k, t in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "damage", "cause"),
    [
        ("metrics.json", lambda path: path.write_text("{}\n"), "damaged_run"),
        ("metrics.json", change_json(valid=[1]), "damaged_run"),
        ("metrics.json", change_json(train_loss=3), "damaged_run"),
        ("metrics.json", change_json(steps="x"), "damaged_run"),
        ("metrics.json", change_json(steps=999), "damaged_run"),
        ("metrics.json", change_json(objects=None), "damaged_run"),
        ("prompts.json", lambda path: path.write_text("{}\n"), "damaged_run"),
        ("prompts.json", change_json(prompts=None), "damaged_run"),
        ("base.json", change_json(fingerprint=None), "damaged_run"),
        ("adapter_config.json", change_json(r="8"), "damaged_run"),
        ("adapter_config.json", change_json(lora_alpha=None), "damaged_run"),
        ("curves.csv", change_table(lambda t: t.drop(columns="step")), "damaged_run"),
        ("curves.csv", change_table(lambda t: t.assign(step="x")), "damaged_run"),
        ("curves.csv", change_table(lambda t: t[:0]), "damaged_run"),
        ("curves.csv", change_table(lambda t: t[:-3]), "damaged_run"),
        ("adapter_report.csv", change_table(lambda t: t[:-1]), "damaged_run"),
        ("adapter_report.csv", change_table(lambda t: t.add_suffix("x")), "damaged_run"),
        ("adapter_model.safetensors", change_weights(torch.Tensor.int), "damaged_run"),
        ("adapter_model.safetensors", change_weights(lambda t: t * math.nan), "not_finite"),
        ("adapter_model.safetensors", change_weights(lambda t: t / 0), "not_finite"),
    ],
)
def test_values_that_no_training_writes_are_named(run_copy, only_files, name, damage, cause):
    damage(run_copy / name)
    [found] = diagnose(run_copy).causes
    assert found.code == cause
    assert any(name in text for text in found.evidence)


def test_an_adapter_of_NaN_is_named_and_nothing_else(run_copy, monkeypatch):
    change_weights(lambda tensor: tensor * math.nan)(run_copy / "adapter_model.safetensors")
    gates = (*FILE_GATES, *RUN_GATES, *run_gates.CHECKPOINT_GATES)
    monkeypatch.setattr(diagnosis, "GATES", gates)
    [cause] = diagnose(run_copy).causes
    assert (cause.code, cause.confidence) == ("not_finite", 1.0)


def test_an_interrupted_run_is_called_so(run_copy, capsys, monkeypatch):
    for name in set(FILES) - {"config.yaml", "prompts.json", "environment.json", "curves.csv"}:
        (run_copy / name).unlink()
    monkeypatch.setattr(diagnosis, "GATES", (*FILE_GATES, *RUN_GATES[:1]))
    assert main(["diagnose", "--adapter", str(run_copy)]) == 3
    assert "not checked: the run" in (text := capsys.readouterr().out)
    assert "the run was interrupted" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "nowhere"], "no such file or folder"),
        (["--data", "nowhere"], "no such dataset"),
        (["--image", "nowhere.jpg"], "no such image"),
    ],
)
def test_what_is_not_there_is_unusable_input(run_folder, capsys, options, message):
    options = options if "--adapter" in options else ["--adapter", str(run_folder), *options]
    assert main(["diagnose", *options]) == 2
    assert message in capsys.readouterr().err
