"""LoRA on SAM3 through PEFT: where it sits, and saving and loading it without silent gaps."""

import re
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.errors import InputError, explain
from helpers.files import file_digest, read_json, staged_folder, write_json
from helpers.model.prompted import base_of
from helpers.model.sam3 import base_fingerprint, refuse_lfs_pointer

COMPONENTS = {
    "vision_encoder": ("vision_encoder",),
    # The tower's own text_projection is left out: CLIP has it, SAM3 never uses its result.
    # The text_projection beside the tower is the one that leads to the DETR encoder.
    "text_encoder": ("text_encoder.text_model", "text_projection"),
    "geometry_encoder": ("geometry_encoder",),
    "detr_encoder": ("detr_encoder",),
    "detr_decoder": ("detr_decoder",),
    "mask_decoder": ("mask_decoder",),
}
"""Component of a config flag ``apply_to_<component>``: the module names it covers."""
WORD_PARTS = {"text_encoder", "detr_encoder"}  # where a new word can be learned
# The output projection is `out_proj` in the text tower and `o_proj` elsewhere.
SPELLINGS = {"out_proj": ("out_proj", "o_proj"), "o_proj": ("out_proj", "o_proj")}

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"
# Largest alpha / rank that is taken for a setting rather than for damage; the usual is 1 or 2.
MAX_SCALE = 1e4
PLAIN_CLASS = {
    "base_model_class": "Sam3Model",
    "parent_library": "transformers.models.sam3.modeling_sam3",
}
_NAME_A_RUN = "name the folder of a finished run"
_RESTORE = "restore the file or train again"


def enabled_components(lora):
    """List the components whose flag is true, in the order of `COMPONENTS`."""
    return [name for name in COMPONENTS if getattr(lora, f"apply_to_{name}")]


def component_of(module_name):
    """Return the component a module belongs to, or None (scoring head, unused projection)."""
    for component, prefixes in COMPONENTS.items():
        if any(f"{module_name}.".startswith(f"{prefix}.") for prefix in prefixes):
            return component
    return None


def target_modules(model, lora):
    """Map each enabled component to the full names of its linear layers that get LoRA."""
    names, used = {component: [] for component in enabled_components(lora)}, set()
    for name, module in model.named_modules():
        targets = _targets_of(name, lora.target_modules)
        if targets and isinstance(module, nn.Linear) and component_of(name) in names:
            names[component_of(name)].append(name)
            used.update(targets)
    for target in lora.target_modules:
        if target not in used:
            message = f"'{target}' matches no linear layer in {', '.join(names) or 'any component'}"
            fix = _closest_fix(model, names, target)
            raise InputError(message, where="lora.target_modules", fix=fix)
    for component, modules in names.items():
        if not modules:
            message = f"none of {', '.join(lora.target_modules)} occurs in {component}"
            fix = "add a name that occurs there to lora.target_modules, or set the flag to false"
            raise InputError(message, where=f"lora.apply_to_{component}", fix=fix)
    return names


def lora_layers(model):
    """List the adapted layers as (name without PEFT's prefix, layer); empty without adapter."""
    modules = base_of(model).named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]


def _targets_of(module_name, targets):
    """List the configured names that a module's last name stands for."""
    last = module_name.rpartition(".")[2]
    return [name for name in targets if last in SPELLINGS.get(name, (name,))]


def target_pattern(lora):
    """Write the names that `target_modules` lists as one regular expression for PEFT."""
    names = dict.fromkeys(s for name in lora.target_modules for s in SPELLINGS.get(name, (name,)))
    last = "|".join(map(re.escape, names))
    prefixes = [p for component in enabled_components(lora) for p in COMPONENTS[component]]
    inside = "|".join(re.escape(prefix) for prefix in prefixes)
    whole = [re.escape(prefix) for prefix in prefixes if prefix in names]
    return "|".join([rf"({inside})\.(.*\.)?({last})", *whole])


def _closest_fix(model, components, target):
    """Say where the name occurs, or which linear layers the enabled components have."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    elsewhere = {component_of(name) for name in linear if _targets_of(name, [target])} - {None}
    if elsewhere:
        return f"enable {' or '.join(sorted(elsewhere))}, where it occurs, or remove the name"
    known = {name.rpartition(".")[2] for name in linear if component_of(name) in components}
    return f"use names of the Hugging Face model: {', '.join(sorted(known))}"


def add_lora(model, lora):
    """Put LoRA on a base and freeze everything else.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3
        Changed in place.
    lora : helpers.config.LoraSection
        Rank, alpha, dropout, names and flags.

    Returns
    -------
    peft.PeftModel
        B is zero, so outputs equal those of the base until a step was taken. A is drawn from
        torch's global generator: set the seed before.
    """
    if lora_layers(model):
        raise InputError("the model already carries LoRA", fix="load the base again")
    if lora.apply_to_geometry_encoder and not model.native_prompt:
        text = "apply_to_geometry_encoder: without model.native_prompt text prompts never pass "
        text += "through the geometry encoder, so its LoRA gets no gradient and stays zero"
        warnings.warn(text, stacklevel=2)
    expected = {name for names in target_modules(model, lora).values() for name in names}
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    peft_model = _wrap(model, LoraConfig(**settings, target_modules=target_pattern(lora)))
    if others := {name for name, _ in lora_layers(peft_model)} ^ expected:
        message = f"PEFT and these settings differ in {len(others)} modules, such as {min(others)}"
        raise InputError(message, where="lora.target_modules", fix="name linear layers only")
    return peft_model


def save_adapter(model, folder, base_name, revision=None):
    """Write an adapter that PEFT can load on a plain `Sam3Model`, and what tells damage later."""
    config = deepcopy(model.peft_config[model.active_adapters[0]])
    config.inference_mode = True
    config.base_model_name_or_path = str(base_name)
    config.revision = revision
    base = base_of(model)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with staged_folder(folder) as staging:
        # PEFT would note our subclass here, which a plain PeftModel.from_pretrained cannot import.
        config.save_pretrained(staging, auto_mapping_dict=PLAIN_CLASS)
        write_tensors(staging / WEIGHTS_FILE, weights)
        identity = {
            "name": str(base_name),
            "revision": revision,
            "resolution": base.resolution,
            "native_prompt": base.native_prompt,
            "fingerprint": base_fingerprint(base),
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "weights_sha256": file_digest(staging / WEIGHTS_FILE),
        }
        write_json(staging / BASE_FILE, identity)


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file; InputError if the disk is full."""
    fix = "make room on the disk, or name another folder"
    with explain(SafetensorError, "cannot be written", where=path, fix=fix):
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})


