import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny_random import SHARED_RUN, tiny_run_config
from transformers import TrainerCallback

from helpers.__main__ import main
from helpers.config import GuardSection
from helpers.data.coco import read_split
from helpers.errors import InputError
from helpers.files import write_text
from helpers.model import losses
from helpers.train import training
from helpers.train.guards import ADAPTER_STEPS, OFF_IF_EMPTY, WINDOW, Guards, GuardStop
from helpers.train.run import read_history, read_run
from helpers.train.training import train

OFF = tuple(f"guards.{key}=false" for key in GuardSection.model_fields)


@pytest.fixture(scope="module")
def start(base, data_dir):
    """Train the random base for 2 epochs of 3 steps; options go to `train`."""

    def run(folder, *settings, **options):
        config = tiny_run_config(base, data_dir, *SHARED_RUN, *settings)
        return train(config, output_dir=folder, **options)

    return run


@pytest.fixture(scope="module")
def healthy(run):
    return run


def train_losses(run):
    return [entry["loss"] for entry in run.history if "loss" in entry]


def change_losses(monkeypatch, change):
    """Let ``change`` alter the terms that the loss returns."""
    original = training.sam3_losses
    monkeypatch.setattr(training, "sam3_losses", lambda *a, **k: change(original(*a, **k)))


def change_batch_loss(monkeypatch, change_inputs=None, change_loss=None):
    """Alter what the loss of a batch is computed from, or what is made of it."""
    original = training.Sam3Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = change_inputs(inputs) if change_inputs else inputs
        loss = original(self, model, inputs, *args, **kwargs)
        return change_loss(loss, model) if change_loss else loss

    monkeypatch.setattr(training.Sam3Trainer, "compute_loss", compute_loss)


def no_objects(monkeypatch):
    def empty(inputs):
        targets = [{name: value[:0] for name, value in t.items()} for t in inputs["targets"]]
        return inputs | {"targets": targets}

    change_batch_loss(monkeypatch, change_inputs=empty)


def zero_terms(*names):
    def plant(monkeypatch):
        change_losses(monkeypatch, lambda t: t | {name: 0 * t[name] for name in names})

    return plant


def scaled_total(factor):
    def plant(monkeypatch):
        change_losses(monkeypatch, lambda terms: terms | {"total": factor * terms["total"]})

    return plant


def no_gradient(monkeypatch):
    def detached(loss, model):
        return loss.detach() + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)

    change_batch_loss(monkeypatch, change_loss=detached)


def infinite_gradient(monkeypatch):
    # The root of zero is zero, its derivative is not finite.
    change_losses(monkeypatch, lambda t: t | {"total": t["total"] + (0 * t["loss_dice"]).sqrt()})


def infinite_outputs(monkeypatch):
    def box(inputs):
        inputs["targets"][0]["boxes_cxcywh"] *= torch.nan
        return inputs

    change_batch_loss(monkeypatch, change_inputs=box)


def clamped(monkeypatch):
    original = training.output_statistics
    shares = iter([0.1, 0.1, *[0.8] * 99])  # of batches, of which two make a step

    def output_statistics(outputs):
        share = torch.tensor(next(shares), device=outputs["pred_logits"].device)
        return original(outputs) | {"train_share_at_clamp": share}

    monkeypatch.setattr(training, "output_statistics", output_statistics)


def only_positive(monkeypatch):
    def positive(inputs):
        kept = [i for i, t in enumerate(inputs["targets"]) if len(t["boxes_cxcywh"])] or [0]
        rows = {"input_ids", "attention_mask", "image_index"}
        lists = {"targets", "queries"}
        changed = {key: inputs[key][kept] for key in rows}
        changed |= {key: [inputs[key][i] for i in kept] for key in lists}
        if not len(inputs["targets"][kept[0]]["boxes_cxcywh"]):  # the one image without objects
            shape = inputs["targets"][0]["masks"].shape[1:]
            target = {
                "boxes_cxcywh": torch.tensor([[0.5, 0.5, 0.2, 0.2]]),
                "masks": torch.ones(1, *shape, dtype=torch.uint8),
                "mask_valid": torch.tensor([True]),
            }
            changed["targets"] = [target]
        return inputs | changed

    change_batch_loss(monkeypatch, change_inputs=positive)


