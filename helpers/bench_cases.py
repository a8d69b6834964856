"""One measured case of the benchmark: a training step or a detection, repeated, timed and counted.

Each case runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import atexit
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers.adapters import add_lora
from helpers.annotations import read_split
from helpers.config import load_config
from helpers.datasets import PromptCollator, PromptDataset
from helpers.environment import device
from helpers.feature_cache import BackboneCache
from helpers.losses import sam3_losses
from helpers.paths import CONFIGS, WALL_CRACKS
from helpers.prompt_rows import model_inputs
from helpers.prompted_sam3 import checkpoint_activations, loss_inputs
from helpers.sam3 import load_base
from helpers.step_counter import StepCounter

RANK = 16
TRAINING_PROMPTS = 4
"""Of one image: one present, three absent, as in configs/crack_detection_config.yaml."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes
    ----------
    name : str
        For the table and the figure.
    config : str or None
        File in ``configs/`` whose components are trained; None detects without training.
    prompts : int
        On one image.
    half_base : bool
        True keeps the base in the precision of the run, False in float32.
    checkpointing, cached : bool
        Activations are computed again; backbone outputs come from disk.
    shared : bool
        True passes all prompts of an image together; False one after the other, each with a pass
        of the vision encoder.
    """

    name: str
    config: str | None = None
    prompts: int = TRAINING_PROMPTS
    half_base: bool = True
    checkpointing: bool = False
    cached: bool = False
    shared: bool = True


_SEED, _SMALL = "crack_detection_config", "text_and_decoder_lora"
CASES = (
    Case("train, plain", _SEED, half_base=False, shared=False),
    Case("train, plain, checkpointing", _SEED, half_base=False, checkpointing=True, shared=False),
    Case("train, one vision pass", _SEED, half_base=False),
    Case("train, base in half", _SEED),
    Case("train, checkpointing", _SEED, checkpointing=True),
    Case("train, vision frozen", _SMALL),
    Case("train, vision frozen, cached", _SMALL, cached=True),
    Case("detect, 1 prompt", prompts=1),
    Case("detect, 4 prompts", prompts=4),
    Case("detect, 16 prompts", prompts=16),
    Case("detect, 16 separate passes", prompts=16, shared=False),
)
"""The plain cases and the separate passes are the baselines."""


def measure(case, base, profile, min_seconds):
    """Measure a case in this process.

    Parameters
    ----------
    case : Case
    base : str
        Folder or name of the base.
    profile : str
        Of the configuration: precision and resolution.
    min_seconds : float
        Steps are repeated for at least this long, after one that warms up.

    Returns
    -------
    dict
        ``seconds`` (of every repetition), ``median_seconds``, ``peak_bytes`` (of the accelerator,
        else of the whole process), ``flops`` (of one step, recomputation included).
    """
    torch.manual_seed(0)
    place = device()["device"]
    step = (_training_step if case.config else _detection)(case, base, profile, place)
    with StepCounter() as counter:
        step()
    if place == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    while sum(seconds) < min_seconds:
        start = time.perf_counter()
        step()
        if place != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": [round(one, 5) for one in seconds],
        "median_seconds": round(statistics.median(seconds), 5),
        "peak_bytes": _peak_bytes(place),
        "flops": counter.flops,
    }


def _load(case, base, profile):
    """Return the config, and model and processor in the precision of the case."""
    config = load_config(
        CONFIGS / f"{case.config or _SEED}.yaml",
        profile=profile,
        overrides=(f"model.name={base}", f"lora.rank={RANK}"),
    )
    half = case.half_base and config.training.mixed_precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    model, processor = load_base(base, dtype=dtype, resolution=config.model.resolution)
    return config, model, processor


def _training_step(case, base, profile, place):
    """Return a function that does forward, loss, backward and AdamW of LoRA on one image."""
    config, model, processor = _load(case, base, profile)
    next_batches = _loader(case, config, model, processor, place)
    model = add_lora(model, config.lora).to(place).train()
    if case.checkpointing:
        checkpoint_activations(model.get_base_model())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    mixed = config.training.mixed_precision == "bf16"

    def step():
        optimizer.zero_grad()
        for batch in next_batches():
            with torch.autocast(place, torch.bfloat16, enabled=mixed):
                outputs = loss_inputs(model(**model_inputs(batch, place)))
            targets = [
                {key: one.to(place) for key, one in target.items()} for target in batch["targets"]
            ]
            sam3_losses(outputs, targets, config.loss.variant)["total"].backward()
        optimizer.step()

    return step


def _loader(case, config, model, processor, place):
    """Return a function that lists the batches of a step: the first training image, its prompts.

    Features from disk are read anew each time; pictures are loaded once, as worker processes would
    do beside the step.
    """
    split, cache = read_split(WALL_CRACKS, config.data.train_split), None
    if case.cached:
        folder = tempfile.TemporaryDirectory(prefix="features-")
        atexit.register(folder.cleanup)
        cache = BackboneCache(folder.name, model.to(place), processor)
        cache.fill(split.records[:1])
    dataset = PromptDataset(
        split,
        processor,
        resolution=model.resolution,
        mask_size=model.mask_size,
        num_negatives=case.prompts - 1,
        negative_prompts=config.data.negative_prompts,
        backbone_cache=cache,
    )
    collator = PromptCollator(processor)
    if case.cached:
        return lambda: [collator([dataset[0]])]
    batch = collator([dataset[0]])
    batches = [batch] if case.shared else _one_by_one(batch)
    return lambda: batches


def _one_by_one(batch):
    """Split a batch of one image into batches with one prompt each, as most training code has it."""
    names = ("input_ids", "attention_mask", "image_index", "targets")
    return [
        batch | {name: batch[name][row : row + 1] for name in names}
        for row in range(len(batch["targets"]))
    ]


def _detection(case, base, profile, place):
    """Return a function that asks the prompts about one image, together or one by one."""
    config, model, processor = _load(case, base, profile)
    batches = _loader(case, config, model.to(place), processor, place)()
    inputs = [model_inputs(batch, place) for batch in batches]
    mixed = config.training.mixed_precision == "bf16"

    @torch.no_grad()
    def step():
        with torch.autocast(place, torch.bfloat16, enabled=mixed):
            for one in inputs:
                model(**one)

    return step


def _peak_bytes(place):
    """Return the most memory that was in use."""
    if place == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limit_memory():
    """Let a case that is too large fail here, rather than the machine choose what to kill."""
    if sys.platform == "linux":
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limit = int(0.9 * 1024 * int(facts["MemAvailable"].split()[0]))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(arguments):
    """Measure the case of an index and write it to a file; see `helpers.bench`."""
    index, base, profile, min_seconds, output = arguments
    _limit_memory()
    result = measure(CASES[int(index)], base, profile, float(min_seconds))
    Path(output).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
