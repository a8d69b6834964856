"""LoRA on SAM3 through PEFT: where it sits, and saving and loading it without silent gaps.

The seed's flags and names are translated into the modules of the Hugging Face model. What they
translate to is checked twice: before PEFT runs, against the model, and after, against what PEFT
adapted.
"""

from __future__ import annotations

import re
import warnings
from copy import deepcopy
from pathlib import Path

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.errors import InputError
from helpers.files import read_json, staged_folder, write_json
from helpers.model.sam3 import base_fingerprint

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

SPELLINGS = {"out_proj": ("out_proj", "o_proj"), "o_proj": ("out_proj", "o_proj")}
"""The output projection is ``out_proj`` in the text tower and ``o_proj`` elsewhere."""


def enabled_components(lora):
    """List the components whose flag is true, in the order of `COMPONENTS`."""
    return [name for name in COMPONENTS if getattr(lora, f"apply_to_{name}")]


def target_modules(model, lora):
    """Find the linear layers that a configuration adapts.

    Parameters
    ----------
    model : transformers.Sam3Model
        On any device, ``meta`` included.
    lora : helpers.config.LoraSection
        ``target_modules`` and the ``apply_to_*`` flags are read.

    Returns
    -------
    dict of str to list of str
        Full module names for each enabled component.

    Raises
    ------
    InputError
        If a name matches no linear layer in any enabled component, or an enabled component has
        no layer of any of the names. A name need not occur in *every* enabled component: the mask
        decoder has no ``fc1``.
    """
    found, used = {}, set()
    for component in enabled_components(lora):
        found[component] = []
        for name, module in model.named_modules():
            targets = _targets_of(name, lora.target_modules)
            if targets and isinstance(module, nn.Linear) and component_of(name) == component:
                found[component].append(name)
                used.update(targets)
    listed = ", ".join(found)
    for target in lora.target_modules:
        if target not in used:
            raise InputError(
                f"'{target}' matches no linear layer in {listed or 'any component'}",
                where="lora.target_modules",
                fix=_closest_fix(model, found, target),
            )
    for component, names in found.items():
        if not names:
            raise InputError(
                f"none of {', '.join(lora.target_modules)} occurs in {component}",
                where=f"lora.apply_to_{component}",
                fix="add a name that occurs there to lora.target_modules, or set the flag to false",
            )
    return found


def component_of(module_name):
    """Return the component a module belongs to, or None (scoring head, unused projection)."""
    for component, prefixes in COMPONENTS.items():
        for prefix in prefixes:
            if module_name == prefix or module_name.startswith(f"{prefix}."):
                return component
    return None


def lora_layers(model):
    """List the adapted layers of a model.

    Parameters
    ----------
    model : peft.PeftModel or helpers.model.sam3.PromptedSam3

    Returns
    -------
    list of tuple
        ``(name, layer)``; the name is that of the module in the base, without PEFT's prefix.
        Empty for a base without adapter.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return [
        (name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)
    ]


def _targets_of(module_name, targets):
    """List the configured names that a module's last name stands for."""
    last = module_name.rpartition(".")[2]
    return [name for name in targets if last in SPELLINGS.get(name, (name,))]


def target_pattern(lora):
    """Write names and components as the one regular expression that PEFT matches in full.

    Parameters
    ----------
    lora : helpers.config.LoraSection

    Returns
    -------
    str
        Matches exactly the names that `target_modules` lists.
    """
    names = dict.fromkeys(
        spelling for name in lora.target_modules for spelling in SPELLINGS.get(name, (name,))
    )
    last = "|".join(map(re.escape, names))
    prefixes = [p for component in enabled_components(lora) for p in COMPONENTS[component]]
    inside = "|".join(re.escape(prefix) for prefix in prefixes)
    whole = [re.escape(prefix) for prefix in prefixes if prefix in names]
    return "|".join([rf"({inside})\.(.*\.)?({last})", *whole])


def _closest_fix(model, found, target):
    """Say which linear layers the enabled components do have, or where the name occurs."""
    elsewhere = sorted(
        {
            component_of(name)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _targets_of(name, [target])
        }
        - {None}
    )
    if elsewhere:
        return f"enable {' or '.join(elsewhere)}, where it occurs, or remove the name"
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and component_of(name) in found
        }
    )
    return f"use names of the Hugging Face model: {', '.join(known)}"


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"

_PLAIN_CLASS = {
    "base_model_class": "Sam3Model",
    "parent_library": "transformers.models.sam3.modeling_sam3",
}


def add_lora(model, lora):
    """Put LoRA on a base and freeze everything else.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3
        Changed in place: PEFT wraps its linear layers.
    lora : helpers.config.LoraSection
        Rank, alpha, dropout, names and flags.

    Returns
    -------
    peft.PeftModel
        B is zero, so outputs equal those of the base until a step was taken. A is drawn from
        torch's global generator: set the seed before.

    Raises
    ------
    InputError
        See `target_modules`; also when a model already carries an adapter.

    Warns
    -----
    UserWarning
        With the geometry encoder enabled: text prompts never pass through it, so its LoRA gets no
        gradient and stays zero.
    """
    if lora_layers(model):
        raise InputError("the model already carries LoRA", fix="load the base again")
    if lora.apply_to_geometry_encoder:
        warnings.warn(
            "apply_to_geometry_encoder: text prompts never pass through the geometry encoder, so "
            "its LoRA gets no gradient and stays zero",
            stacklevel=2,
        )
    targets = target_modules(model, lora)
    expected = {name for names in targets.values() for name in names}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_pattern(lora),
        bias="none",
    )
    peft_model = _wrap(model, config)
    adapted = {name for name, _ in lora_layers(peft_model)}
    if adapted != expected:
        differing = sorted(adapted ^ expected)
        raise InputError(
            f"PEFT adapted {len(adapted)} modules, expected {len(expected)}; the first that "
            f"differs is {differing[0]}",
            where="lora.target_modules",
            fix="name linear layers only",
        )
    return peft_model


