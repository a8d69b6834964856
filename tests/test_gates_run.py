"""Gates on records, base and adapter: what they compare with, and what they say at the edges."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from lab import ask, causes

from helpers.config import load_config
from helpers.diagnose.patient import Examination, Inapplicable
from helpers.diagnose.run_gates import CHECKPOINT_GATES, RUN_GATES, base_knows_its_concepts
from helpers.files import CONFIGS, write_text
from helpers.model.losses import NATIVE_WEIGHTS
from helpers.train.run import trained_parameters

REPORT = (
    "component,modules,parameters,share,grad_norm,B_norm,B_nonzero\n"
    "vision_encoder,24,98304,0.05,{vision}\n"
    "text_encoder,12,36864,0.02,{text}\n"
    "geometry_encoder,4,9000,0.01,,0.0,0.0\n"
    "total,40,144168,0.08,1.0,6.3,1.0\n"
)
MOVED, IDLE = "0.26,4.9,1.0", ",0.0,0.0"


@pytest.fixture
def records(tmp_path):
    """A run folder as far as records go: two validations, the better one kept, no adapter."""
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile="tiny")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    terms = {name: 0.1 for name in NATIVE_WEIGHTS}
    total = sum(NATIVE_WEIGHTS[name] * value for name, value in terms.items())
    log = [
        {"step": 1, "epoch": 0.5, "loss": total, **terms},
        {"step": 2, "epoch": 1.0, "eval_loss": 3.0, "eval_cgF1": 0.4},
        {"step": 4, "epoch": 2.0, "eval_loss": 1.0, "eval_cgF1": 0.1},
    ]
    pd.DataFrame(log).to_csv(tmp_path / "curves.csv", index=False)
    prompts = {"prompts": {"crack": 3}, "negatives": {}, "negatives_per_image": 0}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "adapter_report.csv").write_text(REPORT.format(vision=MOVED, text=MOVED))
    metrics = {
        "steps": 4,
        "epochs": 2.0,
        "best_step": 2,
        "selected_by": "cgF1",
        "valid": {},
        "train_loss": {"first": total, "last": total},
        "valid_loss": {"first": 3.0, "last": 1.0},
        "objects": {"train": 3},
        "notes": [],
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def change_metrics(run, **changes):
    path = run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_stopped_run_names_its_cause_and_an_interrupted_one_does_not(records):
    assert ask(RUN_GATES, "the run", records).status == "ok"
    (records / "metrics.json").unlink()
    result = ask(RUN_GATES, "the run", records)
    assert result.status == "not checked"
    assert "interrupted" in result.measured
    stopped = {"cause": "no_objects", "message": "0 objects in 20 steps", "where": "", "fix": ""}
    (records / "stopped.json").write_text(json.dumps(stopped))
    result = ask(RUN_GATES, "the run", records)
    assert causes(result) == {"no_objects"}
    assert "0 objects in 20 steps" in result.measured
    (records / "stopped.json").write_text(json.dumps(stopped | {"cause": None}))
    assert ask(RUN_GATES, "the run", records).status == "not checked"


def test_a_run_that_recorded_no_object_says_so(records):
    change_metrics(records, objects={"train": 0})
    result = ask(RUN_GATES, "the run", records)
    assert causes(result) == {"no_objects"}
    assert "0 objects" in result.measured


def test_idle_components_are_told_from_idle_adapters(records):
    change_metrics(records, objects={"train": 3})
    assert ask(RUN_GATES, "learning", records).status == "ok"
    path = records / "adapter_report.csv"
    for vision, text, confidence in ((MOVED, IDLE, 0.8), (IDLE, IDLE, 1.0)):
        path.write_text(REPORT.format(vision=vision, text=text))
        (evidence,) = ask(RUN_GATES, "learning", records).evidence
        assert (evidence.cause, evidence.confidence) == ("adapter_at_zero", confidence)
    path.write_text(REPORT.format(vision=MOVED, text=IDLE))
    change_metrics(records, objects={"train": 0})  # then some components have nothing to learn
    assert ask(RUN_GATES, "learning", records).status == "ok"


def test_trained_parameters_are_compared(records):
    assert ask(RUN_GATES, "trained parameters", records).status == "not checked"
    change_metrics(records, trained_parameters={"all": 10, "lora": 10})
    assert ask(RUN_GATES, "trained parameters", records).status == "ok"
    change_metrics(records, trained_parameters={"all": 11, "lora": 10})
    assert causes(ask(RUN_GATES, "trained parameters", records)) == {"base_not_frozen"}


def test_trained_parameters_are_counted_from_the_optimiser():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2, bias=False)})
    whole = torch.nn.ModuleDict({"layer": model, "base": torch.nn.Linear(4, 1)})
    optimizer = torch.optim.AdamW(whole.parameters())
    assert trained_parameters(optimizer, whole) == {"all": 6 + 5, "lora": 6}
    optimizer = torch.optim.AdamW(model.parameters())
    assert trained_parameters(optimizer, whole) == {"all": 6, "lora": 6}


def test_questions_without_an_answer_are_not_asked(records):
    config = load_config(records / "config.yaml", overrides=["model.name=facebook/sam3"])
    with pytest.raises(Inapplicable, match="no picture with a known answer"):
        base_knows_its_concepts(SimpleNamespace(base_name=config.model.name))


def test_without_an_adapter_nothing_about_it_is_checked(records):
    for gate in CHECKPOINT_GATES:
        result = ask(CHECKPOINT_GATES, gate.name, records)
        assert result.status in ("not checked", "ok")
        assert result.evidence == ()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_run_and_base_compute_at_one_place_in_one_precision(run_copy, monkeypatch, precision):
    override = f"training.mixed_precision={precision}"
    config = load_config(run_copy / "config.yaml", overrides=[override])
    write_text(run_copy / "config.yaml", config.to_yaml())
    monkeypatch.setattr(Examination, "device", torch.device("meta"))
    subject = Examination(run_copy)
    adapted = subject.loaded.model.get_base_model()
    places = [
        {
            (name.replace(".base_layer", ""), tensor.device.type, tensor.dtype)
            for name, tensor in model.named_parameters()
            if ".lora_" not in name
        }
        for model in (adapted, subject.base[0])
    ]
    assert places[0] == places[1]
    assert {device for _, device, _ in places[1]} == {"meta"}
    assert (torch.bfloat16 in {dtype for *_, dtype in places[1]}) == (precision == "bf16")
