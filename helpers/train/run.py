"""A run folder: when it may be written, what is in it, and how it is read back."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import Sam3Processor

from helpers.config import Config, load_config
from helpers.data.prompts import absent_candidates, present_prompts
from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.lora import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, load_adapter
from helpers.model.sam3 import base_dtype, load_base
from helpers.train.trainer import CHECKPOINTS, CURVES_FILE

RUN_CONFIG = "config.yaml"
PROMPTS_FILE = "prompts.json"
MERGE_FILE = "merge.json"
METRICS_FILE = "metrics.json"  # written last: a folder that has it holds a finished run
AUDIT_FILE = "adapter_report.csv"
VERSIONS_FILE = "environment.json"
CARD_FILE = "README.md"
STOPPED_FILE = "stopped.json"  # why training stopped on its own; gone when the run goes on
_OWN_FILES = (
    METRICS_FILE,
    RUN_CONFIG,
    PROMPTS_FILE,
    CURVES_FILE,
    AUDIT_FILE,
    VERSIONS_FILE,
    STOPPED_FILE,
)
RUN_FILES = (*_OWN_FILES, CARD_FILE, WEIGHTS_FILE, CONFIG_FILE, BASE_FILE)
_PREFIX = "eval_"
_WIDE_AT_CLAMP = 0.5
_TRAIN_AGAIN = "restore the file, or train again with --overwrite"
_TRAIN_FIRST = "name the folder of a finished run, or train one with 'python -m helpers train'"
# Keys that change how a step is computed, not what; the number of its images is compared.
_MAY_CHANGE = {
    "data": {"data_dir"},
    "training": {
        "batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "feature_cache",
        "num_workers",
    },
    "guards": True,
    "output": True,
}


class _File(BaseModel):
    """What a file of a run must hold; more is allowed, so that later versions can add to it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _FirstAndLast(_File):
    first: float | None
    last: float | None


class Metrics(_File):
    """What `read_run` relies on in ``metrics.json``."""

    steps: int
    epochs: float
    best_step: int | None
    selected_by: str
    valid: dict[str, float | None]
    train_loss: _FirstAndLast
    valid_loss: _FirstAndLast
    objects: dict[str, int]
    notes: list[str]
    data_fingerprint: str | None = None


class Prompts(_File):
    """What `read_run` relies on in ``prompts.json``."""

    prompts: dict[str, int]
    negatives: dict[str, int]
    negatives_per_image: int


class Versions(_File):
    """What a resumed run and the model card rely on in ``environment.json``."""

    packages: dict[str, str] = {}
    num_processes: int = 1
    data_fingerprint: str | None = None


class _Stopped(_File):
    message: str
    fix: str | None = None


@dataclass
class RunFiles:
    """What a finished run wrote, without its model.

    Attributes
    ----------
    folder : pathlib.Path
        Holds adapter, ``config.yaml``, ``prompts.json``, ``metrics.json``, ``curves.csv``,
        ``adapter_report.csv``, ``environment.json``, the card ``README.md`` and ``checkpoints/``.
    config : helpers.config.Config
        Resolved.
    prompts : dict
        ``prompts``: trained prompt to the number of images that show it; ``negatives``: absent
        prompt to the number of images it may be asked on; ``negatives_per_image``.
    metrics : dict
        See `run_metrics`; also ``objects``, ``data_fingerprint``, ``trained_parameters``, ``notes``.
    history : list of dict
        The log, as ``trainer.state.log_history``.
    adapter : pandas.DataFrame
        `helpers.model.audit.adapter_report` at the end; ``grad_norm`` is that of the first step.
    """

    folder: Path
    config: Config
    prompts: dict
    metrics: dict
    history: list
    adapter: pd.DataFrame


@dataclass
class RunResult(RunFiles):
    """A finished run in memory: its files, and its model with the kept checkpoint in eval mode."""

    model: PeftModel
    processor: Sam3Processor


