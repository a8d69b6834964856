"""Which settings let a training run fit a GPU, and how long an epoch takes, before it is run.

The candidates form a ladder: each gives up more than the one before, and all of them see the same
number of images per optimiser step. Memory is that of the worst batch, in which every image has as
many prompts as the one with the most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from transformers import Sam3Config

from helpers.errors import InputError
from helpers.plan_ladder import changed, ladder, set_arguments
from helpers.prompt_counts import PromptCounts, count_prompts
from helpers.sam3 import base_config
from helpers.step_trace import StepLoad, StepTrace, StepTracer

GIB = 2**30
RESERVE_GIB = 1.0
"""Kept free for what is not traced: CUDA context, workspaces of kernels, fragmentation."""
EFFICIENCY = 0.3
"""Share of the rate of large matrix products that training is assumed to reach."""
_DEFAULT_SHAPE = "facebook/sam3"


@dataclass(frozen=True)
class Candidate:
    """One setting and what it needs.

    Attributes
    ----------
    name : str
        What it changes, for the table.
    changes : dict
        ``section.key`` to value; empty for the config as it is.
    step : helpers.step_trace.StepTrace
        Of the worst batch.
    time_factor : float
        Time per image relative to the config as it is, by floating-point operations.
    fits : bool
        Whether the peak and the reserve fit.
    """

    name: str
    changes: dict
    step: StepTrace
    time_factor: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs and what to change.

    Attributes
    ----------
    notes : list of str
        What was assumed.
    counts : helpers.prompt_counts.PromptCounts
    gpu_bytes : int
    candidates : list of Candidate
        First the config as it is, then what gives up more and more.
    epoch_flops : float or None
        Of the config as it is: training, and validation after it. None without data.
    rate : float or None
        Operations per second of large matrix products, where known.
    """

    notes: list
    counts: PromptCounts
    gpu_bytes: int
    candidates: list
    epoch_flops: float | None
    rate: float | None

    @property
    def chosen(self):
        """Candidate or None: the first that fits."""
        return next((one for one in self.candidates if one.fits), None)

    @property
    def seconds_per_epoch(self):
        """Time of an epoch of the config as it is, an estimate; None where something is unknown."""
        known = self.rate is not None and self.epoch_flops is not None
        return self.epoch_flops / (self.rate * EFFICIENCY) if known else None

    def to_json(self):
        """Return the plan as a JSON document, sizes in bytes.

        Returns
        -------
        dict
        """
        chosen = self.chosen
        return {
            "fits": self.candidates[0].fits,
            "set": None if chosen is None else set_arguments(chosen.changes),
            "gpu_bytes": self.gpu_bytes,
            "reserve_bytes": int(RESERVE_GIB * GIB),
            "prompts": self.counts._asdict(),
            "epoch_flops": self.epoch_flops,
            "matmul_rate": self.rate,
            "efficiency": EFFICIENCY,
            "seconds_per_epoch": self.seconds_per_epoch,
            "notes": self.notes,
            "candidates": [
                asdict(one) | {"step": one.step._asdict(), "set": set_arguments(one.changes)}
                for one in self.candidates
            ],
        }


def plan(config, gpu_bytes, rate=None):
    """Predict memory and time of a training run, and of settings that need less.

    Parameters
    ----------
    config : helpers.config.Config
    gpu_bytes : int
        Memory of the GPU.
    rate : float, optional
        Operations per second of its large matrix products, see `helpers.device_rate`.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        If the base cannot be read, the data gives no query, or LoRA matches no layer.
    """
    shape, notes = base_shape(config)
    counts = count_prompts(config)
    steps, candidates, per_image = _Steps(shape, counts), [], None
    for name, changes in ladder(config, shape):
        setting = changed(config, changes)
        fewer = config.data.num_negatives - setting.data.num_negatives
        step = steps.trace(setting, max(counts.max_prompts - fewer, 1))
        flops = step.step_flops / setting.training.batch_size
        per_image = per_image or flops
        fits = step.peak_bytes + RESERVE_GIB * GIB <= gpu_bytes
        candidates.append(Candidate(name, changes, step, flops / per_image, fits))
    epoch_flops = None
    if counts.train_images is not None:
        epoch_flops = _epoch_flops(steps, config, counts)
    return Plan(notes, counts, int(gpu_bytes), candidates, epoch_flops, rate)


def base_shape(config):
    """Read the configuration of the base.

    Parameters
    ----------
    config : helpers.config.Config

    Returns
    -------
    shape : transformers.Sam3Config
    notes : list of str
        What had to be assumed: without access to ``facebook/sam3`` the defaults of the library are
        taken, which have its shape.

    Raises
    ------
    InputError
        If another base cannot be read, or its patches do not divide ``model.resolution``.
    """
    model, notes = config.model, []
    try:
        shape = base_config(model.name, model.revision)
    except InputError as error:
        if model.name != _DEFAULT_SHAPE:
            raise
        shape = Sam3Config()  # its defaults are this model
        notes.append(
            f"{model.name} is taken to have the default shape of Sam3Config, since {error.message}"
        )
    patch = shape.vision_config.backbone_config.patch_size
    if model.resolution % patch:
        raise InputError(
            f"{model.resolution} is not a multiple of the patch of {patch} pixels",
            where="model.resolution",
            fix=f"use {round(model.resolution / patch) * patch}",
        )
    return shape, notes


class _Steps:
    """Traced steps; of batches of more than two images the line through one and two is taken."""

    def __init__(self, shape, counts):
        self.shape, self.counts = shape, counts
        self._tracers, self._traced = {}, {}

    def trace(self, config, num_prompts):
        """Return the step of a config when every image has as many prompts."""
        images = config.training.batch_size
        if images > 2:
            one, two = (self._exact(config, n, num_prompts) for n in (1, 2))
            pairs = zip(one, two, strict=True)
            return StepTrace(*(low + (images - 1) * (high - low) for low, high in pairs))
        return self._exact(config, images, num_prompts)

    def _exact(self, config, images, num_prompts):
        """Trace a batch, once."""
        tracer_key = (config.model.resolution, config.training.gradient_checkpointing)
        key = (*tracer_key, images, num_prompts)
        if tracer_key not in self._tracers:
            self._tracers[tracer_key] = StepTracer(self.shape, config)
        if key not in self._traced:
            objects = (self.counts.max_objects,) * min(self.counts.max_present, num_prompts)
            load = StepLoad(images, images * num_prompts, objects * images)
            self._traced[key] = self._tracers[tracer_key].trace(load)
        return self._traced[key]


def _epoch_flops(steps, config, counts):
    """Return the operations of an epoch, training and validation, by the means of the prompts."""
    single = changed(config, {"training.batch_size": 1})
    most = max(counts.max_prompts, 2)
    one, many = (steps.trace(single, prompts) for prompts in (1, most))

    def at(name, prompts):
        low, high = getattr(one, name), getattr(many, name)
        return low + (prompts - 1) * (high - low) / (most - 1)

    training = counts.train_images * at("step_flops", counts.mean_prompts)
    return training + counts.val_images * at("forward_flops", counts.val_prompts)
