"""Faults of the adapter and of what is kept and loaded of it, to be planted on purpose.

Each wraps one function of the pipeline for a while, or edits the files of a finished run; see
`helpers.planting`.
"""

from __future__ import annotations

from contextlib import contextmanager

from safetensors.torch import save_file
from transformers import Sam3Model

from helpers import adapter_targets, adapters, trainer
from helpers.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from helpers.files import read_json, write_json
from helpers.planting import Fault, replaced, replaced_method

ONE_EPOCH, THREE_EPOCHS = ("scale.num_epochs=0.02",), ("scale.num_epochs=0.06",)
"""Of the 50 epochs that the config asks for."""
COARSE_STEP = 0.1


@contextmanager
def _flag_without_effect():
    original = adapter_targets.enabled_components

    def enabled_components(lora):
        return [name for name in original(lora) if name != "text_encoder"]

    with replaced("adapter_targets.enabled_components", enabled_components):
        yield


@contextmanager
def _names_of_another_model():
    pattern, modules = adapter_targets.target_pattern, adapter_targets.target_modules

    def only_mlp(lora):
        return lora.model_copy(update={"target_modules": ("fc1", "fc2")})

    with (
        replaced("adapter_targets.enabled_components", lambda lora: ["vision_encoder"]),
        replaced("adapter_targets.target_pattern", lambda lora: pattern(only_mlp(lora))),
        replaced(
            "adapter_targets.target_modules", lambda model, lora: modules(model, only_mlp(lora))
        ),
    ):
        yield


def _requires_grad_changed(change):
    """Return a patch that calls ``change(name, parameter)`` after LoRA was put on."""

    @contextmanager
    def patch():
        original = adapters.add_lora

        def add_lora(model, lora):
            peft_model = original(model, lora)
            for name, parameter in peft_model.named_parameters():
                change(name, parameter)
            return peft_model

        with replaced("adapters.add_lora", add_lora):
            yield

    return patch


def _freeze_b(name, parameter):
    if ".lora_B" in name:
        parameter.requires_grad_(False)


@contextmanager
def _text_features_detached():
    original = Sam3Model.get_text_features

    def get_text_features(self, *args, **kwargs):
        features = original(self, *args, **kwargs)
        features.pooler_output = features.pooler_output.detach()
        return features

    with replaced_method(Sam3Model, "get_text_features", get_text_features):
        yield


@contextmanager
def _loader_without_effect():
    with replaced("adapters.load_adapter_weights", lambda model, weights, where: None):
        yield


@contextmanager
def _emptiest_state_kept():
    original = trainer.Sam3Trainer.evaluate

    def evaluate(self, *args, **kwargs):
        metrics = original(self, *args, **kwargs)
        return metrics | {"eval_selection": 1 - metrics["eval_max_score_present"]}

    with replaced_method(trainer.Sam3Trainer, "evaluate", evaluate):
        yield


def _rename_keys(rename):
    """Return what renames the keys in the adapter file of a run."""

    def spoil_run(run):
        weights = {rename(key): tensor for key, tensor in read_adapter_weights(run).items()}
        save_file(weights, run / WEIGHTS_FILE, metadata={"format": "pt"})

    return spoil_run


def _round_weights(run):
    """Save the adapter with few distinct values."""
    weights = {
        key: (tensor / COARSE_STEP).round() * COARSE_STEP
        for key, tensor in read_adapter_weights(run).items()
    }
    save_file(weights, run / WEIGHTS_FILE, metadata={"format": "pt"})


def _halve_alpha(run):
    """Save the adapter with half of its scale."""
    config = read_json(run / CONFIG_FILE, fix="")
    write_json(run / CONFIG_FILE, config | {"lora_alpha": config["lora_alpha"] / 2})


CHECKPOINT_FAULTS = {
    "flag without effect": Fault(
        "lora_elsewhere",
        "apply_to_text_encoder is true, but no module of the text encoder gets LoRA",
        "as many parameters are trained as with the flag off; the new word stays unknown",
        settings=ONE_EPOCH,
        patch=_flag_without_effect,
    ),
    "names of another model": Fault(
        "lora_elsewhere",
        "the target names match nothing but the MLPs of the vision encoder",
        "a fraction of the parameters is trained; the new word stays unknown",
        settings=ONE_EPOCH,
        patch=_names_of_another_model,
    ),
    "lora b frozen": Fault(
        "adapter_at_zero",
        "lora_B receives no gradient and stays zero",
        "outputs are those of the base, bit by bit; the loss does not fall",
        settings=ONE_EPOCH,
        patch=_requires_grad_changed(_freeze_b),
    ),
    "text features detached": Fault(
        "adapter_at_zero",
        "the text features are detached, so the LoRA of the text encoder receives no gradient",
        "the loss falls because other components learn; every B of the text encoder is zero",
        settings=ONE_EPOCH,
        patch=_text_features_detached,
    ),
    "base unfrozen": Fault(
        "base_not_frozen",
        "all weights of the base are trained besides LoRA",
        "good validation in training, another model after loading the adapter",
        settings=ONE_EPOCH,
        patch=_requires_grad_changed(lambda name, parameter: parameter.requires_grad_(True)),
    ),
    "loader without effect": Fault(
        "weights_not_loaded",
        "the loader loads nothing and says nothing",
        "good validation in training, the answers of the base afterwards: nothing is detected",
        patch=_loader_without_effect,
        trains=False,
    ),
    "keys with prefix": Fault(
        "adapter_keys",
        "the adapter was saved from a wrapped model, its keys begin with 'module.'",
        "the adapter cannot be loaded, or loads nothing where missing keys are only warned of",
        spoil_run=_rename_keys(lambda key: f"module.{key}"),
        trains=False,
    ),
    "keys of another version": Fault(
        "adapter_keys",
        "another version calls the mask decoder mask_head",
        "the adapter cannot be loaded, or loads in part where missing keys are only warned of",
        spoil_run=_rename_keys(lambda key: key.replace("mask_decoder", "mask_head")),
        trains=False,
    ),
    "alpha halved": Fault(
        "merge_changed_outputs",
        "the saved adapter is applied with half of its scale",
        "scores are lower than in the training's validation, though nothing was retrained",
        spoil_run=_halve_alpha,
        trains=False,
    ),
    "weights rounded": Fault(
        "merge_changed_outputs",
        f"the adapter was saved with weights rounded to steps of {COARSE_STEP}",
        "other detections than in the training's validation, though nothing was retrained",
        spoil_run=_round_weights,
        trains=False,
    ),
    "emptiest state kept": Fault(
        "wrong_checkpoint",
        "the state with the lowest scores is kept, as a loss without objects would choose",
        "the log shows a better state than the one that was kept",
        settings=THREE_EPOCHS,
        patch=_emptiest_state_kept,
    ),
}
