"""Load a SAM3 base, the embedded one or facebook/sam3, completely or not at all."""

import hashlib
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Sam3Config, Sam3Processor

from helpers.errors import InputError
from helpers.files import ROOT, resolve
from helpers.model.prompted import PromptedSam3, base_of

_NUM_FINGERPRINT_TENSORS = 12
_LFS_HEADER = b"version https://git-lfs"


def base_config(name_or_path, revision=None):
    """Read a base's `Sam3Config` without its weights; ``image_size`` is its own resolution."""
    config = _load_part(_locate(name_or_path), Sam3Config, {"revision": revision or "main"})
    if config.model_type not in ("sam3", "sam3_video"):
        message = f"holds a model of type {config.model_type!r}, expected 'sam3'"
        fix = "name a SAM3 base, for example data/tiny_sam3 or facebook/sam3"
        raise InputError(message, where=name_or_path, fix=fix)
    detector = getattr(config, "detector_config", None)  # the image model's part of sam3_video
    if detector is None:
        return config
    detector = Sam3Config(**detector) if isinstance(detector, dict) else detector
    detector._commit_hash = getattr(config, "_commit_hash", None)
    return detector


def newest_revision(name_or_path):
    """Return the commit that a name on the hub stands for at this moment; None for a folder."""
    return getattr(base_config(name_or_path), "_commit_hash", None)


def base_dtype(mixed_precision):
    """Return the type in which a frozen base is kept; the range of float16 would be too small."""
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def best_device():
    """Return the device that training takes, CUDA, MPS, XPU or the CPU: accelerate's choice."""
    return PartialState().device


def has_native_prompt(config, name_or_path):
    """Return whether a base was trained with `native_prompt`: as its config says; facebook/sam3 was."""
    is_meta = str(name_or_path).startswith("facebook/sam3")
    return bool(getattr(config, "native_prompt", is_meta))


def load_base(name_or_path, revision=None, dtype=None, resolution=None, native_prompt=None):
    """Load a `PromptedSam3` in eval mode and its `Sam3Processor`, completely or not at all.

    The base is a folder, see `helpers.files.resolve`, or a name on the hub such as ``facebook/sam3``
    with a ``revision``. ``dtype`` of the weights is float32 by default; bfloat16 is that of the two
    encoders only. ``resolution`` is the side of the square input in pixels, a multiple of the patch;
    with ``native_prompt`` the geometry encoder's token follows every prompt. Both are by default as
    the base has them.
    """
    source, config = _locate(name_or_path), base_config(name_or_path, revision)
    if resolution is not None:
        patch = config.vision_config.backbone_config.patch_size
        if resolution % patch:
            message = f"resolution {resolution} is not a multiple of the patch of {patch} pixels"
            fix = f"use {round(resolution / patch) * patch}"
            raise InputError(message, where=name_or_path, fix=fix)
        config.image_size = resolution
    is_native = has_native_prompt(config, name_or_path)
    config.native_prompt = is_native if native_prompt is None else native_prompt
    options = {"revision": revision or "main"}
    settings = {"config": config, "dtype": dtype or torch.float32}
    # Mismatched tensors are reported rather than raised, so that they can be named.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load_part(source, PromptedSam3, options | settings)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind) or ())
        if keys:
            message = f"{len(keys)} {kind.replace('_', ' ')} in the weights, for example {keys[0]}"
            fix = "the weights do not belong to config.json; restore the folder"
            raise InputError(message, where=name_or_path, fix=fix)
    processor = load_processor(name_or_path, revision)
    processor.image_processor.size = {"height": model.resolution, "width": model.resolution}
    processor.target_size = model.resolution
    return model.eval(), processor


def load_processor(name_or_path, revision=None):
    """Load the `Sam3Processor` of a base."""
    return _load_part(_locate(name_or_path), Sam3Processor, {"revision": revision or "main"})


def base_fingerprint(model):
    """Hash names, shapes and some bfloat16 values of a base, with or without adapter: 16 hex digits."""
    state = base_of(model).state_dict()
    tensors = {n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n}
    names = sorted(tensors)
    digest = hashlib.sha256(repr([(n, tuple(tensors[n].shape)) for n in names]).encode())
    for name in names[:: max(len(names) // _NUM_FINGERPRINT_TENSORS, 1)]:
        values = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_lfs_pointer(path):
    """Refuse the text that git leaves in place of a file that Git LFS keeps."""
    with Path(path).open("rb") as file:
        if file.read(len(_LFS_HEADER)) == _LFS_HEADER:
            fix = "run 'git lfs pull' in the repository it came from"
            raise InputError("is a Git LFS pointer, not the weights", where=path, fix=fix)


def _locate(name_or_path):
    """Return the folder, or the name unchanged when it can only be a name on the hub."""
    path = resolve(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            message = "the folder has no config.json, so it is not a model"
            fix = "name the folder that holds config.json and model.safetensors"
            raise InputError(message, where=path, fix=fix)
        return str(path)
    name = str(name_or_path)
    looks_like_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    first = name.partition("/")[0]
    if not looks_like_hub_name or (ROOT / first).is_dir() or Path(first).is_dir():
        fix = "check model.name; the embedded base is data/tiny_sam3"
        raise InputError("no such folder", where=name_or_path, fix=fix)
    return name


def _load_part(source, cls, options):
    """Call ``cls.from_pretrained`` and put every way it can fail into one sentence."""
    try:
        return cls.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise classes of five libraries
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = f"the hub gave no access ({lines[0][:200]})"
        fix = f"ask for access at https://huggingface.co/{source}, run 'hf auth login', and try "
        fix += "again; the profile 'tiny' needs none of this"
        if Path(source).is_dir():
            for path in sorted(Path(source).glob("*.safetensors")):
                refuse_lfs_pointer(path)
            message = f"cannot load {cls.__name__}: {lines[0][:200]}"
            fix = "restore the folder; a base holds config.json, model.safetensors, the processor "
            fix += "and the tokenizer"
        raise InputError(message, where=source, fix=fix) from error
