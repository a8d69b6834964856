"""A run folder: when it may be written, what is in it, and how it is read back."""

import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from transformers import Sam3Processor

from helpers.config import Config, load_config
from helpers.data.records import absent_candidates, present_prompts
from helpers.detect.thresholds import THRESHOLDS_FILE
from helpers.errors import InputError, explain
from helpers.files import read_json, resolve
from helpers.model.lora import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, load_adapter
from helpers.model.sam3 import base_dtype, load_base

RUN_CONFIG = "config.yaml"
PROMPTS_FILE = "prompts.json"
METRICS_FILE = "metrics.json"  # written last: a folder that has it holds a finished run
CHECKPOINTS = "checkpoints"
CURVES_FILE = "curves.csv"
AUDIT_FILE = "adapter_report.csv"
VERSIONS_FILE = "environment.json"
CARD_FILE = "README.md"
STOPPED_FILE = "stopped.json"  # why training stopped on its own; gone when the run goes on
_TRAIN_AGAIN = "restore the file, or train again with --overwrite"
_TRAIN_FIRST = "name the folder of a finished run, or train one with 'python -m helpers train'"
# Keys that change how a step is computed, not what; the number of its images is compared.
_MAY_CHANGE = {
    "data": {"data_dir"},
    "training": {"batch_size", "gradient_accumulation_steps", "num_workers"}
    | {"gradient_checkpointing", "feature_cache"},
    "guards": True,
    "output": True,
}


class _FirstAndLast(BaseModel, strict=True, allow_inf_nan=False):
    first: float | None
    last: float | None


# What is relied on in a file: type and default, or ... for what every release wrote.
_KEYS = {
    METRICS_FILE: {
        "steps": (int, ...),
        "epochs": (float, ...),
        "best_step": (int | None, ...),
        "selected_by": (str, ...),
        "valid": (dict[str, float | None], ...),
        "train_loss": (_FirstAndLast, ...),
        "valid_loss": (_FirstAndLast, ...),
        "objects": (dict[str, int], ...),
        "notes": (list[str], ...),
    },
    PROMPTS_FILE: {
        "prompts": (dict[str, int], ...),
        "negatives": (dict[str, int], ...),
        "negatives_per_image": (int, ...),
        "replayed": (dict[str, int], {}),
    },
    VERSIONS_FILE: {"packages": (dict[str, str], {}), "num_processes": (int, 1)},
    STOPPED_FILE: {"message": (str, ...), "fix": (str | None, None)},
    # What `helpers.model.lora.load_adapter` needs.
    CONFIG_FILE: {
        "peft_type": (str, ...),
        "r": (int, ...),
        "lora_alpha": (float, ...),
        "target_modules": (str | list, ...),
    },
    BASE_FILE: {"name": (str, ...), "fingerprint": (str, ...)},
}
READABLE_FILES = frozenset(_KEYS)
_OWN_FILES = (METRICS_FILE, PROMPTS_FILE, VERSIONS_FILE, STOPPED_FILE)
_OWN_FILES += (RUN_CONFIG, CURVES_FILE, AUDIT_FILE, THRESHOLDS_FILE)
RUN_FILES = (*_OWN_FILES, CARD_FILE, WEIGHTS_FILE, CONFIG_FILE, BASE_FILE)


@dataclass
class RunFiles:
    """What a finished run wrote, without its model."""

    folder: Path
    config: Config
    prompts: dict  # prompts, negatives, replayed: words to images; and negatives_per_image
    metrics: dict  # of `run_metrics`
    history: list  # ``trainer.state.log_history``
    adapter: pd.DataFrame  # `adapter_report` of the end; grad_norm is that of the first step


@dataclass
class RunResult(RunFiles):
    """A finished run in memory: its files, and its model with the kept checkpoint in eval mode."""

    model: PeftModel
    processor: Sam3Processor


def read_config(folder):
    """Return the config of a run; those from before `model.native_prompt` were trained without."""
    config = load_config(folder / RUN_CONFIG)
    is_old = config.model.native_prompt is None
    return config.replace({"model.native_prompt": False}) if is_old else config


def read_run(folder):
    """Read what a finished run wrote, without its model; return `RunFiles`.

    InputError if the folder holds no run, an unfinished one or a damaged one.
    """
    folder = resolve(folder)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, fix=_TRAIN_FIRST)
    if not (folder / METRICS_FILE).is_file():
        raise _unfinished(folder)
    metrics, history = read_run_file(folder / METRICS_FILE), read_history(folder)
    if (last := history[-1]["step"]) != (steps := metrics["steps"]):
        raise _damaged(folder / CURVES_FILE, f"ends at step {last}, {METRICS_FILE} counts {steps}")
    prompts, adapter = read_run_file(folder / PROMPTS_FILE), _read_audit(folder / AUDIT_FILE)
    return RunFiles(folder, read_config(folder), prompts, metrics, history, adapter)


