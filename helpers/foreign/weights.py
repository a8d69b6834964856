"""Weights that other programs wrote: found, read without running any code, and their names.

The table ``data/native_names.csv`` was read in facebookresearch/sam3 at 99d02f2 and in transformers
5.23; a star in it stands for the number of a layer.
"""

import csv
import pickle
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.config import read_yaml
from helpers.errors import InputError
from helpers.files import DATA, read_json
from helpers.model.lora import CONFIG_FILE
from helpers.model.sam3 import refuse_lfs_pointer

_USUAL_FILES = ("best_lora_weights.pt", "last_lora_weights.pt", "lora_weights.pt", "checkpoint.pt")
_USUAL_FILES += ("checkpoints/checkpoint.pt",)
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
_TABLES = ("model", "state_dict", "lora_state_dict", "model_state_dict")
_MEMORY_MAPPED = 2**30  # bytes from which a file stays on disk; its checksums are not compared then
_AGAIN = "copy or download the file again, and compare its size"
# What programs put before the names of Meta's and transformers' modules, and what the tracker has.
_PREFIX = re.compile(
    r"(module|_orig_mod|base_model\.model|sam3_model|model|detector_model|detector)\."
)
_TRACKER = re.compile(r"tracker(_model|_neck)?\.|.*\bsam2_convs\.")
_MATRIX = re.compile(r"(.+?)\.(?:lora\.)?lora_([AB])(?:\.default)?(?:\.weight)?")

WITHOUT_COUNTERPART = re.compile(r"geometry_encoder\.points_|.*\.attn\.freqs_cis$")
"""Names that transformers has not: points as prompts, and constants that it computes."""
_FUSED = re.compile(r"(.+?)(?:\.qkv|\.in_proj)?([._](?:weight|bias))?")


@dataclass
class Source:
    """What a file of weights holds, and what is known of its training."""

    path: Path
    tensors: dict  # without prefixes and tracker
    keys: dict  # of the tensors to their keys in the file
    prefixes: Counter  # that were taken off the keys
    tracker: int  # tensors of the tracker, left out
    is_peft: bool  # in a folder that PEFT wrote
    settings: dict = field(default_factory=dict)  # of a LoRA: rank, alpha, target_modules
    base: str | None = None  # that the settings name
    where: Path | None = None  # the settings stand there

    @property
    def is_lora(self):
        """True if any tensor is a matrix of LoRA."""
        return any("lora_" in name for name in self.tensors)


def read_source(source, config=None):
    """Find and read the weights in a file or folder, and the settings beside them or in `config`.

    InputError if there are none, or they are empty, cut off, a Git LFS pointer or more than tensors.
    """
    if not source.exists():
        raise InputError("no such file or folder", where=source, fix="check the path")
    path = _weights_in(source) if source.is_dir() else source
    files, folder = [path], path.parent
    if path.is_dir():
        names, folder = ("adapter_model.*" if _is_peft(path) else "model*.safetensors"), path
        files = sorted(file for file in path.glob(names) if file.suffix in _WEIGHTS)
        if not files:
            raise InputError(f"holds no {names}", where=path, fix="copy the whole folder")
    tensors = {}
    for file in files:
        table, others = _tensors_in(_read_file(file), file)
        tensors |= table
    found = Source(path, *_without_prefixes(tensors, path), is_peft=_is_peft(folder))
    if isinstance(others.get("lora_config"), dict):
        found.settings, found.where = others["lora_config"], path
    elif found.is_lora and (config or not found.is_peft):
        found.where = config or _yaml_beside(folder)
        content = {} if found.where is None else read_yaml(found.where)
        sections = [content.get(name) or {} for name in ("lora", "model")]
        if not all(isinstance(section, dict) for section in sections):
            fix = "give the YAML of the training"
            raise InputError("has no sections lora and model", where=found.where, fix=fix)
        found.settings, found.base = sections[0], sections[1].get("name")
    elif found.is_lora:
        found.where = folder / CONFIG_FILE
        content = read_json(found.where)
        found.settings = content | {"rank": content.get("r"), "alpha": content.get("lora_alpha")}
        found.base = content.get("base_model_name_or_path")
    return found


def _is_peft(folder):
    return (folder / CONFIG_FILE).is_file()


def _weights_in(folder):
    """Return the file of weights in a folder, or the folder if it is PEFT's or transformers'."""
    for place in (folder, folder / "adapter"):
        if _is_peft(place) or (
            (place / "config.json").is_file() and any(place.glob("*.safetensors"))
        ):
            return place
    for name in _USUAL_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    files = [path for path in files if path.suffix != ".safetensors"] or files  # torch's own first
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "no weights"
        fix = f"name the file ({', '.join(_WEIGHTS)})"
        raise InputError(f"holds {names}, where one file is needed", where=folder, fix=fix)
    return files[0]


