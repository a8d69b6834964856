"""Load a SAM3 base, the embedded one or facebook/sam3, completely or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Sam3Config, Sam3Processor

from helpers.errors import InputError
from helpers.files import ROOT, resolve
from helpers.model.prompted import PromptedSam3, base_of

_MODEL_TYPES = ("sam3", "sam3_video")
_NUM_FINGERPRINT_TENSORS = 12
_LFS_HEADER = b"version https://git-lfs"


def base_config(name_or_path, revision=None):
    """Read a base's `Sam3Config` without its weights; ``image_size`` is its own resolution."""
    options = {} if revision is None else {"revision": revision}
    config = _load_part(_locate(name_or_path), Sam3Config, options)
    if config.model_type not in _MODEL_TYPES:
        raise InputError(
            f"holds a model of type {config.model_type!r}, expected 'sam3'",
            where=name_or_path,
            fix="name a SAM3 base, for example data/tiny_sam3 or facebook/sam3",
        )
    return _detector_config(config)


def newest_revision(name_or_path):
    """Return the commit that a name on the hub stands for at this moment; None for a folder."""
    return getattr(base_config(name_or_path), "_commit_hash", None)


def base_dtype(mixed_precision):
    """Return the type in which a frozen base is kept: bfloat16 for ``bf16``, else float32.

    The range of float16 is too small for activations of a base that was trained in bfloat16.
    """
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def best_device():
    """Return the device that training takes, CUDA, MPS, XPU or the CPU: accelerate's choice."""
    return PartialState().device


def load_base(name_or_path, revision=None, dtype=None, resolution=None):
    """Load a SAM3 base and its processor, in eval mode, completely or not at all.

    Parameters
    ----------
    name_or_path : str or pathlib.Path
        A folder, see `helpers.files.resolve`, or a name on the hub such as ``facebook/sam3``.
    revision : str, optional
        Branch, tag or commit on the hub.
    dtype : torch.dtype, optional
        Type of the weights, float32 by default; bfloat16 is that of the two encoders only.
    resolution : int, optional
        Side of the square input in pixels, the base's own by default; a multiple of its patch.

    Returns
    -------
    model : PromptedSam3
    processor : transformers.Sam3Processor
        Set to the same resolution.

    Raises
    ------
    InputError
        When the folder holds no SAM3, the hub refuses access, or a weight does not fit.
    """
    source = _locate(name_or_path)
    options = {} if revision is None else {"revision": revision}
    config = base_config(name_or_path, revision)
    if resolution is not None:
        _set_resolution(config, resolution, name_or_path)
    settings = {"config": config, "dtype": dtype or torch.float32}
    # Mismatched tensors are reported rather than raised, so that `_check_loaded` can name them.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load_part(source, PromptedSam3, options | settings)
    _check_loaded(info, name_or_path)
    processor = _load_part(source, Sam3Processor, options)
    side = {"height": model.resolution, "width": model.resolution}
    processor.image_processor.size = side
    processor.target_size = model.resolution
    return model.eval(), processor


def base_fingerprint(model):
    """Hash names, shapes and some bfloat16 values of a base, with or without adapter: 16 hex digits."""
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in base_of(model).state_dict().items()
        if ".lora_" not in name
    }
    names = sorted(tensors)
    digest = hashlib.sha256(repr([(n, tuple(tensors[n].shape)) for n in names]).encode())
    for name in names[:: max(len(names) // _NUM_FINGERPRINT_TENSORS, 1)]:
        values = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def is_lfs_pointer(path):
    """Return True for the text that git leaves in place of a file that Git LFS keeps."""
    with Path(path).open("rb") as file:
        return file.read(len(_LFS_HEADER)) == _LFS_HEADER


def _locate(name_or_path):
    """Return the folder, or the name unchanged when it can only be a name on the hub."""
    path = resolve(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                "the folder has no config.json, so it is not a model",
                where=path,
                fix="name the folder that holds config.json and model.safetensors",
            )
        return str(path)
    name = str(name_or_path)
    looks_like_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    first = Path(name).parts[0] if name else ""
    if not looks_like_hub_name or (ROOT / first).is_dir() or Path(first).is_dir():
        raise InputError(
            "no such folder",
            where=name_or_path,
            fix="check model.name; the embedded base is data/tiny_sam3",
        )
    return name


def _load_part(source, cls, options):
    """Call ``cls.from_pretrained`` and put every way it can fail into one sentence."""
    try:
        return cls.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise classes of five libraries
        if Path(source).is_dir():
            for path in sorted(Path(source).glob("*.safetensors")):
                if is_lfs_pointer(path):
                    raise InputError(
                        "is a Git LFS pointer, not the weights",
                        where=path,
                        fix="run 'git lfs pull' in the repository it came from",
                    ) from error
            raise InputError(
                f"cannot load {cls.__name__}: {_first_line(error)}",
                where=source,
                fix="restore the folder; a base holds config.json, model.safetensors, "
                "the processor and the tokenizer",
            ) from error
        raise InputError(
            f"the hub gave no access ({_first_line(error)})",
            where=source,
            fix=f"ask for access at https://huggingface.co/{source}, run 'hf auth login', and try "
            "again; the profile 'tiny' needs none of this",
        ) from error


def _detector_config(config):
    """Return the image model's part of a ``sam3_video`` configuration, or `config` itself."""
    detector = getattr(config, "detector_config", None)
    if detector is None:
        return config
    detector = Sam3Config(**detector) if isinstance(detector, dict) else detector
    detector._commit_hash = getattr(config, "_commit_hash", None)
    return detector


def _set_resolution(config, resolution, name):
    """Set the input size, refusing one that the patches do not divide."""
    patch = config.vision_config.backbone_config.patch_size
    if resolution % patch:
        raise InputError(
            f"resolution {resolution} is not a multiple of the patch of {patch} pixels",
            where=name,
            fix=f"use {round(resolution / patch) * patch}",
        )
    config.image_size = resolution


def _check_loaded(info, name):
    """Refuse a base of which some weights stayed random or were thrown away."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            raise InputError(
                f"{len(keys)} {kind.replace('_', ' ')} in the weights, for example {keys[0]}",
                where=name,
                fix="the weights do not belong to config.json; restore the folder",
            )


def _first_line(error):
    """Return the first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
