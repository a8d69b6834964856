"""All faults of the lab by name, and how one is planted, run and taken back.

A fault lies in files, in settings, or in a function of the pipeline that is replaced for a while.
"""

import importlib
import io
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

from helpers.config import GuardSection, load_config
from helpers.files import CONFIGS, DATA, WALL_CRACKS, read_json, write_json
from helpers.lab.spoil import SPOIL_DATA, read_split_wrong_keys
from helpers.model.lora import CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from helpers.model.prompted import base_of
from helpers.train.run import RUN_CONFIG
from helpers.train.training import train

GUARDS_OFF = tuple((f"guards.{name}", False) for name in GuardSection.model_fields)
LAB_SETTINGS = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
RUN_FOLDER, DATA_FOLDER = "run", "data"
COARSE_STEP = 0.1
DEEP = -30.0  # presence logit; the clamp is at -10


@dataclass(frozen=True)
class Fault:
    """One small fault, a row of ``data/faults.csv``, planted without a copy of the pipeline."""

    what: str  # is done
    symptom: str  # what a person sees of it from outside
    cause: str = ""  # key of `helpers.causes.CAUSES` that the diagnosis has to name, if it has to
    codes: tuple[str, ...] = ()  # findings of the data check of which it causes at least one
    settings: tuple[str, ...] = ()
    spoil_data: Callable[[Path], None] | None = None  # in the folder of a copy of the dataset
    patch: Callable[[], AbstractContextManager] | None = None  # while functions are perturbed
    spoil_run: Callable[[Path], None] | None = None  # in the folder of a finished run
    trains: bool = True  # False: a copy of a healthy run will do


HEALTHY = Fault("nothing is done", "nothing is seen")


@contextmanager
def planted(fault, folder, *, healthy=None, settings=(), data_dir=WALL_CRACKS, profile="tiny"):
    """Make a run with a fault in ``folder``, and yield it; meanwhile the fault is in the code too.

    ``healthy`` is the run folder that is copied for a fault that need not train; ``settings`` come
    before those of the fault. Training may have been stopped by the fault: the run is unfinished then.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / RUN_FOLDER
    with nullcontext() if fault.patch is None else fault.patch():
        if fault.spoil_data is not None:
            data_dir = shutil.copytree(data_dir, folder / DATA_FOLDER)
            fault.spoil_data(data_dir)
        if fault.trains:
            _train(fault, run, data_dir, settings, profile)
        else:
            shutil.copytree(healthy, run)
            if fault.spoil_data is not None:
                path = run / RUN_CONFIG
                load_config(path, overrides={"data.data_dir": data_dir}).save(path)
        if fault.spoil_run is not None:
            fault.spoil_run(run)
        yield run


def _train(fault, run, data_dir, settings, profile):
    """Train with everything off that would refuse the fault."""
    overrides = [("data.data_dir", data_dir), *LAB_SETTINGS, *settings]
    overrides += [*GUARDS_OFF, *fault.settings]
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile, overrides)
    try:
        with redirect_stderr(io.StringIO()):  # a note would give the fault away
            train(config, output_dir=run, overwrite=True, allow_empty=True, progress=False)
    except Exception:
        if fault == HEALTHY:
            raise
        # A fault may well stop the training; what it left is what the diagnosis gets to see.


@contextmanager
def replaced(name, wrap):
    """Put ``wrap(original)`` in the place of a function or method, such as "data.coco.read_split".

    Every module that was imported by then has the replacement, and every module imported since gets
    the original back.
    """
    room, file, *path, attribute = name.split(".")
    owner = reduce(getattr, path, importlib.import_module(f"helpers.{room}.{file}"))
    original = getattr(owner, attribute)
    replacement = wrap(original)
    _swap(owner, attribute, original, replacement)
    try:
        yield original
    finally:
        _swap(owner, attribute, replacement, original)


def _swap(owner, attribute, old, new):
    setattr(owner, attribute, new)
    modules = [module for name, module in sys.modules.items() if name.startswith("helpers.")]
    for module in modules:
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)


def _result_changed(name, change):
    """Make a ``patch`` after which ``change`` modifies what a function returns."""

    def wrap(original):
        return lambda *args, **kwargs: change(original(*args, **kwargs))

    return partial(replaced, name, wrap)


@contextmanager
def _names_of_another_model():
    def only_mlp(original):  # the section of LoRA is the last argument
        names = {"target_modules": ("fc1", "fc2")}
        return lambda *args: original(*args[:-1], args[-1].model_copy(update=names))

    with (
        replaced("model.lora.enabled_components", lambda _: lambda lora: ["vision_encoder"]),
        replaced("model.lora.target_pattern", only_mlp),
        replaced("model.lora.target_modules", only_mlp),
    ):
        yield


def _without_masks(targets):
    return targets | {name: torch.zeros_like(targets[name]) for name in ("masks", "mask_valid")}


def _without_objects(targets):
    return {name: values[:0] for name, values in targets.items()}


def _without_text_encoder(names):
    return [name for name in names if name != "text_encoder"]


def _freeze_b(peft_model):
    for name, parameter in peft_model.named_parameters():
        if ".lora_B" in name:
            parameter.requires_grad_(False)
    return peft_model


def _detach_pooled(features):
    features.pooler_output = features.pooler_output.detach()
    return features


def _scores_unweighted(original):
    no_scores = dict.fromkeys(("loss_ce", "presence_loss"), 0.0)
    return lambda terms, weights: original(terms, weights | no_scores)


def _presence_pushed_down(original):
    """Pull the presence logit far below its clamp; the value of the loss stays as it is."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        raw_logits = []
        head = base_of(self.model).detr_decoder.presence_head
        handle = head.register_forward_hook(lambda *call: raw_logits.append(call[-1]))
        try:
            loss = original(self, model, inputs, *args, **kwargs)
        finally:
            handle.remove()
        push = 100 * sum(torch.relu(logits - DEEP).mean() for logits in raw_logits)
        return loss + push - push.detach()

    return compute_loss