def _read_file(path):
    """Return the content of a file on the CPU; nothing in it is executed."""
    size, is_zip = path.stat().st_size, zipfile.is_zipfile(path)
    if not size:
        raise InputError("is empty", where=path, fix=_AGAIN)
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        options = {"map_location": "cpu", "weights_only": True}
        return torch.load(path, **options, mmap=is_zip and size > _MEMORY_MAPPED)
    except Exception as error:  # damaged files raise what they happen to break
        if is_zip and isinstance(error, pickle.UnpicklingError):
            message = "holds Python objects besides tensors; to load them would run their code"
            fix = "save the state_dict alone, where you trust the file"
            raise InputError(message, where=path, fix=fix) from error
        reason = str(error).partition("\n")[0][:100]
        message = f"is cut off, damaged or no file of torch or safetensors ({reason})"
        raise InputError(message, where=path, fix=_AGAIN) from error


def _tensors_in(content, path):
    """Return the table of tensors in the content of a file, and what else is in it."""
    others = content if isinstance(content, dict) else {}
    tables = [others[name] for name in _TABLES if isinstance(others.get(name), dict)]
    for table in (*tables, others):
        tensors = {str(key): v.detach() for key, v in table.items() if torch.is_tensor(v)}
        if tensors:
            return tensors, others
    keys = f" with the keys {', '.join(map(str, others)):.100}" if others else ""
    raise InputError(
        f"holds no tensor but a {type(content).__name__}{keys}",
        where=path,
        fix="name a file of weights; one of LoRA is empty where no module was adapted",
    )


def _without_prefixes(tensors, path):
    """Take off what stands before the names of modules, and leave out the tracker."""
    plain, keys, prefixes, num_tracker = {}, {}, Counter(), 0
    for key, tensor in tensors.items():
        name = key
        while match := _PREFIX.match(name):
            prefixes[match[0]] += 1
            name = name[match.end() :]
        name = name.replace(".base_layer.", ".")
        if _TRACKER.match(name):
            num_tracker += 1
        elif name in plain:
            message = f"{keys[name]} and {key} are the same weight"
            raise InputError(message, where=path, fix="remove one of the two copies")
        else:
            plain[name], keys[name] = tensor, key
    return plain, keys, prefixes, num_tracker


def lora_matrices(source):
    """Return A and B of each module of a LoRA file; InputError for half of one and for other things."""
    halves = {}
    for name, tensor in source.tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None or tensor.ndim != 2:
            message = f"holds {source.keys[name]}, shape {tuple(tensor.shape)}, besides LoRA"
            fix = "only LoRA of linear layers can be imported"
            raise InputError(message, where=source.path, fix=fix)
        halves.setdefault(match[1], {})[match[2]] = name
    for names in halves.values():
        if len(names) < 2:
            other = "B" if "A" in names else "A"
            message = f"{source.keys[names.popitem()[1]]} has no lora_{other} beside it"
            raise InputError(message, where=source.path, fix=_AGAIN)
    tensors = source.tensors
    return {module: (tensors[names["A"]], tensors[names["B"]]) for module, names in halves.items()}


def _yaml_beside(folder):
    """Return the one YAML file in a folder that has a section ``lora``, or None."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    files = [path for path in files if read_yaml(path).get("lora")]
    if len(files) > 1:
        message = f"holds several YAML files with a section lora: {files[0].name}, {files[1].name}"
        raise InputError(message, where=folder, fix="name that of the training with --config")
    return files[0] if files else None


def _rules(rows):
    """Return (pattern of a name and of what is in it, template) pairs."""
    return [
        (re.compile(re.escape(name).replace(r"\*", r"(\d+)") + r"(?=\.|$)"), template)
        for name, template in rows
    ]


def _renamed(name, rules):
    """Return a name after the first rule that fits, or None."""
    for pattern, template in rules:
        if match := pattern.match(name):
            for number in match.groups():
                template = template.replace("*", number, 1)
            return template + name[match.end() :]
    return None


with (DATA / "native_names.csv").open(encoding="utf-8", newline="") as _file:
    _ROWS = [(row["meta"], row["transformers"]) for row in csv.DictReader(_file)]
_TO_HF = _rules(_ROWS)
_TO_NATIVE = _rules((hf, native) for native, hf in _ROWS)


def to_hf(name):
    """Return the names in transformers of a module or weight of Meta's: none, one, or q, k and v.

    Three for what holds q, k and v in one matrix, in this order along its output: `qkv` of the ViT
    or of a fork, `in_proj_weight` of attention, and an attention as PEFT adapts it.
    """
    if (hf := _renamed(name, _TO_HF)) is not None:
        return (hf,)
    attention, ending = _FUSED.fullmatch(name).groups(default="")
    parts = [_renamed(f"{attention}.{letter}_proj", _TO_HF) for letter in "qkv"]
    return () if None in parts else tuple(part + ending.replace("_", ".") for part in parts)


def to_native(name):
    """Return the name in Meta's code of a module of transformers', or None.

    Of the ViT's q, k and v, which Meta's code has in one `qkv`, it is `attn.q_proj` and so on.
    """
    return _renamed(name, _TO_NATIVE)
