"""Where LoRA sits: the seed's flags and names, translated to modules of the Hugging Face SAM3."""

from __future__ import annotations

import re

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from helpers.errors import InputError

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
    lora : helpers.config_sections.LoraSection
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
    model : peft.PeftModel or helpers.sam3.PromptedSam3

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
    lora : helpers.config_sections.LoraSection

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
