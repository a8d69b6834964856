"""The controlled experiment: its designs, and the run of one cell; `data.experiments.make` runs all."""

import subprocess
import time
from dataclasses import dataclass, replace
from itertools import product

import torch
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset
from transformers import get_cosine_schedule_with_warmup, set_seed

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.detect.metrics import coco_ap, evaluate_queries
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.files import CONFIGS, DATA, ROOT, WALL_CRACKS, read_json
from helpers.lab.spoil import read_split_wrong_keys
from helpers.model.lora import COMPONENTS
from helpers.model.losses import sam3_losses
from helpers.model.prompted import loss_inputs, model_inputs, rows_with_objects
from helpers.model.sam3 import best_device, load_base
from helpers.train.training import train

SEEDS = (1, 2, 3, 4, 5)
BASES = {"never": "data/tiny_sam3", "half": "data/tiny_sam3_half_known"}
"""How well a base knows the word "crack", and where it is."""
GRADED = {word: f"runs/bases/{word}" for word in ("quarter", "most", "half_shut", "control")}
"""The same for those that `data.tiny_sam3_half_known.make` makes on demand."""
SEEDS_OF = {"rates": (1,)}
"""Designs of which fewer than five were run so far."""
KNOWN_WORDS = tuple("joint moss stain rust hole bolt tile brick marking tape".split())
"""What both bases know; it is painted on the walls of `KNOWN_THINGS`."""
FACTORS = {
    "causes": {
        "word": tuple(BASES),
        "objects": ("no", "yes"),
        "prompt": ("object", "crack"),
        "text_lora": ("off", "on"),
        "negatives": (0, 3),
    },
    "schedule": {"schedule": ("failing", "fixed"), "text_lora": ("off", "on")},
}
"""Factors of the two factorial designs with their levels, the document's position first."""
SUSPECTS = {name: levels for name, levels in FACTORS["causes"].items() if name != "word"}
"""Those of the main design that a run can change; the word is a property of its base."""
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
BATCH = ("training.batch_size=4",)
EPOCHS_SCALE = {"schedule": 0.2, "components": 0.06}
"""Share of the config's epochs on the embedded base by design; 0.1, which are 5 epochs, in others."""

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
        return "_".join([*levels, f"seed-{self.seed}"]).replace(" ", "-").replace(",", "")

    def config(self, profile, data_dir):
        """Return the `helpers.config.Config` of the run; only the tiny profile has several bases."""
        settings = [("data.data_dir", str(data_dir)), ("training.seed", self.seed)]
        if profile == "tiny":
            settings.append(("scale.num_epochs", EPOCHS_SCALE.get(self.design, 0.1)))
            settings.append(("model.name", (BASES | GRADED)[self.factors.get("word", "never")]))
        path = CONFIGS / "crack_detection_config.yaml"
        return load_config(path, profile, [*settings, *BATCH, *self.overrides])


def _flag(part, is_on):
    return f"lora.apply_to_{part}={str(is_on).lower()}"


def _only_lora_on(*parts):
    return tuple(_flag(part, part in parts) for part in PARTS)


def causes_design(seeds):
    """Cross the four suspects on two bases: objects read, training prompt, text LoRA, negatives."""
    cells = []
    for seed, *levels in product(seeds, *FACTORS["causes"].values()):
        factors = dict(zip(FACTORS["causes"], levels, strict=True))
        cells.append(_run_of_state("causes", factors, factors, seed))
    return cells


_REPLAY = f"data.replay_words=[{', '.join(KNOWN_WORDS)}]"
_REPLAY_OF_FIVE = f"data.replay_words=[{', '.join(KNOWN_WORDS[:5])}]"
FIXED, RECOMMENDED = "fixed config", "DETR encoder and masks, replay"
FIXED_LONGER, RECOMMENDED_LONGER = (f"{r}, twice the epochs" for r in (FIXED, RECOMMENDED))
COMPARED = (FIXED, FIXED_LONGER, RECOMMENDED, RECOMMENDED_LONGER)
"""Recipes that the bar of the cure compares."""
RECIPES = {
    FIXED: (),
    FIXED_LONGER: ("training.num_epochs=100",),
    "a third of the rate": (f"training.learning_rate={1e-3 / 30}",),
    "a tenth of the rate": ("training.learning_rate=1e-5",),
    "DETR encoder": _only_lora_on("detr_encoder"),
    "DETR encoder and masks": _only_lora_on("detr_encoder", "mask_decoder"),
    "replay": (_REPLAY,),
    "replay, twice the epochs": (_REPLAY, "training.num_epochs=100"),
    "replay of five": (_REPLAY_OF_FIVE,),
    "replay, no absent prompts": (_REPLAY, "data.num_negatives=0"),
    RECOMMENDED: (*_only_lora_on("detr_encoder", "mask_decoder"), _REPLAY),
    RECOMMENDED_LONGER: (
        *_only_lora_on("detr_encoder", "mask_decoder"),
        _REPLAY,
        "training.num_epochs=100",
    ),
    "word as embedding": (),
}
"""Ways to teach a word, with what they change in the fixed config."""
USAGES = {
    FIXED: {", scaled by 0.75": 0.75, ", scaled by 0.5": 0.5, ", routed": None},
    "replay": {", scaled by 0.75": 0.75},
}
"""Other ways to use the adapter of a recipe: scaled down, or (None) with other words to the base."""