def load_adapter(model, folder, *, lora=None, is_trainable=False):
    """Put a saved adapter on its base, completely or not at all, with the prompts of its training."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, fix=_NAME_A_RUN)
    path = folder / CONFIG_FILE
    content = read_json(path, fix=_NAME_A_RUN)
    weights = read_adapter_weights(folder)
    identity = folder / BASE_FILE
    saved = read_json(identity, fix="save the adapter again") if identity.is_file() else {}
    expected = saved if lora is None else {"r": lora.rank, "lora_alpha": lora.alpha}
    check_config(content, expected, path)
    # An imported adapter knows its base by name only: its fingerprint is null.
    if saved and saved.get("fingerprint", "") not in (None, base_fingerprint(model)):
        raise _another_base(folder, "the weights of this base differ", saved.get("name"))
    base_of(model).config.native_prompt = bool(saved.get("native_prompt"))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = None  # it is where the writer had the base
        peft_model = _wrap(model, config)
    except Exception as error:  # PEFT raises what its many settings happen to break
        raise _another_base(path, f"{error!s:.200}") from error
    load_adapter_weights(peft_model, weights, folder)
    check_bytes(folder / WEIGHTS_FILE, saved)
    return peft_model.train() if is_trainable else peft_model.eval()


def load_adapter_weights(model, weights, folder):
    """Copy the tensors of a folder into a model with LoRA, refusing any that do not fit."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = {
        f"of {len(expected)} keys missing": expected.keys() - weights.keys(),
        "keys unexpected": weights.keys() - expected.keys(),
        "keys of another shape": {
            f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            for name, tensor in weights.items()
            if name in expected and tensor.shape != expected[name].shape
        },
    }
    if texts := [f"{len(k)} {text}, such as {min(k)}" for text, k in problems.items() if k]:
        raise _another_base(folder, "; ".join(texts))
    check_tensors(weights, Path(folder) / WEIGHTS_FILE)
    set_peft_model_state_dict(model, weights)


def check_tensors(tensors, path):
    """Refuse tensors that are no finite float32 numbers, naming file, key and value."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype} numbers ({tensor.layout}, {tensor.device})"
            raise InputError(f"{name} holds {kind}".replace("torch.", ""), where=path, fix=_RESTORE)
        broken = ~torch.isfinite(tensor.float())  # a float64 may be too large for it
        if broken.any():
            value, count = tensor[broken][0].item(), int(broken.sum())
            message = f"{name} holds {value} in {count} of {tensor.numel()} places"
            fix = "the training diverged or the file is damaged: train again with a lower "
            fix += "training.learning_rate, or restore the file"
            raise InputError(message, where=path, fix=fix)


def check_bytes(path, saved):
    """Refuse weights whose bytes are not those that `saved`, the content of base.json, tells of."""
    if saved.get("weights_sha256") not in (None, file_digest(path)):
        message = "its bytes are not those that were saved"
        fix = f"{_RESTORE}; if you changed it on purpose, remove weights_sha256 from {BASE_FILE}"
        raise InputError(message, where=path, fix=fix)


def read_adapter_weights(folder):
    """Read the tensors of ``adapter_model.safetensors`` onto the CPU, whatever their values."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"holds no {WEIGHTS_FILE}", where=folder, fix=_NAME_A_RUN)
    refuse_lfs_pointer(path)
    # safetensors raises a class of its own for damaged files.
    with explain(Exception, "is damaged", where=path, fix=_RESTORE):
        return load_file(path)


def _wrap(model, config):
    """Call PEFT, which asks transformers for an attribute under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def check_config(content, expected, path):
    """Refuse an adapter_config.json that is no LoRA, damaged, or not the one of the training."""
    kind, rank, alpha = (content.get(key) for key in ("peft_type", "r", "lora_alpha"))
    if kind != "LORA":
        raise InputError(f"is of type {kind!r}, expected 'LORA'", where=path, fix=_NAME_A_RUN)
    are_numbers = type(rank) is int and type(alpha) in (int, float)
    if not are_numbers or not 0 < alpha <= MAX_SCALE * rank:
        message = f"lora_alpha is {alpha!r:.100} and r {rank!r:.100}"
        raise InputError(message, where=path, fix=_RESTORE)
    for key in ("r", "lora_alpha"):
        if expected.get(key) not in (None, content[key]):
            message = f"{key} is {content[key]}, but the adapter was trained with {expected[key]:g}"
            raise InputError(message, where=path, fix=_RESTORE)


def _another_base(where, reason, name=None):
    """Build the one error for an adapter that does not belong to the base."""
    made_for = f" (it was made for {name})" if name else ""
    message = f"the adapter belongs to another base or LoRA setting{made_for}: {reason}"
    fix = "load the base it was trained on, with --base or --profile"
    return InputError(message, where=where, fix=fix)
