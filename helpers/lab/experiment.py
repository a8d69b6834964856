"""The controlled experiment: its designs, and the run of one cell; data.experiments runs all."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, replace
from itertools import product

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.detect.metrics import coco_ap, evaluate_queries
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.files import CONFIGS, DATA, ROOT, WALL_CRACKS, read_json
from helpers.lab.spoil import read_split_wrong_keys
from helpers.model.lora import COMPONENTS
from helpers.model.sam3 import best_device
from helpers.train.training import train

SEEDS = (1, 2, 3, 4, 5)
SEEDS_OF = {"half_known": (1, 2)}  # of designs with others than five
FACTORS = {
    "causes": {
        "objects": ("no", "yes"),
        "prompt": ("object", "crack"),
        "text_lora": ("off", "on"),
        "negatives": (0, 3),
    },
    "schedule": {"schedule": ("failing", "fixed"), "text_lora": ("off", "on")},
}
"""Factors of the two factorial designs with their levels, the document's position first."""
SCHEDULES = {"failing": (20, 1000, 5e-5), "fixed": (50, 100, 1e-4)}
"""Epochs, warm-up steps and learning rate of the document."""
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
SHORTER = {("tiny", "schedule"): 0.2, ("tiny", "components"): 0.06}
"""Share of the config's epochs by profile and design, if not the profile's: 290 runs take three hours."""
HALF_KNOWN = "data/tiny_sam3_half_known"

TABLES = DATA / "experiments"  # committed: one CSV file per design, base.csv, confusion.csv
DATA_DIR = str(WALL_CRACKS.relative_to(ROOT))  # so that a config has one hash on every machine
KNOWN_THINGS = DATA / "known_things"
"""32 walls with what the embedded base knows, and ``prompts.json``: what is asked on each."""
TEXT_COLUMNS = {"config_hash": str, "code_version": str}  # may consist of digits
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
    """One run of a design."""

    design: str
    factors: dict  # what is varied: name to level, in the order of the design
    seed: int  # of LoRA's start, the order of the images, and the draw of absent prompts
    overrides: tuple[str, ...]  # settings on top of config and profile
    objects_read: bool = True  # False: train and validate on what the failing script's reader read

    @property
    def name(self):
        """Unique in its design, usable as a file name."""
        levels = [f"{key}-{value}" for key, value in self.factors.items()]
        return "_".join([*levels, f"seed-{self.seed}"]).replace(" ", "-")

    def config(self, profile, data_dir):
        """Return the `helpers.config.Config` of the run."""
        settings = [("data.data_dir", str(data_dir)), ("training.seed", self.seed)]
        if (profile, self.design) in SHORTER:
            settings.append(("scale.num_epochs", SHORTER[profile, self.design]))
        path = CONFIGS / "crack_detection_config.yaml"
        return load_config(path, profile, [*settings, *BATCH, *self.overrides])


def _flag(part, is_on):
    return f"lora.apply_to_{part}={str(is_on).lower()}"


def causes_design(seeds):
    """Cross the four suspects: objects read, training prompt, text LoRA, absent prompts."""
    cells = []
    for seed, *levels in product(seeds, *FACTORS["causes"].values()):
        factors = dict(zip(FACTORS["causes"], levels, strict=True))
        overrides = (
            f"data.prompt={'object' if factors['prompt'] == 'object' else 'null'}",
            _flag("text_encoder", factors["text_lora"] == "on"),
            f"data.num_negatives={factors['negatives']}",
        )
        cells.append(Cell("causes", factors, seed, overrides, factors["objects"] == "yes"))
    return cells


def half_known_design(seeds):
    """Run the cells of `causes_design` on the base that half knows the word."""
    base = f"model.name={HALF_KNOWN}"
    return [
        replace(cell, design="half_known", overrides=(*cell.overrides, base))
        for cell in causes_design(seeds)
    ]


def components_design(seeds):
    """Put LoRA on each component, on all, and on all but one, at equal rank and at equal size."""
    choices = {f"only {part}": (part,) for part in PARTS} | {"all": PARTS}
    choices |= {f"all but {part}": tuple(p for p in PARTS if p != part) for part in PARTS}
    cells = []
    for seed, equal, (choice, parts) in product(seeds, ("rank", "size"), choices.items()):
        nearest = round(EQUAL_PARAMETERS / sum(PARAMETERS_AT_RANK_1[part] for part in parts))
        rank = EQUAL_RANK if equal == "rank" else min(max(1, nearest), FULL_RANK)
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
    cells = []
    for seed, name, text in product(seeds, *FACTORS["schedule"].values()):
        epochs, warmup, rate = SCHEDULES[name]
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
    "half_known": half_known_design,
    "schedule": schedule_design,
    "components": components_design,
}


def cells_of(design, seeds=None):
    """List the runs of a design in `DESIGNS`, one seed after the other."""
    seeds = SEEDS_OF.get(design, SEEDS) if seeds is None else seeds
    if design not in DESIGNS:
        raise InputError(f"there is no design {design!r}", fix=f"use one of {', '.join(DESIGNS)}")
    if not seeds:
        raise InputError("no seed is given", fix="give at least one, better five")
    return DESIGNS[design](seeds)


def run_cell(cell, profile, data_dir, folder):
    """Train and judge one cell on the dataset in ``data_dir``, with the run in ``folder``.

    Returns a row of the tables, a dict: what was run, `RESPONSES`, and the costs.
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
    settings, test = config.evaluation, read_split(data_dir, "test")
    options = {"absent_prompts": settings.absent_prompts, "mask_threshold": settings.mask_threshold}
    queries = predict_split(model, processor, test, **options)
    metrics = evaluate_queries(queries, settings.score_threshold)
    row = {name: metrics[source] for name, source in OF_EVALUATION.items()}
    present = [query for query in queries if query.is_positive]
    for name in ("presence_prob", "max_query_prob"):
        row[name] = sum(getattr(query, name) for query in present) / len(present)
    prompts = read_json(KNOWN_THINGS / "prompts.json", "restore data/known_things")
    known = predict_split(model, processor, read_split(KNOWN_THINGS, "test"))
    retention = coco_ap([query for query in known if query.prompt in prompts[query.image_id]])
    return row | {f"retention_{name}": retention[name] for name in ("AP", "AP50")}


def code_version():
    """Return the commit the code is at, ``-dirty`` if files differ, ``unknown`` without git."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"