def read_run(folder):
    """Read what a finished run wrote, without loading a model.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.

    Returns
    -------
    RunFiles

    Raises
    ------
    InputError
        If the folder is missing, or holds no run, an unfinished one or a damaged one.
    """
    folder = resolve(folder)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, fix=_TRAIN_FIRST)
    if not (folder / METRICS_FILE).is_file():
        raise _unfinished(folder)
    metrics = read_run_file(folder / METRICS_FILE, Metrics)
    history = read_history(folder)
    if history[-1]["step"] != metrics["steps"]:
        raise InputError(
            f"ends at step {history[-1]['step']}, {METRICS_FILE} counts {metrics['steps']}",
            where=folder / CURVES_FILE,
            fix=_TRAIN_AGAIN,
        )
    return RunFiles(
        folder=folder,
        config=load_config(folder / RUN_CONFIG),
        prompts=read_run_file(folder / PROMPTS_FILE, Prompts),
        metrics=metrics,
        history=history,
        adapter=_read_audit(folder / AUDIT_FILE),
    )


def load_run(folder, base=None, dtype=None):
    """Load a finished run with its base.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.
    base : str, optional
        Another place of the base than the config names.
    dtype : torch.dtype, optional
        Type of the base's weights; by default the one it was trained with.

    Returns
    -------
    RunResult

    Raises
    ------
    InputError
        See `read_run`; also if the base is not the one the run was trained on.
    """
    files = read_run(folder)
    settings = files.config.model
    model, processor = load_base(
        base or settings.name,
        revision=None if base else settings.revision,
        dtype=dtype or base_dtype(files.config.training.mixed_precision),
        resolution=settings.resolution,
    )
    return RunResult(
        **vars(files),
        model=load_adapter(model, files.folder, lora=files.config.lora),
        processor=processor,
    )


def is_bare_adapter(folder):
    """Return whether a folder holds a PEFT adapter and no trace of a run of this package."""
    holds_run = any((folder / name).exists() for name in (*_OWN_FILES, CHECKPOINTS))
    return (folder / CONFIG_FILE).is_file() and not holds_run


def _unfinished(folder):
    """Build the error for a folder without metrics: stopped, interrupted, damaged or no run."""
    if (folder / STOPPED_FILE).is_file():
        stopped = read_run_file(folder / STOPPED_FILE, _Stopped)
        message = f"the run was stopped: {stopped['message']}"
        return InputError(message, where=folder, fix=stopped.get("fix") or _TRAIN_AGAIN)
    if (folder / RUN_CONFIG).is_file():
        if (folder / WEIGHTS_FILE).is_file():
            message = f"holds an adapter and no {METRICS_FILE}, which is written last"
        else:
            message = "the run was interrupted and has no adapter yet"
        fix = "continue it with 'python -m helpers train ... --resume'"
        return InputError(message, where=folder, fix=fix)
    return InputError(f"holds no {METRICS_FILE}", where=folder, fix=_TRAIN_FIRST)


def read_run_file(path, schema):
    """Return the content of a JSON file of a run, which must fit a class like `Metrics`."""
    content = read_json(path, fix=_TRAIN_AGAIN)
    try:
        schema.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part)[:100] for part in problem["loc"])
        if problem["type"] == "missing":
            message = f"the key '{key}' is missing"
        else:
            message = f"'{key}' is {str(problem['input'])[:100]!r}: {problem['msg']}"
        raise InputError(message, where=path, fix=_TRAIN_AGAIN) from error
    return content


def read_history(folder):
    """Read ``curves.csv`` back into a log.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.

    Returns
    -------
    list of dict
        One dict per entry, without the names it did not log.

    Raises
    ------
    InputError
        If the file is missing, cut off, or holds anything but numbers.
    """
    path = Path(folder) / CURVES_FILE
    table = _read_table(path, ("step", "epoch", "loss", "eval_loss"))
    steps = table["step"]
    if steps.isna().any() or (steps % 1 != 0).any() or table["epoch"].isna().any():
        raise InputError("a row has no whole step or no epoch", where=path, fix=_TRAIN_AGAIN)
    if table["loss"].isna().all() or table["eval_loss"].isna().all():
        raise InputError("holds no loss", where=path, fix=_TRAIN_AGAIN)
    table = table.astype({"step": int})
    return [
        {name: value for name, value in row.items() if not pd.isna(value)}
        for row in table.to_dict(orient="records")
    ]


