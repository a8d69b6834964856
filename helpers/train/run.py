"""When a run folder may be written: anew, over an old run, or on from where one stopped."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from peft import PeftModel
from transformers import Sam3Processor

from helpers.config import Config, load_config
from helpers.data.prompts import absent_candidates, present_prompts
from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.lora import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, load_adapter
from helpers.model.sam3 import base_dtype, load_base
from helpers.train.trainer import CHECKPOINTS, CURVES_FILE

PREFIX = "eval_"
_WIDE_AT_CLAMP = 0.5


def run_metrics(state, config, best_step):
    """Gather the numbers of a run from its log.

    Parameters
    ----------
    state : transformers.TrainerState
    config : helpers.config.Config
    best_step : int or None
        Step of the kept checkpoint; None if the last state was kept.

    Returns
    -------
    dict
        ``steps`` and ``epochs`` done; ``best_step``; ``selected_by``; ``valid``, the metrics of the
        kept state on the validation split; ``train_loss`` and ``valid_loss``, each with ``first``
        and ``last``.
    """
    judged = [entry for entry in state.log_history if f"{PREFIX}loss" in entry]
    kept = next((entry for entry in judged if entry["step"] == best_step), judged[-1])
    return {
        "steps": state.global_step,
        "epochs": round(state.epoch, 6),
        "best_step": best_step,
        "selected_by": config.evaluation.metric_for_best,
        "valid": {
            name.removeprefix(PREFIX): value
            for name, value in kept.items()
            if name.startswith(PREFIX)
        },
        "train_loss": _first_and_last(state.log_history, "loss"),
        "valid_loss": _first_and_last(state.log_history, f"{PREFIX}loss"),
    }


def trained_parameters(optimizer, model):
    """Count what the optimiser was given, and how much of it belongs to LoRA.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : peft.PeftModel

    Returns
    -------
    dict of str to int
        ``all`` and ``lora``, numbers of parameters; they are equal if the base was frozen.
    """
    lora = {id(tensor) for name, tensor in model.named_parameters() if ".lora_" in name}
    given = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return {
        "all": sum(tensor.numel() for tensor in given),
        "lora": sum(tensor.numel() for tensor in given if id(tensor) in lora),
    }


def run_notes(state, config, best_step, report):
    """Say what a person should know before using a run.

    Parameters
    ----------
    state : transformers.TrainerState
    config : helpers.config.Config
    best_step : int or None
        See `run_metrics`.
    report : pandas.DataFrame
        `helpers.model.lora.adapter_report` after the last step.

    Returns
    -------
    list of str
        One sentence per peculiarity; empty for a run without any.
    """
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


RUN_CONFIG = "config.yaml"
PROMPTS_FILE = "prompts.json"
MERGE_FILE = "merge.json"
METRICS_FILE = "metrics.json"
"""Written last: a folder that has it holds a finished run."""
AUDIT_FILE = "adapter_report.csv"
VERSIONS_FILE = "environment.json"
CARD_FILE = "README.md"
STOPPED_FILE = "stopped.json"
"""Why training stopped on its own; gone as soon as the run goes on or starts anew."""
RUN_FILES = (
    METRICS_FILE,
    RUN_CONFIG,
    PROMPTS_FILE,
    CURVES_FILE,
    AUDIT_FILE,
    VERSIONS_FILE,
    CARD_FILE,
    STOPPED_FILE,
    WEIGHTS_FILE,
    CONFIG_FILE,
    BASE_FILE,
)
_TRAIN_AGAIN = "train again with --overwrite"
_TRAIN_FIRST = "name the folder of a finished run, or train one with 'python -m helpers train'"


@dataclass
class RunFiles:
    """What a finished run wrote, without its model.

    Attributes
    ----------
    folder : pathlib.Path
        Holds ``adapter_model.safetensors``, ``adapter_config.json``, ``base.json``,
        ``config.yaml``, ``prompts.json``, ``metrics.json``, ``curves.csv``,
        ``adapter_report.csv``, ``environment.json``, ``README.md`` (the model card) and
        ``checkpoints/``.
    config : helpers.config.Config
        Resolved.
    prompts : dict
        ``prompts``: trained prompt to the number of images that show it; ``negatives``: absent
        prompt to the number of images it may be asked on; ``negatives_per_image``.
    metrics : dict
        ``steps``, ``epochs``, ``best_step``, ``selected_by``, ``valid`` (metrics of the kept
        checkpoint), ``train_loss`` and ``valid_loss`` (``first``, ``last``), ``objects``,
        ``data_fingerprint``, ``trained_parameters``, ``notes``; see `helpers.train.run`.
    history : list of dict
        The log, as ``trainer.state.log_history``.
    adapter : pandas.DataFrame
        `helpers.model.lora.adapter_report` at the end; ``grad_norm`` is that of the first step.
    """

    folder: Path
    config: Config
    prompts: dict
    metrics: dict
    history: list
    adapter: pd.DataFrame


@dataclass
class RunResult(RunFiles):
    """A finished run in memory: its files and its model.

    Attributes
    ----------
    model : peft.PeftModel
        With the kept checkpoint, in eval mode.
    processor : transformers.Sam3Processor
        Set to the resolution of the config.
    """

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
        if (folder / STOPPED_FILE).is_file():
            stopped = read_json(folder / STOPPED_FILE, fix=_TRAIN_AGAIN)
            raise InputError(
                f"the run was stopped: {stopped['message']}", where=folder, fix=stopped["fix"]
            )
        if (folder / RUN_CONFIG).is_file():
            raise InputError(
                "the run was interrupted and has no adapter yet",
                where=folder,
                fix="continue it with 'python -m helpers train ... --resume'",
            )
        raise InputError(f"holds no {METRICS_FILE}", where=folder, fix=_TRAIN_FIRST)
    return RunFiles(
        folder=folder,
        config=load_config(folder / RUN_CONFIG),
        prompts=read_json(folder / PROMPTS_FILE, fix=_TRAIN_AGAIN),
        metrics=read_json(folder / METRICS_FILE, fix=_TRAIN_AGAIN),
        history=read_history(folder),
        adapter=_read_table(folder / AUDIT_FILE).set_index("component"),
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
    """
    table = _read_table(Path(folder) / CURVES_FILE)
    table = table.astype({"step": int})
    return [
        {name: value for name, value in row.items() if not pd.isna(value)}
        for row in table.to_dict(orient="records")
    ]


