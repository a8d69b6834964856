"""Time training and detection on this device, case by case, against a plain baseline."""

from __future__ import annotations

import argparse
import atexit
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

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import Sam3Config, Sam3Model, Sam3Processor

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.environment import device, versions_line
from helpers.errors import InputError
from helpers.files import (
    CONFIGS,
    DATA,
    ROOT,
    RUNS,
    TINY_BASE,
    WALL_CRACKS,
    resolve,
    staged_folder,
    write_json,
)
from helpers.model.cache import BackboneCache
from helpers.model.lora import add_lora
from helpers.model.losses import sam3_losses
from helpers.model.prompted import checkpoint_activations, loss_inputs, model_inputs
from helpers.model.sam3 import load_base
from helpers.show.charts import COLOURS, HATCHES, dress

NUM_PARAMETERS = 840_376_374


def write_random_base(folder, seed=0):
    """Write a base with the architecture of ``facebook/sam3`` and random weights.

    Time and memory of a step do not depend on the values of the weights, so they can be measured on
    it. It detects nothing. The tokenizer is that of the embedded base, whose ids are all valid.

    Parameters
    ----------
    folder : os.PathLike
        Gets 1.7 GB, in bfloat16; `helpers.model.sam3.load_base` reads it.
    seed : int
        For the weights.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Sam3Model(Sam3Config())
    finally:
        torch.set_default_dtype(default)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        processor = Sam3Processor.from_pretrained(TINY_BASE)
        processor.save_pretrained(staging)
    return folder


if __name__ == "__main__":
    print(write_random_base(resolve(sys.argv[1])))


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
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": [round(one, 5) for one in seconds],
        "median_seconds": round(statistics.median(seconds), 5),
        "peak_bytes": _peak_bytes(place),
        "flops": counter.get_total_flops(),
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
    changes = {"num_negatives": case.prompts - 1, "backbone_cache": cache}
    dataset = PromptDataset.from_config(config, split, model, processor, **changes)
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
    """Measure the case of an index and write it to a file; see `data.benchmarks.measure`."""
    index, base, profile, min_seconds, output = arguments
    _limit_memory()
    result = measure(CASES[int(index)], base, profile, float(min_seconds))
    Path(output).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])


BENCHMARKS = DATA / "benchmarks"
RANDOM_BASE = RUNS / "random_sam3"
_NO_MEMORY = ("MemoryError", "out of memory", "alloc_cpu")


def bench(base, profile, *, cases=CASES, min_seconds=2.0):
    """Measure cases, each in a process of its own.

    Parameters
    ----------
    base : str
        Folder or name of the base.
    profile : str
        Overlay of the configurations: precision and resolution.
    cases : sequence of data.benchmarks.measure.Case
    min_seconds : float
        See `data.benchmarks.measure.measure`.

    Returns
    -------
    dict
        ``versions``, ``device``, ``base``, ``resolution``, ``training_prompts``,
        and ``cases``: per name ``median_seconds``, ``seconds``, ``images_per_second``,
        ``peak_bytes``, ``flops``, ``flops_per_second``; or ``failed``, a reason.
    """
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile=profile)
    place = device()
    if place["device"] == "cpu":
        place["name"] = _cpu_name()
    half = config.training.mixed_precision == "bf16"
    results = {}
    for case in tqdm(cases, desc="cases", disable=not sys.stderr.isatty()):
        if half or case.name != "train, base in half":  # else the same as the case before
            results[case.name] = _with_rates(_in_own_process(case, base, profile, min_seconds))
    return {
        "versions": versions_line(),
        "device": place,
        "base": Path(base).name if Path(base).is_dir() else base,
        "resolution": config.model.resolution,
        "training_prompts": TRAINING_PROMPTS,
        "cases": results,
    }


def _cpu_name():
    """Return the name of the processor, or of its architecture where the system does not tell."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _in_own_process(case, base, profile, min_seconds):
    """Run a case in a new process; returns what it measured, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        arguments = [str(CASES.index(case)), str(base), profile, str(min_seconds), str(output)]
        done = subprocess.run(
            [sys.executable, "-m", "data.benchmarks.measure", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return json.loads(output.read_text(encoding="utf-8"))
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    no_memory = done.returncode == -9 or any(sign in lines[-1] for sign in _NO_MEMORY)
    return {"failed": "out of memory" if no_memory else lines[-1][:200]}


def _with_rates(result):
    """Add what follows from the measured numbers."""
    if "failed" in result:
        return result
    speed = result["flops"] / result["median_seconds"]
    return result | {
        "images_per_second": 1 / result["median_seconds"],
        "flops_per_second": speed,
    }


def bench_text(document):
    """Return the table of a benchmark.

    Parameters
    ----------
    document : dict
        From `bench`.

    Returns
    -------
    str
    """
    lines = [
        f"{document['base']} at {document['resolution']} px on {document['device']['name']} "
        f"({document['device']['device']}, {document['device']['torch_threads']} threads)",
        f"{'case':<30}{'s':>9}{'GB':>8}{'TFLOP':>9}{'TFLOP/s':>9}",
    ]
    for name, case in document["cases"].items():
        if "failed" in case:
            lines.append(f"{name:<30}{case['failed']}")
            continue
        lines.append(
            f"{name:<30}{case['median_seconds']:>9.3g}{case['peak_bytes'] / 1e9:>8.1f}"
            f"{case['flops'] / 1e12:>9.3g}{case['flops_per_second'] / 1e12:>9.3g}"
        )
    return "\n".join(lines)


def bench_figure(document):
    """Draw time and memory of the cases.

    Parameters
    ----------
    document : dict
        From `bench`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    cases = {name: one for name, one in document["cases"].items() if "failed" not in one}
    names = list(cases)[::-1]
    figure = Figure(figsize=(9, 0.5 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, key, scale, label in (
        (left, "median_seconds", 1, "seconds"),
        (right, "peak_bytes", 1e-9, "peak memory in GB"),
    ):
        for row, name in enumerate(names):
            value, kind = cases[name][key] * scale, int(name.startswith("detect"))
            ax.barh(row, value, color=COLOURS[kind], hatch=HATCHES[kind], edgecolor="white")
            ax.annotate(f" {value:.3g}", (value, row), va="center", fontsize=8)
        dress(ax, label, "")
        ax.margins(x=0.15)
    left.set_yticks(range(len(names)), names)
    figure.suptitle(
        f"{document['base']}, {document['resolution']} px, one image: {document['device']['name']}",
        fontsize=10,
    )
    return figure


def main(arguments=None):
    """Run the benchmark; print a table, write its numbers as JSON and a figure.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program name.

    Returns
    -------
    int
        0 done, 2 unusable input.
    """
    parser = argparse.ArgumentParser(prog="python -m data.benchmarks.measure", description=__doc__)
    parser.add_argument("--profile", default="tiny", help="tiny (default) or sam3")
    parser.add_argument("--random", action="store_true", help="full size with random weights")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="start of the names of cases")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="per case, default 2")
    parser.add_argument("--name", help="of the files; by default device and base")
    parser.add_argument(
        "--publish", action="store_true", help="write to data/benchmarks, not to runs/benchmarks"
    )
    options = parser.parse_args(arguments)
    try:
        document = bench(
            _base(options),
            "sam3" if options.random else options.profile,
            cases=[one for one in CASES if _wanted(one, options.only)],
            min_seconds=options.min_seconds,
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    folder = BENCHMARKS if options.publish else RUNS / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    label = options.name or f"{document['device']['name']} {document['base']}"
    stem = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    write_json(folder / f"{stem}.json", document)
    bench_figure(document).savefig(folder / f"{stem}.png", dpi=100)
    print(bench_text(document))
    print(f"written: {folder / stem}.json and .png")
    return 0


def _base(options):
    """Return the base that the options name; a random one is written if there is none yet."""
    if not options.random:
        name = load_config(
            CONFIGS / "crack_detection_config.yaml", profile=options.profile
        ).model.name
        return str(resolve(name)) if resolve(name).is_dir() else name
    if not (RANDOM_BASE / "model.safetensors").is_file():
        write_random_base(RANDOM_BASE)
    return str(RANDOM_BASE)


def _wanted(case, starts):
    """Tell whether a case is to be measured."""
    return starts is None or any(case.name.startswith(start) for start in starts)


if __name__ == "__main__":
    sys.exit(main())