def front_design(seeds):
    """Teach the word in every way of `RECIPES`, on both bases."""
    return [
        Cell("front", {"recipe": recipe, "word": word}, seed, overrides)
        for seed, word, (recipe, overrides) in product(seeds, BASES, RECIPES.items())
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
            *_only_lora_on(*parts),
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


def _run_of_state(design, factors, state, seed, overrides=()):
    """Make a cell from a state of the main design."""
    overrides = (
        f"data.prompt={'object' if state['prompt'] == 'object' else 'null'}",
        _flag("text_encoder", state["text_lora"] == "on"),
        f"data.num_negatives={state['negatives']}",
        *overrides,
    )
    return Cell(design, factors, seed, overrides, state["objects"] == "yes")


FAILING, WORKING = (
    dict(zip(SUSPECTS, levels, strict=True)) for levels in zip(*SUSPECTS.values(), strict=True)
)
"""The corners of the main design: the document's position in all factors, and the other."""


def one_step_states():
    """List the failing and the working state, and each with one factor at its other level."""
    states = []
    for state, other in ((FAILING, WORKING), (WORKING, FAILING)):
        states += [state, *(state | {name: other[name]} for name in SUSPECTS)]
    return states


def grades_design(seeds):
    """Take one step from the failing and the working state on bases of graded knowledge."""
    return [
        _run_of_state("grades", {"word": word} | state, state, seed)
        for seed, word, state in product(seeds, GRADED, one_step_states())
    ]


_THIRD = f"training.learning_rate={1e-4 / 3}"
RATES = {
    "a third of the rate": (_THIRD,),
    "a tenth of the rate": ("training.learning_rate=1e-5",),
    "a third of the rate, three times the epochs": (_THIRD, "training.num_epochs=150"),
}
"""What is run beside the main design's rate of 1e-4, which the tiny profile multiplies by 30."""


def rates_design(seeds):
    """Take the steps that decide again at lower rates, with as many updates or with more."""
    read = FAILING | {"objects": "yes"}
    frozen, other_word = WORKING | {"text_lora": "off"}, WORKING | {"prompt": "object"}
    return [
        _run_of_state("rates", {"word": word, "rate": rate} | state, state, seed, overrides)
        for seed, (rate, overrides), word, state in product(
            seeds, RATES.items(), BASES, (FAILING, read, frozen, other_word, WORKING)
        )
    ]


DESIGNS = {
    "causes": causes_design,
    "front": front_design,
    "schedule": schedule_design,
    "components": components_design,
    "grades": grades_design,
    "rates": rates_design,
}


def cells_of(design, seeds=None, profile="tiny"):
    """List the runs of a design in `DESIGNS`, one seed after the other.

    Only the tiny profile has bases that know the word to a degree; another has its own base.
    """
    if design not in DESIGNS:
        raise InputError(f"there is no design {design!r}", fix=f"use one of {', '.join(DESIGNS)}")
    if seeds is not None and not seeds:
        raise InputError("no seed is given", fix="give at least one, better five")
    cells = DESIGNS[design](seeds or SEEDS_OF.get(design, SEEDS))
    if profile == "tiny" or "word" not in cells[0].factors:
        return cells
    first = cells[0].factors["word"]
    own = [cell for cell in cells if cell.factors["word"] == first]
    return [replace(cell, factors=cell.factors | {"word": "its own"}) for cell in own]


def usages_of(design, seeds=None, profile="tiny"):
    """List the rows of a design, as cells: in ``front`` an adapter may be used in several ways."""
    rows = []
    for cell in cells_of(design, seeds, profile):
        recipe = cell.factors.get("recipe")
        for suffix in ("", *USAGES.get(recipe, ())):
            name = {} if recipe is None else {"recipe": recipe + suffix}
            rows.append(replace(cell, factors=cell.factors | name))
    return rows


def run_cell(cell, profile, data_dir, folder):
    """Train and judge one cell on the dataset in ``data_dir``, with the run in ``folder``.

    Returns rows of the tables, dicts: what was run, `RESPONSES`, and the costs. There is one, but in
    ``front`` another for each way to use the same adapter.
    """
    started = time.perf_counter()
    config = cell.config(profile, data_dir)
    read = read_split if cell.objects_read else read_split_wrong_keys
    train_split = read(data_dir, config.data.train_split)
    row = {"design": cell.design, **cell.factors, "seed": cell.seed}
    run = {"profile": profile, "config_hash": config.fingerprint(), "code_version": code_version()}
    if cell.factors.get("recipe") == "word as embedding":
        model, processor, run_costs = learn_word(config, train_split)
    else:
        result = train(
            config,
            output_dir=folder,
            overwrite=True,
            train_split=train_split,
            val_split=read(data_dir, config.data.val_split),
            allow_empty=not cell.objects_read,
            progress=False,
        )
        model, processor = result.model, result.processor
        run_costs = {
            "final_loss": result.metrics["train_loss"]["last"],
            "parameters": int(result.adapter.loc["total", "parameters"]),
            "rank": config.lora.rank,
            "steps": result.metrics["steps"],
        }
    words, recipe = KNOWN_WORDS if cell.design == "front" else None, cell.factors.get("recipe")
    asked = (model, processor, config, data_dir, words)
    measured = {"": judge(*asked)}
    for usage, scale in USAGES.get(recipe, {}).items():
        if scale is None:
            measured[usage] = judge(*asked, adapter_words=train_split.categories)
        else:
            with rescale_adapter_scale(model, scale):
                measured[usage] = judge(*asked)
    run["seconds"] = round(time.perf_counter() - started, 1)
    rows = [row | numbers | run_costs | run for numbers in measured.values()]
    for usage, line in zip(measured, rows, strict=True):
        line |= {"recipe": recipe + usage} if recipe else {}
    return rows


def learn_word(config, split, *, learning_rate=3e-2, steps=160, warmup_steps=5):
    """Teach a word as an embedding: all weights stay frozen, its text states are learned.

    Returns the model, in which the states stand for the word, its processor, and the costs.
    """
    set_seed(config.training.seed)
    base = config.model
    own = {"resolution": base.resolution, "native_prompt": base.native_prompt}
    model, processor = load_base(base.name, base.revision, **own)
    model.to(best_device()).requires_grad_(False)
    dataset = PromptDataset.from_config(config, split, model, processor, num_negatives=0)
    [word] = dataset.own_names
    tokens = PromptCollator(processor).tokenize([word])
    tokens = {name: tensor.to(model.device) for name, tensor in tokens.items()}
    length = int(tokens["attention_mask"].sum())
    states = nn.Parameter(model.text_states(**tokens)[:, :length].clone())
    text_features = model.get_text_features

    def with_word(input_ids, attention_mask=None, **options):
        features = text_features(input_ids, attention_mask, **options)
        asked = (input_ids == tokens["input_ids"]).all(dim=1)
        padded = nn.functional.pad(states, (0, 0, 0, input_ids.shape[1] - length))
        output = torch.where(asked[:, None, None], padded, features.pooler_output)
        features.pooler_output = output
        return features

    model.get_text_features = with_word
    optimizer = torch.optim.AdamW([states], lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
    present = [index for index, record in enumerate(dataset.records) if record.objects]
    loader = DataLoader(
        Subset(dataset, present),
        batch_size=config.training.batch_size,
        sampler=RandomSampler(present, num_samples=steps * config.training.batch_size),
        collate_fn=PromptCollator(processor),
    )
    for batch in loader:
        mask_rows = rows_with_objects(batch["targets"])
        outputs = model(**model_inputs(batch, model.device), mask_rows=mask_rows)
        loss = sam3_losses(loss_inputs(outputs), batch["targets"])["total"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([states], 1.0)
        optimizer.step()
        schedule.step()
    costs = {"final_loss": loss.item(), "parameters": states.numel(), "rank": 0, "steps": steps}
    return model, processor, costs


def judge(model, processor, config, data_dir, words=None, adapter_words=None):
    """Measure `RESPONSES` of one model, asking for the category names, whatever was trained.

    With the words that the base knows, average precision is also that of the first five alone, which
    are replayed in every recipe with a replay, and of the others. For `adapter_words` see
    `helpers.detect.predict_split`.
    """
    model.to(best_device())
    settings, test = config.evaluation, read_split(data_dir, "test")
    options = {name: getattr(settings, name) for name in ("absent_prompts", "mask_threshold")}
    queries = predict_split(model, processor, test, **options, adapter_words=adapter_words)
    metrics = evaluate_queries(queries, settings.score_threshold)
    row = {name: metrics[source] for name, source in OF_EVALUATION.items()}
    present = [query for query in queries if query.is_positive]
    for name in ("presence_prob", "max_query_prob"):
        row[name] = sum(getattr(query, name) for query in present) / len(present)
    prompts = read_json(KNOWN_THINGS / "prompts.json", "restore data/known_things")
    things = read_split(KNOWN_THINGS, "test")
    known = predict_split(model, processor, things, adapter_words=adapter_words)
    known = [query for query in known if query.prompt in prompts[query.image_id]]
    precision = coco_ap(known)
    row |= {f"retention_{name}": precision[name] for name in ("AP", "AP50")}
    for name, group in {"first_five": words[:5], "last_five": words[5:]}.items() if words else ():
        precision = coco_ap([query for query in known if query.prompt in group])
        row[f"retention_AP_{name}"] = precision["AP"]
    return row


def code_version():
    """Return the commit the code is at, ``-dirty`` if files differ, ``unknown`` without git."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"
