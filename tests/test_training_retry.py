import json
import re

import pytest
import torch
from builders import edit_coco
from tiny_random import tiny_run_config
from transformers import TrainerCallback

from helpers.__main__ import main
from helpers.answers import answer_text
from helpers.config import load_config
from helpers.errors import InputError
from helpers.files import write_text
from helpers.train.run import RUN_CONFIG, STOPPED_FILE
from helpers.train.training import (
    OutOfMemory,
    Sam3Trainer,
    dry_run,
    smaller_step,
    train,
    train_within_memory,
)


class SmallGpu(TrainerCallback):
    """Holds at most some images, with checkpointing twice as many."""

    def __init__(self, images, at_step=0):
        self.images, self.at_step, self.attempts = images, at_step, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        blocks = model.get_base_model().vision_encoder.backbone.layers
        checkpointing = bool(blocks[0].gradient_checkpointing)
        attempt = (
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            checkpointing,
        )
        if attempt not in self.attempts:
            self.attempts.append(attempt)
        if state.global_step >= self.at_step and attempt[0] > self.images * (1 + checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_smaller_steps_are_tried_until_one_fits(base, data_dir, tmp_path):
    gpu, said = SmallGpu(images=1), []
    config = tiny_run_config(
        base, data_dir, "training.batch_size=6", "training.gradient_accumulation_steps=1"
    )
    result = train_within_memory(
        config, output_dir=tmp_path / "run", callbacks=[gpu], on_retry=said.append
    )
    assert gpu.attempts == [(6, 1, False), (6, 1, True), (3, 2, True), (2, 3, True)]
    assert len(said) == 3
    assert "trying again with training.gradient_checkpointing=true" in said[0]
    assert "training.batch_size=2 training.gradient_accumulation_steps=3" in said[2]
    assert result.config.training.batch_size == 2
    assert load_config(tmp_path / "run" / RUN_CONFIG) == result.config
    assert result.config.data == config.data
    assert result.config.model == config.model.model_copy(update={"native_prompt": False})
    assert not (tmp_path / "run" / STOPPED_FILE).exists()


def test_what_never_fits_ends_with_the_advice(base, data_dir, tmp_path):
    gpu = SmallGpu(images=0)
    config = tiny_run_config(base, data_dir, "training.batch_size=2")
    with pytest.raises(OutOfMemory, match="train --dry-run"):
        train_within_memory(config, output_dir=tmp_path / "run", callbacks=[gpu])
    assert gpu.attempts == [(2, 2, False), (2, 2, True), (1, 4, True)]


def test_a_run_with_a_checkpoint_is_not_thrown_away(base, data_dir, tmp_path):
    gpu = SmallGpu(images=1, at_step=1)  # in the second epoch
    config = tiny_run_config(base, data_dir, "training.batch_size=4")
    with pytest.raises(OutOfMemory):
        train_within_memory(config, output_dir=tmp_path / "run", callbacks=[gpu])
    assert len(gpu.attempts) == 1
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    # and goes on from there with checkpointing, which changes no number
    config = tiny_run_config(
        base, data_dir, "training.batch_size=4", "training.gradient_checkpointing=true"
    )
    result = train_within_memory(config, output_dir=tmp_path / "run", resume=True)
    assert result.metrics["valid"]


def test_other_errors_are_not_retried(base, data_dir, tmp_path):
    config = tiny_run_config(base, data_dir)
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        train_within_memory(config, output_dir=tmp_path / "run")


def test_nothing_that_is_learned_from_is_changed(base, data_dir):
    config = tiny_run_config(
        base, data_dir, "training.batch_size=1", "training.gradient_checkpointing=true"
    )
    assert smaller_step(config) is None


def test_a_resumed_run_without_a_checkpoint_is_tried_again_smaller(base, data_dir, tmp_path):
    settings = ("training.batch_size=2", "training.gradient_accumulation_steps=1")
    config = tiny_run_config(base, data_dir, *settings, "training.gradient_checkpointing=true")
    gpu = SmallGpu(images=0.5)
    with pytest.raises(OutOfMemory):
        train(config, output_dir=tmp_path / "run", callbacks=[gpu])
    result = train_within_memory(config, output_dir=tmp_path / "run", resume=True, callbacks=[gpu])
    assert result.config.training.batch_size == 1
    assert result.config.training.gradient_accumulation_steps == 2


def test_dry_run_measures_the_fullest_batch_and_writes_nothing(config, data_dir, capsys, tmp_path):
    config = config.replace({"output.output_dir": str(tmp_path / "run")})
    path = write_text(tmp_path / "c.yaml", config.to_yaml())
    before = sorted(tmp_path.rglob("*")), sorted(data_dir.rglob("*"))
    assert main(["train", "--config", str(path), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (sorted(tmp_path.rglob("*")), sorted(data_dir.rglob("*"))) == before
    assert document["fits"] is True
    assert (document["images"], document["prompts"], document["objects"]) == (1, 4, 2)
    assert document["steps_per_epoch"] == 3
    assert document["peak_memory_bytes"] > 1e8
    assert 0 < document["seconds_per_step"]
    assert document["seconds_per_epoch"] == pytest.approx(3 * document["seconds_per_step"])


def test_dry_run_names_the_next_setting_where_memory_ends(config, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Sam3Trainer, "compute_loss", out_of_memory)
    result = dry_run(config)
    assert result["fits"] is False
    assert result["next"] == ["training.gradient_checkpointing=true"]
    assert "--set training.gradient_checkpointing=true" in answer_text("dry_run", result)
    everything = {
        "training.gradient_checkpointing": True,
        "data.num_negatives": 0,
        "model.resolution": 32,
        "training.gradient_accumulation_steps": 1,
    }
    assert dry_run(config.replace(everything))["next"] == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.update(annotations=[]), "no object reaches the loss"),
        (lambda c: [item.update(iscrowd=1) for item in c["annotations"]], "D10"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, float("inf"), 1]), "D41"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png: no such image"),
    ],
)
def test_dry_run_refuses_what_a_training_would(config, data_copy, change, part):
    edit_coco(data_copy, "train", change)
    with pytest.raises(InputError, match=re.escape(part)):
        dry_run(config.replace({"data.data_dir": str(data_copy)}))