def _read_audit(path):
    """Return the adapter report of a run, index ``component``."""
    columns = ("modules", "parameters", "share", "grad_norm", "B_norm", "B_nonzero")
    table = _read_table(path, columns, names="component")
    if "total" not in table.index or table.index.has_duplicates:
        raise InputError("has no row 'total', or one twice", where=path, fix=_TRAIN_AGAIN)
    if table[["modules", "parameters", "share"]].isna().any(axis=None):
        raise InputError("a number is missing", where=path, fix=_TRAIN_AGAIN)
    return table


def _read_table(path, columns, names=None):
    """Return a CSV file of a run, complete, with these columns of numbers, and one of names."""
    try:
        text = path.read_text(encoding="utf-8")
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=path, fix=_TRAIN_AGAIN) from error
    missing = [name for name in (*columns, names or "step") if name not in table]
    if names in table:
        table = table.set_index(names)
    texts = [str(name) for name in table if table[name].dtype.kind not in "if"]
    problem = None
    if missing:
        problem = f"the column '{missing[0]}' is missing"
    elif not text.endswith("\n") or table.empty:
        problem = "is cut off"
    elif texts:
        problem = f"the column '{texts[0]}' holds what is no number"
    if problem:
        raise InputError(problem, where=path, fix=_TRAIN_AGAIN)
    return table


def last_checkpoint(folder):
    """Return the newest complete checkpoint of a run, or None; its last file is trainer_state.json."""
    numbered = [
        (int(number), path)
        for path in (folder / CHECKPOINTS).glob("checkpoint-*")
        if (number := path.name.rpartition("-")[2]).isdigit()
    ]
    for _, path in sorted(numbered, reverse=True):
        try:
            read_json(path / "trainer_state.json", fix="")
        except InputError:
            continue
        return path
    return None