def load_run(folder, base=None, dtype=None):
    """Load a finished run with its base; return a `RunResult`.

    ``base`` is another place of the same base than the config names, ``dtype`` the type of its
    weights, by default the one it was trained with. InputError as from `read_run`.
    """
    files = read_run(folder)
    settings = files.config.model.model_dump() | ({"name": base, "revision": None} if base else {})
    dtype = dtype or base_dtype(files.config.training.mixed_precision)
    model, processor = load_base(settings.pop("name"), dtype=dtype, **settings)
    model = load_adapter(model, files.folder, lora=files.config.lora)
    return RunResult(**vars(files), model=model, processor=processor)


def is_bare_adapter(folder):
    """Return whether a folder holds a PEFT adapter and no trace of a run of this package."""
    holds_run = any((folder / name).exists() for name in (*_OWN_FILES, CHECKPOINTS))
    return (folder / CONFIG_FILE).is_file() and not holds_run


def _damaged(path, message):
    return InputError(message, where=path, fix=_TRAIN_AGAIN)


def _unfinished(folder):
    """Build the error for a folder without metrics: stopped, interrupted, damaged or no run."""
    if (folder / STOPPED_FILE).is_file():
        stopped = read_run_file(folder / STOPPED_FILE)
        message = f"the run was stopped: {stopped['message']}"
        return InputError(message, where=folder, fix=stopped.get("fix") or _TRAIN_AGAIN)
    if not (folder / RUN_CONFIG).is_file():
        return InputError(f"holds no {METRICS_FILE}", where=folder, fix=_TRAIN_FIRST)
    message = f"the run was interrupted: it has no {METRICS_FILE}, which is written last"
    fix = "continue it with 'python -m helpers train ... --resume'"
    return InputError(message, where=folder, fix=fix)


def read_run_file(path):
    """Return the content of a JSON file of a run, checked; more keys than needed are allowed."""
    content = read_json(path, fix=_TRAIN_AGAIN)
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    try:
        create_model(path.name, __config__=strict, **_KEYS[path.name]).model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part)[:100] for part in problem["loc"])
        value = "" if problem["type"] == "missing" else f" is {str(problem['input'])[:100]!r}"
        raise _damaged(path, f"'{key}'{value}: {problem['msg']}") from error
    return content


def read_history(folder):
    """Read ``curves.csv`` back into a log: one dict per entry, without what it did not log."""
    path = Path(folder) / CURVES_FILE
    table = _read_table(path, ("step", "epoch", "loss", "eval_loss"))
    no_place = (table["step"] % 1 != 0).any() or table["epoch"].isna().any()
    if no_place or table[["loss", "eval_loss"]].isna().all().any():
        raise _damaged(path, "a row has no whole step or no epoch, or there is no loss")
    rows = table.astype({"step": int}).to_dict(orient="records")
    return [{name: value for name, value in row.items() if not pd.isna(value)} for row in rows]


def _read_audit(path):
    """Return the adapter report of a run, index ``component``."""
    columns = ("component", "modules", "parameters", "share", "grad_norm", "B_norm", "B_nonzero")
    table = _read_table(path, columns).set_index("component")
    is_broken = table[["modules", "parameters", "share"]].isna().any(axis=None)
    if is_broken or "total" not in table.index or table.index.has_duplicates:
        raise _damaged(path, "has no row 'total', a row twice, or a number is missing")
    return table


def _read_table(path, columns):
    """Return a complete CSV file of a run with these columns, all but ``component`` of numbers."""
    with explain((OSError, ValueError), "cannot be read", where=path, fix=_TRAIN_AGAIN):
        is_complete = path.read_text(encoding="utf-8").endswith("\n")
        table = pd.read_csv(path)
    if missing := [name for name in columns if name not in table]:
        raise _damaged(path, f"the column '{missing[0]}' is missing")
    if not is_complete or table.empty:
        raise _damaged(path, "is cut off")
    numbers = table.drop(columns="component", errors="ignore")
    if words := [*numbers.select_dtypes(exclude="number")]:
        raise _damaged(path, f"the column '{words[0]}' holds what is no number")
    return table


def last_checkpoint(folder):
    """Return the newest checkpoint that is complete up to trainer_state.json, or None."""
    by_step = {}
    for path in (folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"):
        with suppress(InputError):  # half written
            by_step[read_json(path).get("global_step", 0)] = path.parent
    return by_step[max(by_step)] if by_step else None


def num_processes():
    """Return how many processes train together, as ``accelerate launch`` and torchrun tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_of(folder, config, *, resume, overwrite):
    """Say before anything is written if a run is new, interrupted or finished, or refuse it."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    holds_run = not names.isdisjoint({*RUN_FILES, CHECKPOINTS})
    another = "choose another output"
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other", where=folder, fix="choose one")
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=folder, fix=another)
    if resume and not (folder / RUN_CONFIG).is_file():
        raise InputError("holds no run to resume", where=folder, fix="start it without --resume")
    if holds_run and not resume and not overwrite:
        fix = f"{another}, continue it with --resume, or replace it with --overwrite"
        raise InputError("already holds a run", where=folder, fix=fix)
    if not holds_run and any(not name.startswith(".") for name in names):
        raise InputError("is not empty and holds no run", where=folder, fix=another)
    if not resume:
        return "new"
    _refuse_other_config(folder, config)
    return "finished" if METRICS_FILE in names else "interrupted"


