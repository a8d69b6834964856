"""The command ``plan``; see `helpers.commands` for the form."""

from __future__ import annotations

from helpers.errors import InputError
from helpers.paths import resolve


def plan(args):
    """Predict memory and time of a training run; status 1 if the config does not fit as it is."""
    from helpers.config import load_config
    from helpers.environment import device
    from helpers.memory_plan import GIB
    from helpers.memory_plan import plan as make_plan
    from helpers.plan_text import plan_text

    overrides = list(args.set)
    if args.data is not None:
        overrides.append(f"data.data_dir={resolve(args.data)}")
    config = load_config(args.config, profile=args.profile, overrides=overrides)
    facts = device()
    gpu_gib = facts["memory_gib"] if args.gpu_memory is None else args.gpu_memory
    if gpu_gib is None:
        raise InputError(
            "no GPU is here whose memory could be asked",
            where="--gpu-memory",
            fix="give the memory of the GPU you mean in GiB, for example --gpu-memory 16",
        )
    for name, value in (("--gpu-memory", gpu_gib), ("--tflops", args.tflops)):
        if value is not None and not value > 0:
            raise InputError(f"{value:g} is not above 0", where=name)
    made = make_plan(config, gpu_gib * GIB, _rate(args.tflops, facts["device"], config))
    return (0 if made.candidates[0].fits else 1), made.to_json(), plan_text(made, config)


def _rate(tflops, place, config):
    """Return the rate given or that of the GPU here, in operations per second; None without both."""
    import torch

    from helpers.device_rate import matmul_rate

    if tflops is not None:
        return tflops * 1e12
    if place == "cpu":
        return None
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    return matmul_rate(place, dtypes[config.training.mixed_precision])
