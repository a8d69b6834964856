import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from tiny_random import SHARED_RUN, tiny_run_config
from transformers import Sam3Model, TrainerCallback

from helpers.answers import answer_text
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.detect.predictor import Predictor
from helpers.errors import InputError
from helpers.model.lora import add_lora
from helpers.model.sam3 import load_base
from helpers.train.report import report
from helpers.train.run import last_checkpoint, load_run, read_history, read_run
from helpers.train.training import Sam3Trainer, train, training_arguments

FILES = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "base.json",
    "config.yaml",
    "prompts.json",
    "metrics.json",
    "curves.csv",
    "adapter_report.csv",
    "environment.json",
    "README.md",
    "checkpoints",
}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Return a run as `train` returns it, not as it is read back."""
    return train(config, output_dir=tmp_path_factory.mktemp("runs") / "finished")


def losses(history):
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


class StopAfter(TrainerCallback):
    """Stands in for a kill: stops without a word at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def without_objects(split):
    return replace(split, records=tuple(replace(r, objects=()) for r in split.records))


def test_run_folder_is_complete(finished):
    assert {path.name for path in finished.folder.iterdir()} == FILES
    assert load_config(finished.folder / "config.yaml") == finished.config
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    assert metrics == finished.metrics
    assert metrics["steps"] == 6
    assert metrics["epochs"] == 2
    assert metrics["objects"] == {"train": 7, "valid": 3}
    assert {"AP50", "cgF1", "max_score_present", "max_score_absent", "loss"} <= set(
        metrics["valid"]
    )
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert set(environment["packages"]) == {"torch", "transformers", "peft"}


def test_prompts_file_says_what_was_asked(finished):
    prompts = json.loads((finished.folder / "prompts.json").read_text())
    assert prompts["prompts"] == {"crack": 5}
    assert prompts["negatives"] == {"crack": 1, "joint": 6, "moss": 6, "dog": 6, "hole": 6}
    assert prompts["negatives_per_image"] == 3


def test_schedule_and_batches_are_those_of_the_config(finished, config):
    rates = [entry["learning_rate"] for entry in finished.history if "loss" in entry]
    assert len(rates) == 6  # 6 images, batch 1, accumulation 2, 2 epochs
    assert rates[0] == 0
    peak = config.effective_learning_rate
    assert rates[1] == pytest.approx(peak / config.effective_warmup_steps)


def test_every_term_is_logged_and_adds_up(finished):
    weights = {
        "loss_ce": 20,
        "presence_loss": 20,
        "loss_bbox": 5,
        "loss_giou": 2,
        "loss_mask": 200,
        "loss_dice": 10,
        "loss_semantic_seg": 20,
        "loss_semantic_dice": 30,
    }
    for entry in finished.history:
        if "loss" in entry:
            total = sum(
                weights[name.rpartition(".")[2]] * value
                for name, value in entry.items()
                if name.rpartition(".")[2] in weights
            )
            assert entry["loss"] == pytest.approx(total, rel=1e-5)
            assert "aux0.loss_giou" in entry


def test_every_module_learns(finished):
    report_table = finished.adapter
    assert report_table.loc["total", "B_nonzero"] == 1
    for component in ("vision_encoder", "text_encoder", "mask_decoder"):
        assert report_table.loc[component, "grad_norm"] > 0
    assert report_table.loc["detr_decoder", "modules"] == 0
    assert finished.metrics["notes"] == [] or "cgF1" in finished.metrics["notes"][0]


def test_loss_falls(config, tmp_path):
    longer = config.model_copy(
        update={"scale": config.scale.model_copy(update={"num_epochs": 0.3})}
    )
    result = train(longer, output_dir=tmp_path / "run")
    assert result.metrics["train_loss"]["last"] < 0.8 * result.metrics["train_loss"]["first"]


