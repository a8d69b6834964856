"""Outputs of frozen encoders, computed once: image features on disk, text features in memory.

Kept is what the backbone gives, 10.6 MB per image in bfloat16; the pyramid of the neck has 56 MB.
"""

import hashlib
import json
import shutil
import zlib
from importlib.metadata import version

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader

from helpers.data.dataset import PromptCollator
from helpers.data.images import load_pixels
from helpers.errors import InputError, explain
from helpers.files import file_digest, progress_bar, resolve, staged_folder, write_json
from helpers.model.lora import write_tensors

TENSOR = "backbone_states"
CHECKSUM = "crc32"
_PROMPTS_AT_ONCE = 32
_ANOTHER_FOLDER = "in training.feature_cache, or set it to null"


class BackboneCache:
    """Outputs of a frozen vision backbone without adapter, one memory-mapped file per image.

    The folder is named by all that decides its content besides the image, the files by the content
    of the image, and they hold a checksum. So nothing stale or damaged is ever read, runs share the
    files, and each is there completely or not at all. Of `pictures` the digest is known.
    """

    def __init__(self, folder, model, processor, pictures=None):
        self.model, self.processor = model, processor
        backbone = model.vision_encoder.backbone
        self.dtype = backbone.dtype
        patch = backbone.config.patch_size
        self.shape = ((model.resolution // patch) ** 2, backbone.config.hidden_size)
        self.folder = resolve(folder) / _key(backbone, processor, model.resolution)
        # Size of one file without its header of some 200 bytes.
        self.bytes_per_image = self.shape[0] * self.shape[1] * self.dtype.itemsize
        self._pictures, self._files = pictures or {}, {}

    def missing(self, records):
        """List the images that are not in the cache, one per content."""
        files = {}
        for record in records:
            files.setdefault(self._file_of(record), record)
        return [record for file, record in files.items() if not file.is_file()]

    @torch.no_grad()
    def fill(self, records, *, batch_size=1, num_workers=0, progress=False):
        """Write the backbone's output for missing images; processes share the work and end together."""
        missing = self.missing(records)
        processes = PartialState()
        processes.wait_for_everyone()  # all have seen the same list
        own = missing[processes.process_index :: processes.num_processes]
        loader = DataLoader(
            [(record, self.processor, self.model.resolution) for record in own],
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_load,
            generator=torch.Generator(),  # the global one gives LoRA its A, filled or not
        )
        # Tells a person which runs a folder serves.
        description = {"base": self.model.name_or_path, "resolution": self.model.resolution}
        description["dtype"] = str(self.dtype).removeprefix("torch.")
        fix = f"name a folder that can be written {_ANOTHER_FOLDER}"
        with explain(OSError, "cannot be written", where=self.folder, fix=fix):
            needed = len(missing) * self.bytes_per_image
            parent = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            free = shutil.disk_usage(parent).free
            if needed > free:
                message = f"the features of {len(missing)} images need {needed / 1e9:.1f} GB"
                message += f", the disk has {free / 1e9:.1f} GB left"
                raise InputError(message, where=self.folder, fix=fix)
            with staged_folder(self.folder) as staging:
                write_json(staging / "cache.json", description)
            with progress_bar(len(own), "features", disable=not progress) as bar:
                for batch, pixel_values in loader:
                    states = self.model.backbone_states(pixel_values.to(self.model.device))
                    self._write(batch, states)
                    bar.update(len(batch))
        processes.wait_for_everyone()

    def _write(self, records, states):
        """Write the states (I, N, C) of I images."""
        with staged_folder(self.folder) as staging:
            for record, tensor in zip(records, states.to(self.dtype).cpu(), strict=True):
                if not tensor.isfinite().all():
                    message = "the backbone gives NaN or infinity for this image"
                    fix = "check the image, or load the base in float32 (mixed_precision: no)"
                    raise InputError(message, where=record.path, fix=fix)
                file = staging / self._file_of(record).name
                write_tensors(file, {TENSOR: tensor.clone()}, {CHECKSUM: _checksum(tensor)})

    def states(self, record):
        """Read the backbone's output (N, C) for an image; InputError names a missing or damaged file."""
        file = self._file_of(record)
        errors, fix = (OSError, SafetensorError), "delete it and train again"
        with explain(errors, "cannot be read", where=file, fix=fix):
            with safe_open(file, framework="pt") as content:
                states = content.get_tensor(TENSOR)
                if (content.metadata() or {}).get(CHECKSUM) != _checksum(states):
                    raise OSError("its numbers are not those that were written")
        return states

    def _file_of(self, record):
        """Return the file of an image; its content is read once per cache."""
        if record.path not in self._files:
            picture = self._pictures.get(record.path)
            digest = picture.digest if picture else file_digest(record.path)
            self._files[record.path] = self.folder / f"{digest[:32]}.safetensors"
        return self._files[record.path]


def _checksum(tensor):
    """Return the CRC-32 of a tensor's bytes as text."""
    return str(zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data))


@torch.no_grad()
def text_states(model, processor, prompts):
    """Run a frozen text encoder on prompts: a dict of (T, D) on the CPU, about 33 kB each."""
    prompts, states = list(dict.fromkeys(prompts)), {}
    tokenize = PromptCollator(processor).tokenize
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        chunk = prompts[start : start + _PROMPTS_AT_ONCE]
        tokens = {name: tensor.to(model.device) for name, tensor in tokenize(chunk).items()}
        states |= dict(zip(chunk, model.text_states(**tokens).cpu(), strict=True))
    return states


def _key(backbone, processor, resolution):
    """Return 16 hex digits of all that decides a backbone's output besides the image."""
    settings = {
        "resolution": resolution,
        "image_processor": processor.image_processor.to_dict(),
        "config": backbone.config.to_dict(),
        "transformers": version("transformers"),
        "format": 2,  # with a checksum
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode("utf-8"))
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _load(items):
    """Collate records with their pixels."""
    return [record for record, *_ in items], torch.stack([load_pixels(*item) for item in items])