def num_processes():
    """Return how many processes train together, as ``accelerate launch`` and torchrun tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_of(folder, config, *, resume, overwrite):
    """Decide before anything is written whether a run is "new", "interrupted" or "finished".

    An InputError says that the folder holds something else, or a run and neither `resume` nor
    `overwrite`, that there is nothing to resume, or that the run had another configuration.
    """
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other", fix="choose one")
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, not a folder", where=folder, fix="choose another output")
    if resume:
        if not (folder / RUN_CONFIG).is_file():
            raise InputError(
                "holds no run to resume", where=folder, fix="start it without --resume"
            )
        refuse_other_config(folder, config)
        return "finished" if (folder / METRICS_FILE).is_file() else "interrupted"
    entries = [] if not folder.exists() else [path.name for path in folder.iterdir()]
    if not {*RUN_FILES, CHECKPOINTS}.intersection(entries):
        if any(not name.startswith(".") for name in entries):
            raise InputError(
                "is not empty and holds no run", where=folder, fix="choose another output"
            )
    elif not overwrite:
        raise InputError(
            "already holds a run",
            where=folder,
            fix="choose another output, continue it with --resume, or replace it with --overwrite",
        )
    return "new"


def clear_run(folder):
    """Remove the files of a run from its folder, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def clear_partial_files(folder):
    """Remove what a killed run left half-written in its folder."""
    for path in folder.glob(".partial-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_other_config(folder, config):
    """Raise InputError if a run is to be resumed with other settings.

    Batch size, accumulation and the number of processes may change if the images of a step stay the
    same in number: checkpoints are written between epochs, and the gradient does not depend on how
    a step is spread.
    """
    before = load_config(folder / RUN_CONFIG)
    started = read_run_file(folder / VERSIONS_FILE, Versions).get("num_processes", 1)
    images_per_step = [
        one.training.batch_size * one.training.gradient_accumulation_steps * processes
        for one, processes in ((before, started), (config, num_processes()))
    ]
    old, new = before.model_dump(exclude=_MAY_CHANGE), config.model_dump(exclude=_MAY_CHANGE)
    if new["model"]["revision"] is None:  # the run has written down which it took
        new["model"]["revision"] = old["model"]["revision"]
    if not old["lora"]["apply_to_mask_decoder"]:  # left out where no object has a mask
        new["lora"]["apply_to_mask_decoder"] = False
    differing = [
        f"{section}.{key} was {old[section][key]!r} and is {value!r}"
        for section, keys in new.items()
        for key, value in keys.items()
        if old[section][key] != value
    ]
    if images_per_step[0] != images_per_step[1]:
        differing.append(
            "batch_size x gradient_accumulation_steps x processes was {} and is {}".format(
                *images_per_step
            )
        )
    if differing:
        raise InputError(
            f"the run to resume had another configuration: {'; '.join(differing)}",
            where=folder,
            fix="resume with the settings it was started with, or start a new run",
        )


def trained_prompts(dataset):
    """Return what a training `PromptDataset` asks, see `RunFiles.prompts`."""
    present, absent = Counter(), Counter()
    for record in dataset.records:
        prompts = present_prompts(record, dataset.split.categories, dataset.prompt)
        present.update(prompts.keys())
        nouns = dataset.own_names
        if dataset.num_negatives:
            nouns = (*nouns, *dataset.negative_prompts)
        if dataset.num_negatives or not record.objects:
            absent.update(set(absent_candidates(record, nouns)) - set(prompts))
    return {
        "prompts": dict(sorted(present.items())),
        "negatives": dict(sorted(absent.items())),
        "negatives_per_image": dataset.num_negatives,
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
    """Gather the numbers of a run from its `TrainerState`; `best_step` is None for the last one.

    ``steps`` and ``epochs`` done; ``best_step``; ``selected_by``; ``valid``, the metrics of the
    kept state on the validation split; ``train_loss`` and ``valid_loss``: ``first``, ``last``.
    """
    evaluations = [entry for entry in state.log_history if f"{_PREFIX}loss" in entry]
    best = (entry for entry in evaluations if entry["step"] == best_step)
    valid = next(best, evaluations[-1])
    return {
        "steps": state.global_step,
        "epochs": round(state.epoch, 6),
        "best_step": best_step,
        "selected_by": config.evaluation.metric_for_best,
        "valid": {
            name.removeprefix(_PREFIX): value
            for name, value in valid.items()
            if name.startswith(_PREFIX)
        },
        "train_loss": _first_and_last(state.log_history, "loss"),
        "valid_loss": _first_and_last(state.log_history, f"{_PREFIX}loss"),
    }


def run_notes(state, config, best_step, report):
    """Return a sentence for each thing to know before using a run; `report`: its adapter's."""
    notes = []
    if best_step is None:
        metric = config.evaluation.metric_for_best
        notes.append(f"{metric} never rose above 0 on the validation split: the last state is kept")
    if config.effective_warmup_steps >= state.max_steps:
        notes.append(
            f"the warm-up of {config.effective_warmup_steps} steps is not shorter than the run of "
            f"{state.max_steps}: the learning rate never reached its peak"
        )
    for component, row in report.drop(index="total").iterrows():
        if row["modules"] and row["B_nonzero"] < 1:
            idle = round((1 - row["B_nonzero"]) * row["modules"])
            notes.append(f"{idle} of {row['modules']:.0f} modules of {component} never moved")
    clamped = _first_and_last(state.log_history, "train_share_at_clamp")["last"]
    if clamped > _WIDE_AT_CLAMP:
        notes.append(
            f"{clamped:.0%} of the logits stand at the model's clamps, where there is no gradient: "
            "start again from the base, training on cannot mend this"
        )
    return notes


def _first_and_last(log_history, name):
    """Return the first and the last logged value of a name."""
    values = [entry[name] for entry in log_history if name in entry]
    return {"first": values[0], "last": values[-1]}
