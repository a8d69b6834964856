"""What the controlled experiment varies: its designs, and the config of every run in them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from helpers.config import load_config
from helpers.errors import InputError
from helpers.files import CONFIGS
from helpers.model.lora import COMPONENTS

SEEDS = (1, 2, 3, 4, 5)
PARTS = tuple(name for name in COMPONENTS if name != "geometry_encoder")
"""Components that a text prompt passes through, in the order of the forward pass."""
EQUAL_RANK = 16
EQUAL_PARAMETERS = 36_864
"""LoRA on the text encoder of the embedded base at rank 16; other parts get the nearest rank."""
_BATCH = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
_SHORT = {
    "tiny": {"causes": ("scale.num_epochs=0.1",), "components": ("scale.num_epochs=0.06",)},
}
"""Five and three epochs in place of ten on the embedded base, so that 210 runs take two hours."""


@dataclass(frozen=True)
class Cell:
    """One run of a design.

    Attributes
    ----------
    design : str
        Key of `DESIGNS`.
    factors : dict
        What is varied: name to level, in the order of the design.
    seed : int
        Of LoRA's start, the order of the images, and the draw of absent prompts.
    config_name : str
        ``"crack_detection"`` or ``"full_lora"``.
    overrides : tuple of str
        Settings on top of config and profile.
    objects_read : bool
        False trains and validates on what the failing script's reader returned.
    """

    design: str
    factors: dict
    seed: int
    config_name: str
    overrides: tuple[str, ...]
    objects_read: bool = True

    @property
    def name(self):
        """str: unique in its design, usable as a file name."""
        levels = [f"{key}-{value}" for key, value in self.factors.items()]
        return "_".join([*levels, f"seed-{self.seed}"]).replace(" ", "-")

    def config(self, profile, data_dir):
        """Return the `helpers.config.Config` of the run."""
        short = _SHORT.get(profile, {}).get(self.design, ())
        settings = [("data.data_dir", str(data_dir)), ("training.seed", self.seed)]
        path = CONFIGS / f"{self.config_name}_config.yaml"
        return load_config(path, profile, [*settings, *_BATCH, *short, *self.overrides])


def causes_design(seeds):
    """Cross the four suspects: objects read, training prompt, text LoRA, absent prompts.

    Parameters
    ----------
    seeds : sequence of int

    Returns
    -------
    list of Cell
        16 per seed.
    """
    levels = product(seeds, ("no", "yes"), ("object", "crack"), ("off", "on"), (0, 3))
    cells = []
    for seed, read, prompt, text, negatives in levels:
        factors = {"objects": read, "prompt": prompt, "text_lora": text, "negatives": negatives}
        overrides = (
            f"data.prompt={prompt if prompt == 'object' else 'null'}",
            f"lora.apply_to_text_encoder={'true' if text == 'on' else 'false'}",
            f"data.num_negatives={negatives}",
        )
        cells.append(
            Cell("causes", factors, seed, "crack_detection", overrides, objects_read=read == "yes")
        )
    return cells


def components_design(seeds):
    """Put LoRA on each component alone, on all, and on all but one, at equal rank and size.

    Parameters
    ----------
    seeds : sequence of int

    Returns
    -------
    list of Cell
        22 per seed: eleven choices at rank 16, and again at about 36,864 parameters.
    """
    choices = {f"only {part}": (part,) for part in PARTS} | {"all": PARTS}
    choices |= {f"all but {part}": tuple(p for p in PARTS if p != part) for part in PARTS}
    cells = []
    for seed, equal, (choice, parts) in product(seeds, ("rank", "size"), choices.items()):
        rank = EQUAL_RANK if equal == "rank" else _rank_for(parts)
        names = ["q_proj", "k_proj", "v_proj", "out_proj"]
        if parts != ("mask_decoder",):  # its only feed-forward layers are convolutions
            names += ["fc1", "fc2"]
        overrides = (
            *(f"lora.apply_to_{part}={'true' if part in parts else 'false'}" for part in PARTS),
            f"lora.target_modules=[{', '.join(names)}]",
            f"lora.rank={rank}",
            f"lora.alpha={2 * rank}",
            "data.num_negatives=1",
        )
        factors = {"equal": equal, "lora_on": choice}
        cells.append(Cell("components", factors, seed, "crack_detection", overrides))
    return cells


_PARAMETERS_AT_RANK_1 = {
    "vision_encoder": 6144,
    "text_encoder": 2304,
    "detr_encoder": 3328,
    "detr_decoder": 6528,
    "mask_decoder": 512,
}
"""Of the embedded base, all names of the config's ``target_modules``; a test counts them."""
_FULL_RANK = 64


def _rank_for(parts):
    """Return the rank at which some components have about `EQUAL_PARAMETERS`."""
    per_rank = sum(_PARAMETERS_AT_RANK_1[part] for part in parts)
    return min(max(1, round(EQUAL_PARAMETERS / per_rank)), _FULL_RANK)


def schedule_design(seeds):
    """Cross the document's two schedules with text LoRA, all else equal.

    Parameters
    ----------
    seeds : sequence of int

    Returns
    -------
    list of Cell
        4 per seed. ``failing`` is 20 epochs, 1000 warm-up steps and 5e-5; ``fixed`` is 50 epochs,
        100 warm-up steps and 1e-4; a profile scales both alike.
    """
    schedules = {"failing": (20, 1000, 5e-5), "fixed": (50, 100, 1e-4)}
    cells = []
    for seed, name, text in product(seeds, schedules, ("off", "on")):
        epochs, warmup, rate = schedules[name]
        overrides = (
            f"training.num_epochs={epochs}",
            f"training.warmup_steps={warmup}",
            f"training.learning_rate={rate}",
            f"lora.apply_to_text_encoder={'true' if text == 'on' else 'false'}",
        )
        factors = {"schedule": name, "text_lora": text}
        cells.append(Cell("schedule", factors, seed, "crack_detection", overrides))
    return cells


DESIGNS = {
    "causes": causes_design,
    "schedule": schedule_design,
    "components": components_design,
}


def cells_of(design, seeds=SEEDS):
    """List the runs of a design, one seed after the other.

    Parameters
    ----------
    design : str
        Key of `DESIGNS`.
    seeds : sequence of int

    Returns
    -------
    list of Cell

    Raises
    ------
    InputError
        If there is no such design, or no seed.
    """
    if design not in DESIGNS:
        raise InputError(f"there is no design {design!r}", fix=f"use one of {', '.join(DESIGNS)}")
    if not seeds:
        raise InputError("no seed is given", fix="give at least one, better five")
    return DESIGNS[design](seeds)
