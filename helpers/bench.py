"""Time training and detection on this device, case by case, against a plain baseline."""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from helpers.bench_cases import CASES, TRAINING_PROMPTS
from helpers.charts import COLOURS, HATCHES, dress
from helpers.config import load_config
from helpers.device_rate import matmul_rate
from helpers.environment import device, versions_line
from helpers.errors import InputError
from helpers.files import write_json
from helpers.full_size import write_random_base
from helpers.paths import CONFIGS, DATA, ROOT, RUNS, resolve

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
    cases : sequence of helpers.bench_cases.Case
    min_seconds : float
        See `helpers.bench_cases.measure`.

    Returns
    -------
    dict
        ``versions``, ``device``, ``base``, ``resolution``, ``training_prompts``,
        ``matmul_flops_per_second`` (measured, of square products in the precision of the run) and
        ``cases``: per name ``median_seconds``, ``seconds``, ``images_per_second``, ``peak_bytes``,
        ``flops``, ``flops_per_second``, ``share_of_matmul_rate``; or ``failed``, a reason.
    """
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile=profile)
    place = device()
    if place["device"] == "cpu":
        place["name"] = _cpu_name()
    half = config.training.mixed_precision == "bf16"
    rate = matmul_rate(place["device"], torch.bfloat16 if half else torch.float32)
    results = {}
    for case in tqdm(cases, desc="cases", disable=not sys.stderr.isatty()):
        if half or case.name != "train, base in half":  # else the same as the case before
            results[case.name] = _with_rates(
                _in_own_process(case, base, profile, min_seconds), rate
            )
    return {
        "versions": versions_line(),
        "device": place,
        "base": Path(base).name if Path(base).is_dir() else base,
        "resolution": config.model.resolution,
        "training_prompts": TRAINING_PROMPTS,
        "matmul_flops_per_second": rate,
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
            [sys.executable, "-m", "helpers.bench_cases", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return json.loads(output.read_text(encoding="utf-8"))
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    no_memory = done.returncode == -9 or any(sign in lines[-1] for sign in _NO_MEMORY)
    return {"failed": "out of memory" if no_memory else lines[-1][:200]}


def _with_rates(result, rate):
    """Add what follows from the measured numbers."""
    if "failed" in result:
        return result
    speed = result["flops"] / result["median_seconds"]
    return result | {
        "images_per_second": 1 / result["median_seconds"],
        "flops_per_second": speed,
        "share_of_matmul_rate": speed / rate,
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
        f"({document['device']['device']}, {document['device']['torch_threads']} threads); "
        f"matrix products reach {document['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
        f"{'case':<30}{'s':>9}{'GB':>8}{'TFLOP':>9}{'TFLOP/s':>9}{'of matmul':>11}",
    ]
    for name, case in document["cases"].items():
        if "failed" in case:
            lines.append(f"{name:<30}{case['failed']}")
            continue
        lines.append(
            f"{name:<30}{case['median_seconds']:>9.3g}{case['peak_bytes'] / 1e9:>8.1f}"
            f"{case['flops'] / 1e12:>9.3g}{case['flops_per_second'] / 1e12:>9.3g}"
            f"{case['share_of_matmul_rate']:>11.0%}"
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
    parser = argparse.ArgumentParser(prog="python -m helpers.bench", description=__doc__)
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
