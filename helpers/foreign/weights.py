"""Weights that other programs wrote: found, read without running any code, and told apart."""

import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from helpers.config import read_yaml
from helpers.errors import InputError
from helpers.files import read_json
from helpers.model.lora import CONFIG_FILE
from helpers.model.sam3 import refuse_lfs_pointer

_USUAL_FILES = ("best_lora_weights.pt", "last_lora_weights.pt", "lora_weights.pt", "checkpoint.pt")
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
_TABLES = ("model", "state_dict", "lora_state_dict", "model_state_dict")
_MEMORY_MAPPED = 2**30  # bytes from which a file stays on disk; its checksums are not compared then
_ZIP_HEADER = b"PK\x03\x04"
_ARE_LORA = ".lora_"
_AGAIN = "copy or download the file again, and compare its size"
# What programs put before the names of Meta's and transformers' modules, and what the tracker has.
_PREFIX = re.compile(
    r"(module|_orig_mod|base_model\.model|sam3_model|model|detector_model|detector)\."
)
_TRACKER = re.compile(r"tracker(_model|_neck)?\.|.*\bsam2_convs\.")
_MATRIX = re.compile(r"(.+?)\.(?:lora\.)?lora_([AB])(?:\.default)?(?:\.weight)?")
_INSIDE_BASE_LAYER = re.compile(r"\.base_layer(?=\.)")


class Matrices(NamedTuple):
    """The two matrices of LoRA on one module, with their keys in the file."""

    A: torch.Tensor
    B: torch.Tensor
    keys: tuple


@dataclass
class Source:
    """What a file of weights holds; `settings` is what is known of its training."""

    path: Path
    tensors: dict  # without prefixes and tracker
    keys: dict  # of the tensors to their keys in the file
    prefixes: dict  # that were taken off, to the number of keys
    tracker: int  # tensors of the tracker, left out
    settings: dict = field(default_factory=dict)  # rank, alpha, base, and where they stand
    is_peft: bool = False

    @property
    def is_lora(self):
        """True if any tensor is a matrix of LoRA."""
        return any(_ARE_LORA in f".{name}" for name in self.tensors)


def read_source(source, config=None):
    """Find and read the weights in a file or folder, and the settings beside them or in `config`.

    InputError if there are none, or they are empty, cut off, a Git LFS pointer or more than tensors.
    """
    source = Path(source)
    if not source.exists():
        raise InputError("no such file or folder", where=source, fix="check the path")
    path = _weights_in(source) if source.is_dir() else source
    content = _read_shards(path) if path.is_dir() else _read_file(path)
    tensors, others = _tensors_in(content, path)
    found = _without_prefixes(tensors, path)
    beside = path if path.is_dir() else path.parent
    if (beside / CONFIG_FILE).is_file() and found.is_lora:
        found.is_peft, found.settings = True, _peft_settings(beside / CONFIG_FILE)
    elif isinstance(others.get("lora_config"), dict):
        found.settings = {key: others["lora_config"].get(key) for key in ("rank", "alpha")}
        found.settings |= {"where": f"{path}, lora_config", "base": None}
    elif found.is_lora and (yaml := config or _yaml_beside(beside)):
        found.settings = _yaml_settings(yaml)
    return found


def _weights_in(folder):
    """Return the file of weights in a folder, or the folder if it is PEFT's or transformers'."""
    for place in (folder, folder / "adapter"):
        is_model = (place / "config.json").is_file() and any(place.glob("*.safetensors"))
        if (place / CONFIG_FILE).is_file() or is_model:
            return place
    for path in (*(folder / name for name in _USUAL_FILES), folder / "checkpoints/checkpoint.pt"):
        if path.is_file():
            return path
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    files = [path for path in files if path.suffix != ".safetensors"] or files  # torch's own first
    if len(files) == 1:
        return files[0]
    names = ", ".join(path.name for path in files[:5])
    message = f"holds several files of weights ({names})" if files else "holds no weights"
    raise InputError(message, where=folder, fix=f"name the file ({', '.join(_WEIGHTS)})")


def _read_shards(folder):
    """Return all tensors of a folder that PEFT or transformers wrote."""
    names = ("adapter_model.*",) if (folder / CONFIG_FILE).is_file() else ("model*.safetensors",)
    files = sorted(path for name in names for path in folder.glob(name) if path.suffix in _WEIGHTS)
    if not files:
        raise InputError(f"holds no {names[0]}", where=folder, fix="copy the whole folder")
    return {name: tensor for path in files for name, tensor in _read_file(path).items()}


