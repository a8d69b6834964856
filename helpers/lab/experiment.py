"""The controlled experiment: its designs, and the run of one cell of them.

``python -m data.experiments.make`` runs all cells. What they show depends on how well the base knows
the word that it is taught, so the first factor of the main design is the base.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.detect.metrics import coco_ap, evaluate_queries
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.files import CONFIGS, DATA, ROOT, WALL_CRACKS, read_json
from helpers.lab.spoil import read_split_wrong_keys
from helpers.model.lora import COMPONENTS
from helpers.model.sam3 import best_device, load_base
from helpers.train.training import train

SEEDS = (1, 2, 3, 4, 5)
PARTS = tuple(name for name in COMPONENTS if name != "geometry_encoder")
"""Components that a text prompt passes through, in the order of the forward pass."""
EQUAL_RANK = 16
EQUAL_PARAMETERS = 36_864
"""LoRA on the text encoder of the embedded base at rank 16; other parts get the nearest rank."""
PARAMETERS_AT_RANK_1 = {
    "vision_encoder": 6144,
    "text_encoder": 2304,
    "detr_encoder": 3328,
    "detr_decoder": 6528,
    "mask_decoder": 512,
}
"""Of the embedded base, all names of the config's ``target_modules``; a test counts them."""
FULL_RANK = 64
BATCH = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
WORD_BASES = {
    "never": "data/tiny_sam3",
    "quarter": "runs/bases/quarter",
    "half": "data/tiny_sam3_half_known",
    "most": "runs/bases/most",
    "half_shut": "runs/bases/half_shut",
    "control": "runs/bases/control",
}
"""How well a base knows the word, and the base; what is not in the repository is made on demand."""
SHORTER = {("tiny", "causes"): 0.1, ("tiny", "steps"): 0.1, ("tiny", "components"): 0.06}
"""Share of the config's epochs by profile and design: 210 runs of the base then take two hours."""

SUSPECTS = {
    "objects": ("no", "yes"),
    "prompt": ("object", "crack"),
    "text_lora": ("off", "on"),
    "negatives": (0, 3),
}
"""Factors of the main design with their levels: the failing run's first, then the working one's."""
TABLES = DATA / "experiments"
"""The committed tables, one CSV file per design and ``base.csv``."""
DATA_DIR = str(WALL_CRACKS.relative_to(ROOT))
"""Relative, so that the hash of a config is the same on every machine."""
KNOWN_THINGS = DATA / "known_things"
"""32 walls with what the embedded base knows, and ``prompts.json``: what is asked on each."""
TEXT_COLUMNS = {"config_hash": str, "code_version": str}
"""Hashes may consist of digits, which a reader of tables would take for numbers."""
OF_EVALUATION = {
    "detected_share": "max_score_present_share_above",
    "max_score": "max_score_present",
    "AP50": "AP50",
    "union_iou": "union_iou",
    "cgF1": "cgF1",
    "IL_MCC": "IL_MCC",
    "false_positive_rate": "max_score_absent_share_above",
}
RESPONSES = (*OF_EVALUATION, "presence_prob", "max_query_prob", "retention_AP", "retention_AP50")
"""What is measured on the test split and, for retention, on walls with the base's own concepts."""


@dataclass(frozen=True)
class Cell:
    """One run of a design.

    Attributes
    ----------
    factors : dict
        What is varied: name to level, in the order of the design.
    seed : int
        Of LoRA's start, the order of the images, and the draw of absent prompts.
    overrides : tuple of str
        Settings on top of config and profile.
    objects_read : bool
        False trains and validates on what the failing script's reader returned.
    """

    design: str
    factors: dict
    seed: int
    overrides: tuple[str, ...]
    objects_read: bool = True

    @property
    def name(self):
        """str: unique in its design, usable as a file name."""
        levels = [f"{key}-{value}" for key, value in self.factors.items()]
        return "_".join([*levels, f"seed-{self.seed}"]).replace(" ", "-")

    def config(self, profile, data_dir):
        """Return the `helpers.config.Config` of the run."""
        settings = [("data.data_dir", str(data_dir)), ("training.seed", self.seed)]
        if profile == "tiny" and "word" in self.factors:
            settings.append(("model.name", WORD_BASES[self.factors["word"]]))
        if (profile, self.design) in SHORTER:
            settings.append(("scale.num_epochs", SHORTER[profile, self.design]))
        path = CONFIGS / "crack_detection_config.yaml"
        return load_config(path, profile, [*settings, *BATCH, *self.overrides])


def causes_design(seeds):
    """Cross how well the word is known with objects read, training prompt, text LoRA, absent prompts."""
    levels = (("never", "half"), *SUSPECTS.values())
    return [
        _causes_cell("causes", dict(zip(("word", *SUSPECTS), chosen, strict=True)), seed)
        for seed, *chosen in product(seeds, *levels)
    ]


def steps_design(seeds):
    """Change one thing at a time, from the failing and from the working state, on other bases."""
    cells = []
    for seed, word, end in product(seeds, ("quarter", "most", "half_shut", "control"), (0, 1)):
        state = {"word": word} | {name: levels[end] for name, levels in SUSPECTS.items()}
        changes = [{}, *({name: levels[1 - end]} for name, levels in SUSPECTS.items())]
        cells += [_causes_cell("steps", state | change, seed) for change in changes]
    return cells


def _causes_cell(design, factors, seed):
    overrides = (
        f"data.prompt={'object' if factors['prompt'] == 'object' else 'null'}",
        _flag("text_encoder", factors["text_lora"] == "on"),
        f"data.num_negatives={factors['negatives']}",
    )
    return Cell(design, factors, seed, overrides, objects_read=factors["objects"] == "yes")


