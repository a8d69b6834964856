"""Time training and detection on this device, case by case, against a plain baseline."""

import argparse
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import Sam3Config, Sam3Model, Sam3Processor

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.environment import device, versions_line
from helpers.files import CONFIGS, DATA, ROOT, RUNS, TINY_BASE, WALL_CRACKS, resolve, write_json
from helpers.model.cache import BackboneCache
from helpers.model.lora import add_lora
from helpers.model.losses import sam3_losses
from helpers.model.prompted import (
    checkpoint_activations,
    loss_inputs,
    model_inputs,
    rows_with_objects,
)
from helpers.model.sam3 import load_base

NUM_PARAMETERS = 840_376_374
RANDOM_BASE = RUNS / "random_sam3"
SEED_CONFIG, SMALL_CONFIG = "crack_detection_config", "text_and_decoder_lora"


@dataclass(frozen=True)
class Case:
    """What is measured on one image; without a config, detection.

    ``shared`` passes all prompts together; otherwise each has a vision pass of its own.
    ``all_masks`` computes those of absent prompts too, which the loss does not read.
    """

    name: str
    config: str | None = None
    prompts: int = 4
    half_base: bool = True
    checkpointing: bool = False
    cached: bool = False
    shared: bool = True
    all_masks: bool = True


CASES = (
    Case("train, plain", SEED_CONFIG, half_base=False, shared=False),
    Case(
        "train, plain, checkpointing",
        SEED_CONFIG,
        half_base=False,
        checkpointing=True,
        shared=False,
    ),
    Case("train, one vision pass", SEED_CONFIG, half_base=False),
    Case("train, base in half", SEED_CONFIG),
    Case("train, checkpointing", SEED_CONFIG, checkpointing=True),
    Case("train, masks of objects", SEED_CONFIG, checkpointing=True, all_masks=False),
    Case("train, vision frozen", SMALL_CONFIG, all_masks=False),
    Case("train, vision frozen, cached", SMALL_CONFIG, all_masks=False, cached=True),
    Case("detect, 1 prompt", prompts=1),
    Case("detect, 4 prompts", prompts=4),
    Case("detect, 16 prompts", prompts=16),
    Case("detect, 16 separate passes", prompts=16, shared=False),
)


