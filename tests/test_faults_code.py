"""Every fault of code and checkpoint shows, is named by its gate, and is taken back."""

import json
import shutil

import pytest
from lab import ask, causes, write_small_walls

from helpers.causes import CAUSES
from helpers.diagnose.adapter_gates import BASE_GATES, CHECKPOINT_GATES
from helpers.diagnose.diagnosis import rank
from helpers.diagnose.examination import Examination
from helpers.diagnose.run_gates import RUN_GATES
from helpers.lab.faults import CHECKPOINT_FAULTS, CODE_FAULTS
from helpers.lab.planting import planted

FAULTS = CODE_FAULTS | CHECKPOINT_FAULTS
GATES = (*RUN_GATES, *BASE_GATES, *CHECKPOINT_GATES)
GATE_OF = {
    "mask weight times 100": "loss terms",
    "score weight zero": "loss terms",
    "sum instead of mean": "loss terms",
    "double sigmoid": "loss terms",
    "several queries per object": "matching",
    "presence forgotten": "score",
    "threshold literal": "score threshold",
    "mask logits as probabilities": "mask threshold",
    "masks at grid size": "mask threshold",
    "answers to the next question": "evaluation",
    "absent prompts dropped": "evaluation",
    "masks missing in validation": "validation",
    "finest level dropped": "port",
    "autocast left on": "port",
    "decoder zeroed": "base",
    "flag without effect": "places of LoRA",
    "names of another model": "places of LoRA",
    "lora b frozen": "learning",
    "text features detached": "learning",
    "base unfrozen": "trained parameters",
    "loader without effect": "weights in memory",
    "keys with prefix": "keys of the adapter",
    "keys of another version": "keys of the adapter",
    "alpha halved": "saved adapter",
    "weights rounded": "saved adapter",
    "emptiest state kept": "kept checkpoint",
}
ONE_EPOCH = ("scale.num_epochs=0.02",)


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return write_small_walls(tmp_path_factory.mktemp("walls"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, walls):
    folder = tmp_path_factory.mktemp("healthy")
    with planted(None, folder, data_dir=walls, settings=ONE_EPOCH) as run:
        return run


@pytest.fixture(scope="module")
def healthy_results(healthy):
    examination = Examination(healthy)
    return {gate.name: ask(GATES, gate.name, examination) for gate in GATES}


def test_every_fault_has_its_gate():
    assert GATE_OF.keys() == FAULTS.keys()
    assert all(fault.cause in CAUSES for fault in FAULTS.values())


def test_every_gate_is_ok_on_a_healthy_run(healthy_results):
    assert {name: result.status for name, result in healthy_results.items()} == dict.fromkeys(
        (gate.name for gate in GATES), "ok"
    )
    assert rank(list(healthy_results.values())) == ()


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "emptiest state kept"])
def test_a_fault_is_named_by_its_gate_and_taken_back(name, tmp_path, healthy, walls):
    fault = FAULTS[name]
    with planted(fault, tmp_path / "lab", healthy=healthy, data_dir=walls) as run:
        found = ask(GATES, GATE_OF[name], run)
    assert found.status == "failed", found.measured
    assert causes(found) == {fault.cause}
    if fault.patch is not None:
        assert ask(GATES, GATE_OF[name], healthy).status == "ok"


def test_results_that_differ_from_the_recorded_ones_are_seen(tmp_path, healthy):
    run = shutil.copytree(healthy, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["valid"]["max_score_absent"] += 0.02
    (run / "metrics.json").write_text(json.dumps(metrics))
    (evidence,) = ask(GATES, "results after loading", run).evidence
    assert evidence.cause == "merge_changed_outputs"
    assert not evidence.is_direct


def test_the_kept_state_is_the_emptiest(tmp_path, walls):
    fault = FAULTS["emptiest state kept"]
    with planted(fault, tmp_path / "lab", data_dir=walls) as run:
        history = Examination(run).files.history
        metrics = json.loads((run / "metrics.json").read_text())
    scores = {
        int(entry["step"]): entry["eval_max_score_present"]
        for entry in history
        if "eval_loss" in entry
    }
    assert len(scores) == 3
    assert metrics["best_step"] == min(scores, key=scores.get)