def _drop_finest_level(repeated):
    finest, *others = repeated.fpn_hidden_states
    return replace(repeated, fpn_hidden_states=(torch.zeros_like(finest), *others))


def _zero_decoder(loaded):
    for parameter in loaded[0].detr_decoder.parameters():
        torch.nn.init.zeros_(parameter)
    return loaded


def _weights_changed(change):
    """Make a ``spoil_run`` that saves ``change(key, tensor)`` for each tensor of the adapter."""

    def spoil_run(run):
        weights = dict(change(key, tensor) for key, tensor in read_adapter_weights(run).items())
        save_file(weights, run / WEIGHTS_FILE, metadata={"format": "pt"})

    return spoil_run


def _halve_alpha(run):
    config = read_json(run / CONFIG_FILE, fix="")
    write_json(run / CONFIG_FILE, config | {"lora_alpha": config["lora_alpha"] / 2})


PATCHES = {
    "wrong keys": partial(
        replaced, "data.coco.read_split", lambda _: lambda *args: read_split_wrong_keys(*args)
    ),
    "masks swallowed": _result_changed("data.dataset.object_targets", _without_masks),
    "emptied by a transform": _result_changed("data.dataset.object_targets", _without_objects),
    "score weight zero": partial(replaced, "model.losses.weighted_sum", _scores_unweighted),
    "finest level dropped": _result_changed(
        "model.prompted.repeat_vision_embeds", _drop_finest_level
    ),
    "decoder zeroed": _result_changed("model.sam3.load_base", _zero_decoder),
    "presence at its clamp": partial(
        replaced, "train.trainer.Sam3Trainer.compute_loss", _presence_pushed_down
    ),
    "flag without effect": _result_changed("model.lora.enabled_components", _without_text_encoder),
    "names of another model": _names_of_another_model,
    "lora b frozen": _result_changed("model.lora.add_lora", _freeze_b),
    "text features detached": _result_changed(
        "model.prompted.Sam3Model.get_text_features", _detach_pooled
    ),
    "loader without effect": partial(
        replaced, "model.lora.load_adapter_weights", lambda _: lambda *args: None
    ),
}
"""Faults of the code that is run; each is a patient of a ward of `helpers.lab.clinic`."""

SPOIL_RUN = {
    "keys with prefix": _weights_changed(lambda key, tensor: (f"module.{key}", tensor)),
    "keys of another version": _weights_changed(
        lambda key, tensor: (key.replace("mask_decoder", "mask_head"), tensor)
    ),
    "alpha halved": _halve_alpha,
    "weights rounded": _weights_changed(
        lambda key, tensor: (key, (tensor / COARSE_STEP).round() * COARSE_STEP)
    ),
}


def _fault(row):
    """Join a row of the table of faults with what plants the fault."""
    return Fault(
        row.what,
        row.symptom,
        cause=row.cause,
        codes=tuple(row.codes.split()),
        settings=tuple(filter(None, row.settings.split("; "))),
        spoil_data=SPOIL_DATA.get(row.fault),
        patch=PATCHES.get(row.fault),
        spoil_run=SPOIL_RUN.get(row.fault),
        trains=row.trains == "yes",
    )


_TABLE = pd.read_csv(DATA / "faults.csv", dtype=str, keep_default_na=False)
_FAULTS = {row.fault: _fault(row) for row in _TABLE.itertuples()}
FAULTS = {name: fault for name, fault in _FAULTS.items() if fault.cause}
"""Name to fault, of those that the diagnosis has to name."""
LESSON_FAULTS = {name: _FAULTS[name] for name in _TABLE["fault"][_TABLE["lesson"] == "01"]}
"""What lesson 01 plants in copies. The last one agrees with itself in every number: only eyes find it."""