def heavy_term(monkeypatch):
    monkeypatch.setitem(losses.NATIVE_WEIGHTS, "loss_giou", 1e4)


ALL_IMAGES = r"train_\d.png, train_\d.png: the "
FAULTS = {
    "no_objects": ("no_objects", no_objects, "no_objects", "no object in the first"),
    "box_terms": (
        "box_and_mask_terms",
        zero_terms("loss_bbox", "loss_giou"),
        "no_objects",
        "objects arrived at step 0, but the box terms of the loss are 0",
    ),
    "mask_terms": (
        "box_and_mask_terms",
        zero_terms("loss_mask", "loss_dice"),
        "masks_lost",
        "masks arrived at step 0, but the mask terms of the loss are 0",
    ),
    "vanishing_loss": ("vanishing_loss", scaled_total(1e-6), "loss_weights", "loss averages .*e-0"),
    "adapter_at_zero": (
        "adapter_at_zero",
        no_gradient,
        "adapter_at_zero",
        "zero in vision_encoder, text_encoder, mask_decoder after",
    ),
    "loss": ("not_finite", scaled_total(torch.inf), "not_finite", f"{ALL_IMAGES}loss is nan"),
    "outputs": ("not_finite", infinite_outputs, "not_finite", ".png: the loss is nan"),
    "gradient": ("not_finite", infinite_gradient, "not_finite", f"{ALL_IMAGES}gradient is nan"),
    "at_clamp": ("at_clamp", clamped, "at_clamp", "of the logits .* 10% did at first"),
    "only_positive": (
        "only_positive_prompts",
        only_positive,
        "only_positive_prompts",
        "no absent prompt was asked of the first",
    ),
    "dominant_term": ("dominant_term", heavy_term, "loss_weights", "loss_giou is 9.*weighted loss"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_guard_stops_the_run_and_says_why(start, tmp_path, monkeypatch, name):
    key, plant, cause, message = FAULTS[name]
    plant(monkeypatch)
    alone = [one for one in OFF if not one.startswith(f"guards.{key}=")]
    with pytest.raises(GuardStop, match=message) as caught:
        start(tmp_path / "run", *alone)
    stop = caught.value
    reason = json.loads((tmp_path / "run" / "stopped.json").read_text())
    step = reason.pop("step")
    assert reason == {
        "cause": cause,
        "message": stop.message,
        "where": stop.where,
        "fix": stop.fix,
    }
    assert stop.cause == cause
    assert step <= 2 * WINDOW
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "curves.csv").exists() == (step > 0)
    with pytest.raises(InputError, match="the run was stopped"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"loss", "outputs", "gradient"}))
def test_key_turns_its_guard_off(start, tmp_path, monkeypatch, name):
    FAULTS[name][1](monkeypatch)
    result = start(tmp_path / "run", *OFF)
    assert result.metrics["steps"] == 6


@pytest.mark.parametrize("name", ["loss", "outputs", "gradient"])
def test_without_the_guard_numbers_that_are_not_finite_come_to_another_end(
    start, tmp_path, monkeypatch, name
):
    FAULTS[name][1](monkeypatch)
    with pytest.raises(InputError, match="matching cost is not finite") as caught:
        start(tmp_path / "run", *OFF)
    assert not isinstance(caught.value, GuardStop)
    reason = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert reason["cause"] is None
    assert "matching cost" in reason["message"]


def test_healthy_run_passes_and_its_numbers_do_not_change(start, healthy, tmp_path):
    assert healthy.metrics["steps"] == 6
    assert not (healthy.folder / "stopped.json").exists()
    unguarded = start(tmp_path / "run", *OFF)
    assert train_losses(unguarded) == train_losses(healthy)
    ours, theirs = healthy.model.state_dict(), unguarded.model.state_dict()
    assert all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


