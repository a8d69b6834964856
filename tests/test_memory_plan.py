"""The plan: candidates, what fits, the time of an epoch, and the command."""

import json
from dataclasses import replace

import pytest
from tiny_random import RESOLUTION, save_tiny_base, tiny_config, tiny_run_config, write_dataset

from helpers import environment, memory_plan
from helpers.__main__ import main
from helpers.config import load_config
from helpers.errors import InputError
from helpers.memory_plan import GIB, RESERVE_GIB, plan
from helpers.paths import CONFIGS
from helpers.plan_ladder import changed, ladder, set_arguments
from helpers.plan_text import plan_text
from helpers.step_trace import StepLoad, StepTracer

CONFIG = CONFIGS / "crack_detection_config.yaml"
BATCH = ("training.batch_size=4", "training.gradient_accumulation_steps=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    save_tiny_base(path / "base")
    write_dataset(path / "data")
    return path


@pytest.fixture(scope="module")
def config(folder):
    return tiny_run_config(folder / "base", folder / "data", "data.num_negatives=2", *BATCH)


@pytest.fixture(scope="module")
def made(config):
    return plan(config, GIB * 64, rate=1e12)


def with_memory(made, gpu_bytes):
    """Return the plan for another GPU; only what fits depends on it."""
    fits = [one.step.peak_bytes + RESERVE_GIB * GIB <= gpu_bytes for one in made.candidates]
    pairs = zip(made.candidates, fits, strict=True)
    candidates = [replace(one, fits=fit) for one, fit in pairs]
    return replace(made, gpu_bytes=gpu_bytes, candidates=candidates)


def test_ladder_gives_up_one_thing_after_the_other(config):
    names, changes = zip(*ladder(config, tiny_config()), strict=True)
    assert names == (
        "as it is",
        "checkpointing",
        "3 x 4 images",
        "2 x 6 images",
        "1 x 12 images",
        "1 negatives",
        "32 px",
    )
    assert changes[0] == {}
    for less, more in zip(changes, changes[1:], strict=False):
        assert less.keys() <= more.keys()
    for one in changes:
        training = changed(config, one).training
        assert training.batch_size * training.gradient_accumulation_steps == 12


def test_ladder_of_a_config_that_has_given_up_all(folder):
    settings = ("training.gradient_checkpointing=true", "data.num_negatives=1")
    config = tiny_run_config(folder / "base", folder / "data", *settings, "model.resolution=32")
    assert [name for name, _ in ladder(config, tiny_config())] == ["as it is"]


def test_set_arguments_are_read_back_as_the_same_config(config):
    overrides = ("data.num_negatives=2", *BATCH)
    loaded = load_config(CONFIG, overrides=overrides)
    for _, changes in ladder(loaded, tiny_config()):
        again = load_config(CONFIG, overrides=(*overrides, *set_arguments(changes)))
        assert again == changed(loaded, changes)


def test_each_candidate_needs_less(made):
    peaks = [one.step.peak_bytes for one in made.candidates]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_time_is_that_of_the_operations(made):
    by_name = {one.name: one for one in made.candidates}
    assert by_name["as it is"].time_factor == 1
    assert 1 < by_name["checkpointing"].time_factor < 4 / 3
    same = by_name["checkpointing"].time_factor
    assert by_name["1 x 12 images"].time_factor == pytest.approx(same, rel=0.01)
    assert by_name["1 negatives"].time_factor < same
    assert by_name["32 px"].time_factor < by_name["1 negatives"].time_factor


def test_large_batches_lie_on_the_line_of_small_ones(config, made):
    step = StepTracer(tiny_config(), config).trace(
        StepLoad(4, 4 * made.counts.max_prompts, (made.counts.max_objects,) * 4)
    )
    told = made.candidates[0].step
    assert told.peak_bytes == pytest.approx(step.peak_bytes, rel=0.005)
    assert told.step_flops == step.step_flops


def test_epoch_by_hand(config, made):
    """Six images for training with 17 prompts in all, three for validation with four each."""
    tracer = StepTracer(tiny_config(), config)
    one, two = (tracer.trace(StepLoad(1, n, (1,))) for n in (1, 2))
    assert made.counts.mean_prompts * 6 == 17
    training = 6 * one.step_flops + (17 - 6) * (two.step_flops - one.step_flops)
    validation = 3 * (one.forward_flops + 3 * (two.forward_flops - one.forward_flops))
    assert made.epoch_flops == pytest.approx(training + validation)
    assert made.seconds_per_epoch == pytest.approx(made.epoch_flops / (1e12 * 0.3))


def test_the_first_that_fits_is_proposed(made, config):
    assert made.chosen is made.candidates[0]
    assert "fits as it is" in plan_text(made, config)
    third = made.candidates[2]
    tight = with_memory(made, third.step.peak_bytes + RESERVE_GIB * GIB)
    assert tight.chosen.name == third.name
    assert tight.to_json()["set"] == set_arguments(third.changes)
    assert f"--set {set_arguments(third.changes)[-1]}" in plan_text(tight, config)
    none = with_memory(made, GIB)
    assert none.chosen is None
    assert none.to_json()["set"] is None
    assert "nothing in this table fits" in plan_text(none, config)


def test_text_has_a_row_for_each_candidate(made, config):
    text = plan_text(made, config)
    for one in made.candidates:
        [row] = [line for line in text.splitlines() if line.removeprefix("+ ").startswith(one.name)]
        assert f"{one.time_factor:.2f}x" in row


def test_the_hub_is_not_needed_for_the_full_model(monkeypatch):
    def refuse(name, revision=None):
        raise InputError("the hub gave no access")

    monkeypatch.setattr(memory_plan, "base_config", refuse)
    config = load_config(CONFIG, profile="sam3")
    shape, [note] = memory_plan.base_shape(config)
    assert shape.vision_config.backbone_config.num_hidden_layers == 32
    assert "Sam3Config" in note
    other = changed(config, {"model.name": "someone/else"})
    with pytest.raises(InputError, match="no access"):
        memory_plan.base_shape(other)


def test_resolution_that_no_patch_divides(config):
    with pytest.raises(InputError, match="patch") as caught:
        plan(changed(config, {"model.resolution": RESOLUTION + 1}), GIB)
    assert str(RESOLUTION) in caught.value.fix


def arguments(folder, *more):
    settings = (f"model.name={folder / 'base'}", f"model.resolution={RESOLUTION}", "lora.rank=4")
    sets = [part for one in settings for part in ("--set", one)]
    return ["plan", "--config", str(CONFIG), "--profile", "tiny", *sets, *more]


def test_command(folder, capsys):
    data = ("--data", str(folder / "data"), "--json")
    status = main(arguments(folder, *data, "--gpu-memory", "4", "--tflops", "2"))
    document = json.loads(capsys.readouterr().out)
    assert status == 0
    assert document["fits"]
    assert document["set"] == []
    assert document["matmul_rate"] == 2e12
    assert document["prompts"]["train_images"] == 6
    assert document["seconds_per_epoch"] > 0
    names = [one["name"] for one in document["candidates"]]
    assert names[:2] == ["as it is", "checkpointing"]


def test_command_when_nothing_fits(folder, capsys):
    nowhere = ("--data", str(folder / "nowhere"))
    assert main(arguments(folder, *nowhere, "--gpu-memory", "1", "--tflops", "2")) == 1
    text = capsys.readouterr().out
    assert "nothing in this table fits" in text
    assert "time of an epoch: unknown" in text


def test_command_needs_to_know_the_gpu(folder, capsys, monkeypatch):
    monkeypatch.setattr(environment, "device", lambda: {"device": "cpu", "memory_gib": None})
    assert main(arguments(folder)) == 2
    assert "--gpu-memory 16" in capsys.readouterr().err
    assert main(arguments(folder, "--gpu-memory", "0")) == 2
    assert main(arguments(folder, "--gpu-memory", "4", "--tflops", "-1")) == 2
    assert "above 0" in capsys.readouterr().err
