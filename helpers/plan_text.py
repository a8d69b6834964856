"""A memory plan in words."""

from __future__ import annotations

from helpers.device_rate import PUBLISHED_TFLOPS
from helpers.memory_plan import EFFICIENCY, GIB, RESERVE_GIB
from helpers.plan_ladder import set_arguments


def plan_text(made, config):
    """Write a plan as a table with a recommendation.

    Parameters
    ----------
    made : helpers.memory_plan.Plan
    config : helpers.config.Config
        That it was made for.

    Returns
    -------
    str
    """
    counts, first = made.counts, made.candidates[0]
    batch, steps = config.training.batch_size, config.training.gradient_accumulation_steps
    lines = [
        *(f"note: {note}" for note in made.notes),
        f"{batch} x {steps} images per optimiser step, at most {counts.max_prompts} prompts per image "
        f"({counts.mean_prompts:.1f} on average), from {counts.source}",
        "GiB: "
        f"frozen weights {first.step.base_bytes / GIB:.2f}, adapters with gradients and AdamW "
        f"{first.step.adapter_bytes / GIB:.2f}, kept for the backward pass "
        f"{first.step.kept_bytes / GIB:.2f}",
        "",
        f"{'setting':<22}{'peak GiB':>9}{'time':>7}  fits {made.gpu_bytes / GIB:g} GiB",
    ]
    for one in made.candidates:
        prefix = "" if one is first else "+ "
        peak = one.step.peak_bytes / GIB
        lines.append(
            f"{prefix + one.name:<22}{peak:>9.1f}{one.time_factor:>6.2f}x  "
            f"{'yes' if one.fits else 'no'}"
        )
    lines += [
        "",
        f"{RESERVE_GIB:g} GiB is kept free for what is not counted: CUDA context, workspaces, gaps.",
    ]
    lines.append(_time_line(made))
    lines.append(_verdict(made.chosen, first, config))
    return "\n".join(lines)


def _verdict(chosen, first, config):
    """Write what to do."""
    if chosen is None:
        frozen = not config.lora.apply_to_vision_encoder
        freeze = "" if frozen else ", or set lora.apply_to_vision_encoder=false"
        return f"nothing in this table fits: take a larger GPU{freeze}"
    if chosen is first:
        return "the config fits as it is"
    arguments = " ".join(f"--set {one}" for one in set_arguments(chosen.changes))
    return f"fits with: {arguments} (time {chosen.time_factor:.2f}x)"


def _time_line(made):
    """Write the estimate of an epoch, or what is missing for one."""
    if made.epoch_flops is None:
        return "time of an epoch: unknown without the data"
    work = f"an epoch with its validation is {made.epoch_flops / 1e15:.2f} x 10^15 operations"
    if made.seconds_per_epoch is None:
        known = ", ".join(f"{name} {rate}" for name, rate in PUBLISHED_TFLOPS.items())
        return f"{work}; for its time give --tflops (dense bfloat16: {known})"
    return (
        f"{work}, an estimated {made.seconds_per_epoch / 60:.1f} min at {EFFICIENCY:.0%} of "
        f"{made.rate / 1e12:.0f} x 10^12 per second"
    )