def test_loaded_run_predicts_what_the_live_one_predicts(finished, data_dir):
    image = data_dir / "test" / "test_0.png"
    loaded = load_run(finished.folder)
    loaded.model.to(finished.model.device)  # a GPU computes other digits than the CPU
    raw = [Predictor(r.model, r.processor).raw(image, ["crack"])[0] for r in (finished, loaded)]
    assert (raw[0].query_logits == raw[1].query_logits).all()
    assert (raw[0].mask_logits == raw[1].mask_logits).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_run_folder_is_a_plain_peft_adapter(finished, base):
    model = PeftModel.from_pretrained(Sam3Model.from_pretrained(base), finished.folder)
    ours = dict(finished.model.named_parameters())
    theirs = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert theirs
    for name, parameter in theirs.items():
        torch.testing.assert_close(parameter, ours[name].cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_resumed_run_equals_an_uninterrupted_one(config, finished, tmp_path, stop):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(config, output_dir=folder, callbacks=[StopAfter(stop)])
    assert not (folder / "metrics.json").exists()
    with pytest.raises(InputError, match="interrupted"):
        load_run(folder)
    resumed = train(config, output_dir=folder, resume=True)
    assert losses(resumed.history) == pytest.approx(losses(finished.history))
    assert resumed.metrics == finished.metrics
    ours, theirs = resumed.model.state_dict(), finished.model.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def test_half_written_checkpoint_is_passed_over(config, finished, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(config, output_dir=folder, callbacks=[StopAfter(5)])
    half = folder / "checkpoints" / "checkpoint-6"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 2.')
    assert last_checkpoint(folder).name == "checkpoint-3"
    resumed = train(config, output_dir=folder, resume=True)
    assert losses(resumed.history) == pytest.approx(losses(finished.history))


def test_equal_seeds_give_equal_runs(finished, run_folder):
    again = read_run(run_folder)
    assert losses(again.history) == losses(finished.history)


def test_resuming_a_finished_run_returns_it(finished, config):
    written = (finished.folder / "metrics.json").stat().st_mtime_ns
    again = train(config, output_dir=finished.folder, resume=True)
    assert again.metrics == finished.metrics
    assert (finished.folder / "metrics.json").stat().st_mtime_ns == written


def test_resuming_with_other_settings_is_refused(finished, base, data_dir):
    other = tiny_run_config(base, data_dir, "training.weight_decay=0.5")
    with pytest.raises(InputError, match=r"training\.weight_decay was 0\.01 and is 0\.5"):
        train(other, output_dir=finished.folder, resume=True)


def test_nothing_to_resume_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="no run to resume"):
        train(config, output_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_is_not_overwritten_by_accident(finished, config):
    with pytest.raises(InputError, match="already holds a run"):
        train(config, output_dir=finished.folder)


def test_overwriting_removes_the_old_run_and_nothing_else(config, tmp_path):
    folder = tmp_path / "run"
    train(config, output_dir=folder)
    (folder / "mine.txt").write_text("keep")
    (folder / "checkpoints" / "checkpoint-99").mkdir()
    train(config, output_dir=folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "keep"
    assert not (folder / "checkpoints" / "checkpoint-99").exists()


def test_no_object_is_refused_unless_wanted(config, data_dir, tmp_path):
    empty = {
        f"{name}_split": without_objects(read_split(data_dir, folder))
        for name, folder in (("train", "train"), ("val", "valid"))
    }
    with pytest.raises(InputError, match="no object of 6 images reaches the loss"):
        train(config, output_dir=tmp_path / "run", **empty)
    assert not (tmp_path / "run").exists()
    result = train(config, output_dir=tmp_path / "run", allow_empty=True, **empty)
    assert result.metrics["objects"] == {"train": 0, "valid": 0}
    assert result.metrics["best_step"] is None
    assert "never rose above 0" in result.metrics["notes"][0]
    assert load_run(tmp_path / "run").prompts["prompts"] == {}


def test_early_loss_without_objects_is_the_softplus_of_the_logits(base, data_dir, tmp_path):
    config = tiny_run_config(
        base, data_dir, "loss.variant=early", "data.num_negatives=0", "data.prompt=object"
    )
    empty = {
        f"{name}_split": without_objects(read_split(data_dir, folder))
        for name, folder in (("train", "train"), ("val", "valid"))
    }
    result = train(config, output_dir=tmp_path / "run", allow_empty=True, **empty)
    for entry in result.history:
        if "loss" in entry:
            assert entry["loss"] == pytest.approx(2 * entry["train_softplus_mean"], rel=1e-5)
    assert result.prompts["negatives"] == {"object": 6}


def test_doctored_split_is_what_is_trained_on(config, data_dir, tmp_path):
    split = read_split(data_dir, "train")
    half = replace(split, records=split.records[:2])
    result = train(config, output_dir=tmp_path / "run", train_split=half)
    assert result.metrics["objects"]["train"] == 3
    assert result.metrics["steps"] == 2


class FixedMetric(Sam3Trainer):
    """Gives cgF1 in place of what was measured."""

    values = ()

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        return metrics | {"eval_selection": self.values[round(self.state.epoch) - 1]}


@pytest.mark.parametrize(
    ("values", "step"), [((0.5, 0.2), 3), ((0.2, 0.5), 6), ((float("nan"),) * 2, None)]
)
def test_best_checkpoint_is_kept(config, tmp_path, monkeypatch, values, step):
    monkeypatch.setattr(
        "helpers.train.training.Sam3Trainer", type("Fixed", (FixedMetric,), {"values": values})
    )
    result = train(config, output_dir=tmp_path / "run")
    assert result.metrics["best_step"] == step
    kept = last_checkpoint(tmp_path / "run") if step is None else None
    kept = kept or tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
    saved = (kept / "adapter_model.safetensors").read_bytes()
    assert saved == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    judged = [entry for entry in result.history if "eval_loss" in entry]
    wanted = next((entry for entry in judged if entry["step"] == step), judged[-1])
    assert result.metrics["valid"]["loss"] == wanted["eval_loss"]


def test_validation_is_in_eval_mode_and_repeatable(config, base, data_dir, tmp_path):
    model, processor = load_base(base)
    peft_model = add_lora(model, config.lora)
    settings = {"resolution": model.resolution, "mask_size": model.mask_size, "prompt": None}
    datasets = [
        PromptDataset(read_split(data_dir, n), processor, **settings) for n in ("train", "valid")
    ]
    trainer = Sam3Trainer(
        config,
        model=peft_model,
        args=training_arguments(config, tmp_path),
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        data_collator=PromptCollator(processor),
    )
    peft_model.train()
    torch.manual_seed(0)
    first = trainer.evaluate()
    state = torch.get_rng_state()
    second = trainer.evaluate()
    assert not peft_model.training
    assert first["eval_loss"] == second["eval_loss"]
    assert torch.equal(state, torch.get_rng_state())


def test_only_adapter_parameters_are_optimised(config, base, data_dir, tmp_path):
    model, processor = load_base(base)
    peft_model = add_lora(model, config.lora)
    dataset = PromptDataset(
        read_split(data_dir, "train"), processor, resolution=56, mask_size=model.mask_size
    )
    trainer = Sam3Trainer(
        config,
        model=peft_model,
        args=training_arguments(config, tmp_path),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=PromptCollator(processor),
    )
    optimised = {
        id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]
    }
    lora = {id(p) for name, p in peft_model.named_parameters() if ".lora_" in name}
    assert optimised == lora


def test_activation_checkpointing_gives_the_same_losses(base, data_dir, tmp_path, finished):
    config = tiny_run_config(base, data_dir, *SHARED_RUN, "training.gradient_checkpointing=true")
    result = train(config, output_dir=tmp_path / "run")
    blocks = result.model.get_base_model().vision_encoder.backbone.layers
    assert all(block.gradient_checkpointing for block in blocks)
    assert losses(result.history) == pytest.approx(losses(finished.history), rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU draws other dropout in half precision")
def test_bf16_on_a_cpu_trains(base, data_dir, tmp_path, finished):
    config = tiny_run_config(base, data_dir, *SHARED_RUN, "training.mixed_precision=bf16")
    result = train(config, output_dir=tmp_path / "run")
    first, exact = losses(result.history)[1], losses(finished.history)[1]
    assert first == pytest.approx(exact, rel=0.05)
    assert first != exact
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_without_a_gpu_is_refused_before_anything_is_written(base, data_dir, tmp_path):
    config = tiny_run_config(base, data_dir, "training.mixed_precision=fp16")
    with pytest.raises(InputError, match="needs a GPU"):
        train(config, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workers_load_the_same_data(base, data_dir, tmp_path, finished):
    config = tiny_run_config(base, data_dir, *SHARED_RUN, "training.num_workers=1")
    result = train(config, output_dir=tmp_path / "run")
    assert losses(result.history) == pytest.approx(losses(finished.history))


class Failing(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("no memory"),
    ],
)
def test_full_memory_says_what_to_change(config, tmp_path, error):
    with pytest.raises(
        InputError, match=r"out of memory at step 1.*checkpointing.*batch_size.*train --dry-run"
    ):
        train(config, output_dir=tmp_path / "run", callbacks=[Failing(error)])


def test_other_runtime_errors_are_not_dressed_up(config, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        train(config, output_dir=tmp_path / "run", callbacks=[Failing(RuntimeError("a bug"))])


def test_loss_that_is_not_finite_names_the_image(config, tmp_path, monkeypatch):
    def infinite(outputs, targets, variant, divisors):
        return {"total": outputs["pred_logits"].sum() * float("inf")}

    monkeypatch.setattr("helpers.train.training.sam3_losses", infinite)
    with pytest.raises(InputError, match=r"train_\d.png: the loss is .*(inf|nan) at step 0"):
        train(config, output_dir=tmp_path / "run")


def test_warm_up_longer_than_the_run_is_noted(base, data_dir, tmp_path):
    config = tiny_run_config(base, data_dir, "training.warmup_steps=1000", "scale.warmup_steps=1.0")
    result = train(config, output_dir=tmp_path / "run")
    assert any("never reached its peak" in note for note in result.metrics["notes"])


def test_nothing_is_written_to_stdout(config, tmp_path, capfd):
    train(config, output_dir=tmp_path / "run", progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "train" in captured.err


def test_curves_file_is_the_log(finished):
    history = read_history(finished.folder)
    assert len(history) == len(finished.history)
    for read, logged in zip(history, finished.history, strict=True):
        assert read == pytest.approx(logged)
    table = pd.read_csv(finished.folder / "curves.csv")
    assert list(table)[:4] == ["step", "epoch", "loss", "eval_loss"]
    assert table["eval_loss"].notna().sum() == 2


def test_report_has_everything_in_both_forms(finished):
    content = report(read_run(finished.folder))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert len(content["checklist"]) > 5
    text = answer_text("report", content)
    for part in ("vision_encoder", "checklist", "AP50", "crack", "2 of 2 epochs"):
        assert part in text


def test_the_commit_of_a_base_on_the_hub_is_recorded_and_kept(
    base, data_dir, tmp_path, monkeypatch
):
    from helpers.model import sam3
    from helpers.train import training

    asked, commit, original = [], "0123abcd" * 5, sam3._load_part

    def from_hub(source, cls, options):  # as if `base` were a name on the hub
        asked.append((cls.__name__, options.get("revision")))
        options = {key: value for key, value in options.items() if key != "revision"}
        loaded = original(source, cls, options)
        if cls.__name__ == "Sam3Config":
            loaded._commit_hash = commit
        return loaded

    monkeypatch.setattr(sam3, "_load_part", from_hub)
    config = tiny_run_config(base, data_dir)
    stopping = Failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        training.train(config, output_dir=tmp_path / "run", callbacks=[stopping])
    assert {revision for name, revision in asked if name == "PromptedSam3"} == {commit}
    asked.clear()
    monkeypatch.setattr(sam3, "newest_revision", lambda name: "another")
    result = training.train(config, output_dir=tmp_path / "run", resume=True)
    assert {revision for name, revision in asked if name == "PromptedSam3"} == {commit}
    assert result.config.model.revision == commit
    for name in ("base.json", "adapter_config.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["revision"] == commit
    assert commit in (tmp_path / "run" / "README.md").read_text()
    asked.clear()
    load_run(tmp_path / "run")
    assert ("PromptedSam3", commit) in asked


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 1"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_or_read_only_disk_is_one_sentence_and_the_run_goes_on(
    config, run_folder, tmp_path, error
):
    with pytest.raises(InputError, match="could not be written") as caught:
        train(config, output_dir=tmp_path / "run", callbacks=[Failing(error)])
    assert "--resume" in caught.value.fix
    (tmp_path / "run" / ".partial-config.yaml").write_text("half")
    (tmp_path / "run" / ".partial-x").mkdir()
    resumed = train(config, output_dir=tmp_path / "run", resume=True)
    assert losses(resumed.history) == losses(read_run(run_folder).history)
    assert not list((tmp_path / "run").glob(".partial-*"))


def test_output_that_is_no_run_is_refused_and_untouched(config, data_copy):
    before = sorted(data_copy.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not empty and holds no run"):
            train(config, output_dir=data_copy, overwrite=overwrite)
    assert sorted(data_copy.rglob("*")) == before


@pytest.mark.parametrize("empty", [[], None])
def test_boxes_alone_train_without_the_mask_decoder(base, data_copy, tmp_path, capsys, empty):
    for path in data_copy.rglob("*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation.pop("segmentation")
            annotation |= {} if empty is None else {"segmentation": empty}
        path.write_text(json.dumps(content))
    config = tiny_run_config(base, data_copy)
    result = train(config, output_dir=tmp_path / "run")
    assert "nothing to learn from" in capsys.readouterr().err
    assert not result.config.lora.apply_to_mask_decoder
    assert result.adapter.loc["mask_decoder", "modules"] == 0
    assert result.metrics["steps"] == 6
    assert train(config, output_dir=tmp_path / "run", resume=True).metrics == result.metrics
    only = {
        f"lora.{key}": key == "apply_to_mask_decoder" for key, _ in config.lora if "apply_" in key
    }
    with pytest.raises(InputError, match="nothing to learn from"):
        train(config.replace(only), output_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_is_not_resumed_on_other_data(config, data_copy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config, output_dir=tmp_path / "run", callbacks=[StopAfter(1)])
    moved = config.replace({"data.data_dir": str(data_copy)})
    path = data_copy / "train" / "_annotations.coco.json"
    path.write_text(path.read_text().replace('"crack"', '"fissure"'))
    with pytest.raises(InputError, match="other training data"):
        train(moved, output_dir=tmp_path / "run", resume=True)