def write_random_base(folder, seed=0):
    """Write the architecture of ``facebook/sam3`` with random weights: 1.7 GB in bfloat16."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Sam3Model(Sam3Config())
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    Sam3Processor.from_pretrained(TINY_BASE).save_pretrained(folder)
    return Path(folder)


def measure(case, base, profile, min_seconds):
    """Return seconds of every repetition, peak memory in bytes and FLOPs of one step."""
    torch.manual_seed(0)
    place = device()["device"]
    with tempfile.TemporaryDirectory(prefix="features-") as features:
        step = prepare_step(case, base, profile, place, features)
        with FlopCounterMode(display=False) as counter:
            step()
        if place == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        while sum(seconds) < min_seconds:
            start = time.perf_counter()
            step()
            if place != "cpu":
                torch.accelerator.synchronize()
            seconds.append(round(time.perf_counter() - start, 5))
    median, flops = statistics.median(seconds), counter.get_total_flops()
    return {
        "seconds": seconds,
        "median_seconds": median,
        "images_per_second": 1 / median,
        "peak_bytes": peak_bytes(place),
        "flops": flops,
        "flops_per_second": flops / median,
    }


def prepare_step(case, base, profile, place, features):
    """Return a function that takes one training step, or detects, on the first training image."""
    config = load_config(
        CONFIGS / f"{case.config or SEED_CONFIG}.yaml",
        profile=profile,
        overrides=(f"model.name={json.dumps(str(base))}", "lora.rank=16"),
    )
    mixed = config.training.mixed_precision == "bf16"
    dtype = torch.bfloat16 if case.half_base and mixed else torch.float32
    model, processor = load_base(base, dtype=dtype, resolution=config.model.resolution)
    next_batches = batches_of(case, config, model.to(place), processor, features)

    @torch.no_grad()
    def detect():
        for batch in next_batches():
            with torch.autocast(place, torch.bfloat16, enabled=mixed):
                model(**model_inputs(batch, place))

    if not case.config:
        return detect
    adapted = add_lora(model, config.lora).to(place).train()
    if case.checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def train():
        optimizer.zero_grad()
        for batch in next_batches():
            inputs = model_inputs(batch, place)
            if not case.all_masks:
                inputs["mask_rows"] = rows_with_objects(batch["targets"])
            with torch.autocast(place, torch.bfloat16, enabled=mixed):
                outputs = loss_inputs(adapted(**inputs))
            targets = [
                {name: tensor.to(place) for name, tensor in target.items()}
                for target in batch["targets"]
            ]
            sam3_losses(outputs, targets, config.loss.variant)["total"].backward()
        optimizer.step()

    return train


def batches_of(case, config, model, processor, features):
    """Return a function that lists the batches of a step; features are read anew each time."""
    split, cache = read_split(WALL_CRACKS, config.data.train_split), None
    if case.cached:
        cache = BackboneCache(features, model, processor)
        cache.fill(split.records[:1])
    changes = {"num_negatives": case.prompts - 1, "backbone_cache": cache}
    dataset = PromptDataset.from_config(config, split, model, processor, **changes)
    collator = PromptCollator(processor)
    if case.cached:
        return lambda: [collator([dataset[0]])]
    batch = collator([dataset[0]])
    if case.shared:
        return lambda: [batch]
    names = ("input_ids", "attention_mask", "image_index", "targets")
    rows = range(len(batch["targets"]))
    single = [batch | {name: batch[name][row : row + 1] for name in names} for row in rows]
    return lambda: single


def peak_bytes(place):
    """Return the most memory in use: of the accelerator's tensors, else of the process."""
    if place == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def limit_memory():
    """Let a case that is too large fail here, rather than the machine choose what to kill."""
    if sys.platform == "linux":
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limit = int(0.9 * 1024 * int(facts["MemAvailable"].split()[0]))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def measure_apart(case, base, profile, min_seconds):
    """Measure a case in a process of its own; returns numbers, or ``failed`` and the reason."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        job = json.dumps([case.name, str(base), profile, min_seconds, str(output)])
        command = [sys.executable, "-m", "data.benchmarks.measure", "--job", job]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(output.read_text())
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    signs = ("MemoryError", "out of memory", "alloc_cpu")
    no_memory = done.returncode == -9 or any(sign in lines[-1] for sign in signs)
    return {"failed": "out of memory" if no_memory else lines[-1][:200]}


def bench(base, profile, cases=CASES, min_seconds=2.0):
    """Return versions, device and the numbers of every case."""
    config = load_config(CONFIGS / f"{SEED_CONFIG}.yaml", profile=profile)
    place = device()
    if place["device"] == "cpu":
        cpus = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = re.findall(r"model name\s*: (.+)", cpus)
        place["name"] = names[0] if names else platform.machine()
    results = {}
    for case in tqdm(cases, desc="cases", disable=not sys.stderr.isatty()):
        if config.training.mixed_precision == "bf16" or case.name != "train, base in half":
            results[case.name] = measure_apart(case, base, profile, min_seconds)
    return {
        "versions": versions_line(),
        "device": place,
        "base": Path(base).name if Path(base).is_dir() else str(base),
        "resolution": config.model.resolution,
        "cases": results,
    }


def bench_table(document):
    """Return the cases as a table, failed ones with their reason."""
    table = pd.DataFrame.from_dict(document["cases"], orient="index")
    columns = {"median_seconds": 1, "peak_bytes": 1e9, "flops": 1e12, "flops_per_second": 1e12}
    numbers = table.reindex(columns=list(columns)) / pd.Series(columns)
    numbers.columns = ["s", "GB", "TFLOP", "TFLOP/s"]
    return numbers.join(table[["failed"]].fillna("")) if "failed" in table else numbers


def bench_figure(document):
    """Draw time and memory of the cases."""
    table = bench_table(document)[["s", "GB"]].dropna()[::-1]
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(table)), layout="constrained")
    title = (
        f"{document['base']}, {document['resolution']} px, one image: {document['device']['name']}"
    )
    axes = figure.subplots(1, 2, sharey=True)
    if len(table):
        table.plot.barh(subplots=True, ax=axes, legend=False, title=["seconds", "peak GB"])
    figure.suptitle(title, fontsize=10)
    return figure


def main(arguments=None):
    """Run the benchmark; print a table, write its numbers as JSON and a figure."""
    parser = argparse.ArgumentParser(prog="python -m data.benchmarks.measure", description=__doc__)
    parser.add_argument("--profile", default="tiny", help="tiny (default) or sam3")
    parser.add_argument("--random", action="store_true", help="full size with random weights")
    parser.add_argument("--only", nargs="+", default=[""], help="start of the names of cases")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="per case, default 2")
    parser.add_argument("--name", help="of the files; by default device and base")
    parser.add_argument("--publish", action="store_true", help="write to data/benchmarks")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        name, *job, output = json.loads(options.job)
        limit_memory()
        [case] = [case for case in CASES if case.name == name]
        write_json(output, measure(case, *job))
        return
    if options.random:
        options.profile, base = "sam3", RANDOM_BASE
        if not (base / "model.safetensors").is_file():
            write_random_base(base)
    else:
        base = load_config(CONFIGS / f"{SEED_CONFIG}.yaml", profile=options.profile).model.name
        base = resolve(base) if resolve(base).is_dir() else base
    cases = [case for case in CASES if case.name.startswith(tuple(options.only))]
    document = bench(base, options.profile, cases, options.min_seconds)
    folder = DATA / "benchmarks" if options.publish else RUNS / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    label = options.name or f"{document['device']['name']} {document['base']}"
    stem = folder / re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    write_json(stem.with_suffix(".json"), document)
    bench_figure(document).savefig(stem.with_suffix(".png"), dpi=100)
    print(bench_table(document).to_string(float_format="{:.3g}".format))
    print(f"written: {stem}.json and .png")


if __name__ == "__main__":
    main()