def last_checkpoint(folder):
    """Find the newest checkpoint that was written completely.

    A kill while saving leaves a folder without, or with half of, ``trainer_state.json``, which is
    written last.

    Parameters
    ----------
    folder : pathlib.Path
        Run folder.

    Returns
    -------
    pathlib.Path or None
    """
    found = (folder / CHECKPOINTS).glob("checkpoint-*")
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            read_json(path / "trainer_state.json", fix="")
        except InputError:
            continue
        return path
    return None


def trained_prompts(dataset):
    """List what a training run asks, for the comparison with what is asked of it later.

    Parameters
    ----------
    dataset : helpers.data.dataset.PromptDataset

    Returns
    -------
    dict
        See `RunResult.prompts`.
    """
    present, absent = Counter(), Counter()
    for record in dataset.records:
        asked = present_prompts(record, dataset.split.categories, dataset.prompt)
        present.update(asked.keys())
        nouns = dataset.own_names
        if dataset.num_negatives:
            nouns = (*nouns, *dataset.negative_prompts)
        if dataset.num_negatives or not record.objects:
            absent.update(set(absent_candidates(record, nouns)) - set(asked))
    return {
        "prompts": dict(sorted(present.items())),
        "negatives": dict(sorted(absent.items())),
        "negatives_per_image": dataset.num_negatives,
    }


def _read_table(path):
    """Read a CSV file of a run."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=path, fix=_TRAIN_AGAIN) from error


_MAY_CHANGE = {
    ("training", "batch_size"),
    ("training", "gradient_accumulation_steps"),
    ("training", "gradient_checkpointing"),
    ("training", "feature_cache"),
    ("training", "num_workers"),
}
"""Keys that change how a step is computed, not what; the number of its images is compared."""


def num_processes():
    """Return how many processes train together, as ``accelerate launch`` and torchrun tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_of(folder, config, *, resume, overwrite):
    """Decide what to do with a run folder before anything is written.

    Parameters
    ----------
    folder : pathlib.Path
    config : helpers.config.Config
        Of the run that is about to start.
    resume, overwrite : bool
        What the user asked for.

    Returns
    -------
    {"new", "interrupted", "finished"}
        ``new`` also for a run that is to be replaced.

    Raises
    ------
    InputError
        If the folder holds a run and neither was asked for, if there is nothing to resume, or if
        the run to resume had another configuration.
    """
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other", fix="choose one")
    if folder.is_file():
        raise InputError("is a file, not a folder", where=folder, fix="choose another output")
    holds_run = any((folder / name).exists() for name in (*RUN_FILES, CHECKPOINTS))
    if resume:
        if not (folder / RUN_CONFIG).is_file():
            raise InputError(
                "holds no run to resume", where=folder, fix="start it without --resume"
            )
        _refuse_other_config(folder, config)
        return "finished" if (folder / METRICS_FILE).is_file() else "interrupted"
    if holds_run and not overwrite:
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


def _refuse_other_config(folder, config):
    """Raise InputError if a run is to be resumed with other settings.

    Batch size, accumulation and the number of processes may change if the images of a step stay the
    same in number: checkpoints are written between epochs, and the gradient does not depend on how
    a step is spread.
    """
    before = load_config(folder / RUN_CONFIG).model_dump()
    now = config.model_dump()
    started = read_json(folder / VERSIONS_FILE, fix="start a new run").get("num_processes", 1)
    images_per_step = [
        one["training"]["batch_size"] * one["training"]["gradient_accumulation_steps"] * processes
        for one, processes in ((before, started), (now, num_processes()))
    ]
    differing = [
        f"{section}.{key} was {before[section][key]!r} and is {value!r}"
        for section, keys in now.items()
        for key, value in keys.items()
        if section not in ("guards", "output")
        and (section, key) not in _MAY_CHANGE
        and not (key == "revision" and value is None)  # the run has written down which it took
        and before[section][key] != value
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