def save_adapter(model, folder, base_name, revision=None):
    """Write an adapter that plain PEFT can load on a plain `Sam3Model`.

    Parameters
    ----------
    model : peft.PeftModel
        From `add_lora` or `load_adapter`.
    folder : os.PathLike
        Gets ``adapter_model.safetensors``, ``adapter_config.json`` and ``base.json``, each
        complete or not at all.
    base_name : str
        Name of the base as the config has it.
    revision : str, optional
        Its revision.
    """
    adapter = model.active_adapters[0]
    config = deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    config.base_model_name_or_path = str(base_name)
    config.revision = revision
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    base = model.get_base_model()
    with staged_folder(folder) as staging:
        # PEFT would note our subclass here, which a plain PeftModel.from_pretrained cannot import.
        config.save_pretrained(staging, auto_mapping_dict=_PLAIN_CLASS)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            staging / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        identity = {"name": str(base_name), "revision": revision, "resolution": base.resolution}
        write_json(staging / BASE_FILE, identity | {"fingerprint": base_fingerprint(base)})


def load_adapter(model, folder, *, is_trainable=False):
    """Put a saved adapter on its base, completely or not at all.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3
        The base, without LoRA; changed in place.
    folder : os.PathLike
        Written by `save_adapter` or by PEFT.
    is_trainable : bool
        True to train it on.

    Returns
    -------
    peft.PeftModel
        In eval mode unless trainable.

    Raises
    ------
    InputError
        If the folder holds no adapter, a file is damaged, or the adapter was made for another
        base: keys missing or unexpected, shapes or ranks that differ, or equal shapes with other
        weights.
    """
    folder = Path(folder)
    weights, config = _read_adapter(folder)
    base_file = folder / BASE_FILE
    if base_file.is_file():
        made_for = read_json(base_file, fix="save the adapter again")
        if made_for.get("fingerprint") != base_fingerprint(model):
            raise _another_base(folder, made_for.get("name"), "the weights of this base differ")
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = None  # not where the base lies, but where the writer had it
    try:
        peft_model = _wrap(model, config)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _another_base(folder, None, str(error).splitlines()[0][:200]) from error
    load_adapter_weights(peft_model, weights, folder)
    return peft_model.train() if is_trainable else peft_model.eval()


def load_adapter_weights(model, weights, where):
    """Copy adapter tensors into a model that has LoRA, refusing any that do not fit.

    Parameters
    ----------
    model : peft.PeftModel
    weights : dict of str to torch.Tensor
        As `read_adapter_weights` returns them.
    where : os.PathLike
        For the message.

    Raises
    ------
    InputError
        If a key is missing or unexpected, or a shape differs.
    """
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = []
    if missing := sorted(set(expected) - set(weights)):
        problems.append(f"{len(missing)} of {len(expected)} keys missing, such as {missing[0]}")
    if unexpected := sorted(set(weights) - set(expected)):
        problems.append(f"{len(unexpected)} keys unexpected, such as {unexpected[0]}")
    for name in sorted(set(expected) & set(weights)):
        if expected[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{name} has shape {shapes}")
            break
    if problems:
        raise _another_base(where, None, "; ".join(problems))
    set_peft_model_state_dict(model, weights)


def read_adapter_weights(folder):
    """Read the tensors of a saved adapter.

    Parameters
    ----------
    folder : os.PathLike
        Holds ``adapter_model.safetensors``.

    Returns
    -------
    dict of str to torch.Tensor
        On the CPU.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(
            f"holds no {WEIGHTS_FILE}", where=folder, fix="name the folder of a finished run"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise InputError(f"is damaged ({error})", where=path, fix="train again") from error


def _wrap(model, config):
    """Call PEFT, which asks transformers for an attribute under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def _read_adapter(folder):
    """Read weights and PEFT configuration of a folder."""
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, fix="name the folder of a finished run")
    fix = "name the folder of a finished run"
    content = read_json(folder / CONFIG_FILE, fix=fix)
    if content.get("peft_type") != "LORA":
        raise InputError(
            f"is an adapter of type {content.get('peft_type')!r}, expected 'LORA'",
            where=folder / CONFIG_FILE,
            fix=fix,
        )
    return read_adapter_weights(folder), PeftConfig.from_pretrained(str(folder))


def _another_base(where, name, reason):
    """Build the one error for an adapter that does not belong to the base."""
    made_for = f" (it was made for {name})" if name else ""
    return InputError(
        f"the adapter belongs to another base or LoRA setting{made_for}: {reason}",
        where=where,
        fix="load the base it was trained on, with --base or --profile",
    )