@pytest.mark.parametrize(
    "settings",
    [
        ("loss.variant=early",),
        ("loss.variant=early", "training.batch_size=4"),
        ("data.num_negatives=0",),  # the image without objects asks for an absent crack
        ("training.warmup_steps=1000", "scale.warmup_steps=1.0"),
        ("lora.apply_to_geometry_encoder=true",),
        ("training.mixed_precision=bf16",),
    ],
)
def test_legitimate_settings_pass(start, tmp_path, settings):
    steps = start(tmp_path / "run", *settings).metrics["steps"]
    assert steps >= WINDOW or "training.batch_size=4" in settings


def empty_splits(data_dir):
    return {
        f"{name}_split": replace(
            split, records=tuple(replace(r, objects=()) for r in split.records)
        )
        for name, folder in (("train", "train"), ("val", "valid"))
        for split in [read_split(data_dir, folder)]
    }


@pytest.mark.parametrize("variant", ["native", "early"])
def test_training_without_objects_on_purpose_passes(
    start, data_dir, tmp_path, monkeypatch, variant
):
    clamped(monkeypatch)
    settings = (f"loss.variant={variant}", "data.num_negatives=0", "data.prompt=object")
    empty = empty_splits(data_dir)
    result = start(tmp_path / "run", *settings, allow_empty=True, **empty)
    assert result.metrics["objects"]["train"] == 0
    assert set(OFF_IF_EMPTY) <= set(GuardSection.model_fields)


def test_positive_prompts_only_stop_at_the_first_step(start, data_dir, tmp_path):
    split = read_split(data_dir, "train")
    positive = replace(split, records=split.records[:-1])
    with pytest.raises(GuardStop, match="no absent prompt"):
        start(tmp_path / "run", "data.num_negatives=0", train_split=positive)
    off = ("data.num_negatives=0", "guards.only_positive_prompts=false")
    assert start(tmp_path / "off", *off, train_split=positive).metrics["steps"] == 6


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_resumed_run_passes_and_equals_an_uninterrupted_one(start, healthy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", callbacks=[StopAfter()])
    resumed = start(tmp_path / "run", resume=True)
    assert train_losses(resumed) == pytest.approx(train_losses(healthy))


def test_stopped_run_can_be_resumed_once_mended(start, healthy, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        clamped(patch)
        with pytest.raises(GuardStop):
            start(tmp_path / "run")
    assert len(read_history(tmp_path / "run")) >= 3
    resumed = start(tmp_path / "run", "guards.at_clamp=false", resume=True)
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert train_losses(resumed) == pytest.approx(train_losses(healthy))


def test_overwriting_removes_the_reason(start, tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_objects(patch)
        with pytest.raises(GuardStop):
            start(folder)
    (folder / "thresholds.json").write_text("{}")  # chosen for the weights that go
    start(folder, overwrite=True)
    assert not (folder / "stopped.json").exists()
    assert not (folder / "thresholds.json").exists()


def test_command_line_says_it_in_one_line(base, data_dir, tmp_path, monkeypatch, capsys):
    no_objects(monkeypatch)
    path = tmp_path / "config.yaml"
    write_text(path, tiny_run_config(base, data_dir).to_yaml())
    status = main(["train", "--config", str(path), "--output", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1].startswith("error: guards.no_objects: no object")


def counts_of(*num_objects):
    """Return the table of `count_objects`, one image per argument, given per query."""
    rows = [(f"{i}", n) for i, image in enumerate(num_objects) for n in image]
    return pd.DataFrame(rows, columns=["image_id", "num_objects"])


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        # A fair coin falls 20 times on one side with a probability of less than a millionth.
        ([(1,), (0,)] * 50, {"objects": 20, "absent": 20}),
        ([(1, 0)] * 50, {"objects": 1, "absent": 1}),
        ([(1,)] * 50, {"objects": 1, "absent": 0}),
        ([(1,)] + [(0,)] * 99, {"objects": 100, "absent": 3}),
    ],
)
def test_patience_depends_on_how_rare_a_thing_is(base, data_dir, images, expected):
    watch = Guards(tiny_run_config(base, data_dir), counts_of(*images))
    assert watch._images_until == expected


def test_adapter_is_judged_within_the_first_steps():
    assert ADAPTER_STEPS <= WINDOW