def components_design(seeds):
    """Put LoRA on each component, on all, and on all but one, at equal rank and at equal size."""
    choices = {f"only {part}": (part,) for part in PARTS} | {"all": PARTS}
    choices |= {f"all but {part}": tuple(p for p in PARTS if p != part) for part in PARTS}
    cells = []
    for seed, equal, (choice, parts) in product(seeds, ("rank", "size"), choices.items()):
        rank = EQUAL_RANK if equal == "rank" else rank_of_equal_size(parts)
        names = ["q_proj", "k_proj", "v_proj", "out_proj"]
        if parts != ("mask_decoder",):  # its only feed-forward layers are convolutions
            names += ["fc1", "fc2"]
        overrides = (
            *(_flag(part, part in parts) for part in PARTS),
            f"lora.target_modules=[{', '.join(names)}]",
            f"lora.rank={rank}",
            f"lora.alpha={2 * rank}",
            "data.num_negatives=1",
        )
        cells.append(Cell("components", {"equal": equal, "lora_on": choice}, seed, overrides))
    return cells


def schedule_design(seeds):
    """Cross the document's two schedules with text LoRA; a profile scales both alike."""
    schedules = {"failing": (20, 1000, 5e-5), "fixed": (50, 100, 1e-4)}
    cells = []
    for seed, name, text in product(seeds, schedules, ("off", "on")):
        epochs, warmup, rate = schedules[name]
        overrides = (
            f"training.num_epochs={epochs}",
            f"training.warmup_steps={warmup}",
            f"training.learning_rate={rate}",
            _flag("text_encoder", text == "on"),
        )
        cells.append(Cell("schedule", {"schedule": name, "text_lora": text}, seed, overrides))
    return cells


DESIGNS = {
    "causes": causes_design,
    "steps": steps_design,
    "schedule": schedule_design,
    "components": components_design,
}
"""Name to a function that lists the cells for some seeds."""


def _flag(part, is_on):
    return f"lora.apply_to_{part}={str(is_on).lower()}"


def rank_of_equal_size(parts):
    """Return the rank at which some components have about `EQUAL_PARAMETERS`."""
    per_rank = sum(PARAMETERS_AT_RANK_1[part] for part in parts)
    return min(max(1, round(EQUAL_PARAMETERS / per_rank)), FULL_RANK)


def cells_of(design, seeds=SEEDS):
    """List the runs of a design, one seed after the other.

    Raises InputError if there is no such design in `DESIGNS`, or no seed.
    """
    if design not in DESIGNS:
        raise InputError(f"there is no design {design!r}", fix=f"use one of {', '.join(DESIGNS)}")
    if not seeds:
        raise InputError("no seed is given", fix="give at least one, better five")
    return DESIGNS[design](seeds)


def run_cell(cell, profile, data_dir, folder):
    """Train and judge one cell on the dataset in ``data_dir``, with the run in ``folder``.

    Returns
    -------
    dict
        Factors, seed, `RESPONSES`, ``final_loss`` (of the last logged step), ``parameters`` (of
        LoRA), ``steps``, ``seconds``, ``config_hash``, ``code_version``, ``profile``.
    """
    started = time.perf_counter()
    config = cell.config(profile, data_dir)
    read = read_split if cell.objects_read else read_split_wrong_keys
    result = train(
        config,
        output_dir=folder,
        overwrite=True,
        train_split=read(data_dir, config.data.train_split),
        val_split=read(data_dir, config.data.val_split),
        allow_empty=not cell.objects_read,
        progress=False,
    )
    row = {"design": cell.design, **cell.factors, "seed": cell.seed}
    row |= judge(result.model, result.processor, config, data_dir)
    return row | {
        "final_loss": result.metrics["train_loss"]["last"],
        "parameters": int(result.adapter.loc["total", "parameters"]),
        "rank": config.lora.rank,
        "steps": result.metrics["steps"],
        "seconds": round(time.perf_counter() - started, 1),
        "profile": profile,
        "config_hash": config.fingerprint(),
        "code_version": code_version(),
    }


def judge(model, processor, config, data_dir):
    """Measure `RESPONSES` of one model, asking for the category names, whatever was trained."""
    model.to(best_device())
    settings = config.evaluation
    queries = predict_split(
        model,
        processor,
        read_split(data_dir, "test"),
        absent_prompts=settings.absent_prompts,
        mask_threshold=settings.mask_threshold,
    )
    metrics = evaluate_queries(queries, settings.score_threshold)
    row = {name: metrics[source] for name, source in OF_EVALUATION.items()}
    present = [query for query in queries if query.is_positive]
    for name in ("presence_prob", "max_query_prob"):
        row[name] = sum(getattr(query, name) for query in present) / len(present)
    retention = coco_ap(known_queries(model, processor))
    return row | {f"retention_{name}": retention[name] for name in ("AP", "AP50")}


def known_queries(model, processor):
    """Ask for present and absent known things on the walls of `KNOWN_THINGS`."""
    prompts = read_json(KNOWN_THINGS / "prompts.json", "restore data/known_things")
    queries = predict_split(model, processor, read_split(KNOWN_THINGS, "test"))
    return [query for query in queries if query.prompt in prompts[query.image_id]]


def run_base(cell, profile, data_dir):
    """Judge the base without any adapter by the questions of a cell; return its row."""
    config = cell.config(profile, data_dir)
    settings = config.model
    model, processor = load_base(settings.name, settings.revision, resolution=settings.resolution)
    row = judge(model, processor, config, data_dir)
    return row | {"profile": profile, "code_version": code_version()}


def code_version():
    """Return the commit the code is at, ``-dirty`` if files differ, ``unknown`` without git."""
    if not (Path(ROOT) / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"