def _read_file(path):
    """Return the content of a file on the CPU; nothing in it is executed."""
    if not path.stat().st_size:
        raise InputError("is empty", where=path, fix=_AGAIN)
    refuse_lfs_pointer(path)
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        is_cut_off = file.read(4) == _ZIP_HEADER and not is_zip
    if is_cut_off:
        raise InputError("is cut off: its end is missing", where=path, fix=_AGAIN)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = is_zip and path.stat().st_size > _MEMORY_MAPPED
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if is_zip:
            message = "holds Python objects besides tensors; to load them would run their code"
            fix = "save the state_dict alone, where you trust the file"
            raise InputError(message, where=path, fix=fix) from error
        reason = "not a file of torch"
    except Exception as error:  # damaged files raise what they happen to break
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
    raise InputError(f"is damaged, cut off or no weights ({reason})", where=path, fix=_AGAIN)


def _tensors_in(content, path):
    """Return the table of tensors in the content of a file, and what else is in it."""
    if isinstance(content, dict):
        tables = [(name, content[name]) for name in _TABLES if isinstance(content.get(name), dict)]
        for name, table in (*tables, (None, content)):
            tensors = {str(k): v.detach() for k, v in table.items() if torch.is_tensor(v)}
            if tensors:
                return tensors, {key: value for key, value in content.items() if key != name}
        if not content or tables:
            message = "holds no tensor: no module was adapted (cause lora_elsewhere)"
            raise InputError(message, where=path, fix="compare its target_modules with the model")
    keys = (
        f", its keys are {', '.join(map(str, content))[:100]}" if isinstance(content, dict) else ""
    )
    message = f"holds no table of tensors but a {type(content).__name__}{keys}"
    raise InputError(message, where=path, fix="name a file of weights")


def _without_prefixes(tensors, path):
    """Take off what stands before the names of modules, and leave out the tracker."""
    kept, keys, prefixes, tracker = {}, {}, {}, 0
    for key, tensor in tensors.items():
        name, own = key, []
        while match := _PREFIX.match(name):
            own.append(match[0])
            name = name[match.end() :]
        if _TRACKER.match(name):
            tracker += 1
            continue
        name = _INSIDE_BASE_LAYER.sub("", name)
        if name in kept:
            message = f"{keys[name]} and {key} are the same weight"
            raise InputError(message, where=path, fix="remove one of the two copies")
        kept[name], keys[name] = tensor, key
        for prefix in own:
            prefixes[prefix] = prefixes.get(prefix, 0) + 1
    return Source(path, kept, keys, prefixes, tracker)


def lora_matrices(source):
    """Return the modules of a LoRA file: name to `Matrices`.

    InputError for a matrix without its partner, and for what is no LoRA.
    """
    halves = {}
    for name in source.tensors:
        match = _MATRIX.fullmatch(name)
        if match is None:
            message = f"holds {source.keys[name]} besides the matrices of LoRA"
            fix = "only plain LoRA can be imported; merge the rest into a full checkpoint"
            raise InputError(message, where=source.path, fix=fix)
        halves.setdefault(match[1], {})[match[2]] = name
    modules = {}
    for module, names in halves.items():
        if len(names) < 2:
            ((letter, name),) = names.items()
            other = "B" if letter == "A" else "A"
            message = f"{source.keys[name]} has no lora_{other} beside it"
            raise InputError(message, where=source.path, fix=_AGAIN)
        pair = [source.tensors[names[letter]] for letter in "AB"]
        modules[module] = Matrices(*pair, tuple(source.keys[names[letter]] for letter in "AB"))
        if any(matrix.ndim != 2 for matrix in pair):
            shapes = " and ".join(str(tuple(matrix.shape)) for matrix in pair)
            message = f"A and B of {module} have the shapes {shapes}, which is no LoRA of a layer"
            raise InputError(message, where=source.path, fix="only linear layers can be imported")
    return modules


def _yaml_beside(folder):
    """Return the one YAML file in a folder that has a section ``lora``, or None."""
    files = sorted({*folder.glob("*.yaml"), *folder.glob("*.yml")})
    files = [path for path in files if isinstance(read_yaml(path).get("lora"), dict)]
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        message = f"holds several YAML files with a section lora: {names}"
        raise InputError(message, where=folder, fix="name that of the training with --config")
    return files[0] if files else None


def _yaml_settings(path):
    """Return rank, alpha and base that the YAML of a training names."""
    content = read_yaml(path)
    sections = [content.get(name) or {} for name in ("lora", "model")]
    if not sections[0] or not all(isinstance(section, dict) for section in sections):
        raise InputError("has no section lora", where=path, fix="give the YAML of the training")
    lora, model = sections
    settings = {"rank": lora.get("rank"), "alpha": lora.get("alpha"), "where": path}
    return settings | {"base": model.get("name"), "lora": lora}


def _peft_settings(path):
    """Return rank, alpha and base that an adapter_config.json names."""
    content = read_json(path, fix="copy the whole folder")
    return {
        "rank": content.get("r"),
        "alpha": content.get("lora_alpha"),
        "base": content.get("base_model_name_or_path"),
        "where": path,
        "peft": content,
    }