def remove(folder, patterns):
    """Remove what is named like that in a run folder, and nothing else."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _refuse_other_config(folder, config):
    """Raise InputError if a run is to be resumed with other settings."""
    before = read_config(folder)
    started = read_run_file(folder / VERSIONS_FILE).get("num_processes", 1)
    old, new = before.model_dump(exclude=_MAY_CHANGE), config.model_dump(exclude=_MAY_CHANGE)
    for key in ("revision", "native_prompt"):
        if new["model"][key] is None:  # the run has written down which it took
            new["model"][key] = old["model"][key]
    if not old["lora"]["apply_to_mask_decoder"]:  # left out where no object has a mask
        new["lora"]["apply_to_mask_decoder"] = False
    for values, run, processes in ((old, before, started), (new, config, num_processes())):
        # The gradient does not depend on how the images of a step are spread.
        size = run.training.batch_size * run.training.gradient_accumulation_steps * processes
        values["training"]["batch_size x gradient_accumulation_steps x processes"] = size
    differing = [
        f"{section}.{key} was {old[section][key]!r} and is {value!r}"
        for section, keys in new.items()
        for key, value in keys.items()
        if old[section][key] != value
    ]
    if differing:
        message = f"the run to resume had another configuration: {'; '.join(differing)}"
        fix = "resume with the settings it was started with, or start a new run"
        raise InputError(message, where=folder, fix=fix)


def trained_prompts(dataset):
    """Return what a training `PromptDataset` asks, see `RunFiles.prompts`."""
    present, absent = Counter(), Counter()
    replayed = Counter(word for words in dataset.replay.values() for word in words)
    for record in dataset.records:
        prompts = present_prompts(record, dataset.split.categories, dataset.prompt)
        present.update(prompts.keys())
        if dataset.num_negatives or not record.objects:
            nouns = dataset.nouns if dataset.num_negatives else dataset.own_names
            absent.update(set(absent_candidates(record, nouns)) - set(prompts))
    return {
        "prompts": dict(sorted(present.items())),
        "negatives": dict(sorted(absent.items())),
        "negatives_per_image": dataset.num_negatives,
        "replayed": dict(sorted(replayed.items())),
    }


def trained_parameters(optimizer, model):
    """Count the parameters of an optimiser, ``all`` and ``lora``; equal if the base was frozen."""
    lora = {id(tensor) for name, tensor in model.named_parameters() if ".lora_" in name}
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return {
        "all": sum(tensor.numel() for tensor in tensors),
        "lora": sum(tensor.numel() for tensor in tensors if id(tensor) in lora),
    }


def run_metrics(state, config, best_step):
    """Gather the numbers of a run from its `TrainerState`; `best_step` is None for the last one."""
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    kept = next((e for e in evaluations if e["step"] == best_step), evaluations[-1])
    return {
        "steps": state.global_step,
        "epochs": round(state.epoch, 6),
        "best_step": best_step,
        "selected_by": config.evaluation.metric_for_best,
        "valid": {name[5:]: value for name, value in kept.items() if name.startswith("eval_")},
        "train_loss": _first_and_last(state.log_history, "loss"),
        "valid_loss": _first_and_last(state.log_history, "eval_loss"),
    }


def run_notes(state, config, best_step, report):
    """Return a sentence for each thing to know before using a run; `report`: its adapter's."""
    notes = []
    if best_step is None:
        metric = config.evaluation.metric_for_best
        notes.append(f"{metric} never rose above 0 on the validation split: the last state is kept")
    if config.effective_warmup_steps >= state.max_steps:
        text = f"the warm-up of {config.effective_warmup_steps} steps is not shorter than the run "
        notes.append(f"{text}of {state.max_steps}: the learning rate never reached its peak")
    for component, row in report.drop(index="total").iterrows():
        if row["modules"] and row["B_nonzero"] < 1:
            idle = round((1 - row["B_nonzero"]) * row["modules"])
            notes.append(f"{idle} of {row['modules']:.0f} modules of {component} never moved")
    clamped = _first_and_last(state.log_history, "train_share_at_clamp")["last"]
    if clamped > 0.5:
        text = f"{clamped:.0%} of the logits stand at the model's clamps, where there is no "
        notes.append(f"{text}gradient: start again from the base, training on does not help")
    return notes


def _first_and_last(log_history, name):
    values = [entry[name] for entry in log_history if name in entry]
    return {"first": values[0], "last": values[-1]}
