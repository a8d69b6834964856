"""Settings of a training run that need less memory, the least loss first.

Every one sees the same number of images per optimiser step. Checkpointing changes no number, and a
smaller batch with more accumulation only what dropout draws; fewer absent prompts and a lower
resolution change what is learned.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from importlib.metadata import version

import torch
from accelerate import PartialState
from transformers import set_seed

from helpers.config import load_config
from helpers.environment import SUBJECT_PACKAGES, device
from helpers.errors import InputError
from helpers.files import resolve, write_json, write_text
from helpers.model.audit import adapter_report
from helpers.model.lora import add_lora, load_adapter_weights, read_adapter_weights, save_adapter
from helpers.model.prompted import checkpoint_activations
from helpers.model.sam3 import base_config, base_dtype, load_base, newest_revision
from helpers.train.data import TrainingData, training_data
from helpers.train.guards import Guards, GuardStop
from helpers.train.run import (
    AUDIT_FILE,
    CARD_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    RUN_CONFIG,
    STOPPED_FILE,
    VERSIONS_FILE,
    RunResult,
    clear_run,
    last_checkpoint,
    load_run,
    num_processes,
    run_metrics,
    run_notes,
    state_of,
    trained_parameters,
    trained_prompts,
)
from helpers.train.share import model_card
from helpers.train.trainer import (
    CHECKPOINTS,
    CurvesFile,
    FirstStepAudit,
    ProgressBar,
    Sam3Trainer,
    SetEpoch,
    training_arguments,
)


class OutOfMemory(InputError):
    """The memory of the GPU or the machine does not hold a training step."""


@dataclass(frozen=True)
class _Ingredients:
    """What a run needs, built before anything is written."""

    model: torch.nn.Module
    processor: object
    data: TrainingData
    own_resolution: int
    """Of the base as it is published."""


def train(
    config,
    *,
    output_dir=None,
    resume=False,
    overwrite=False,
    train_split=None,
    val_split=None,
    callbacks=(),
    allow_empty=False,
    progress=None,
):
    """Fine-tune a base with LoRA and write everything a user of the result needs.

    Parameters
    ----------
    config : helpers.config.Config
    output_dir : os.PathLike, optional
        Run folder; by default ``output.output_dir`` of the config.
    resume : bool
        True to continue an interrupted run from its last complete checkpoint, which gives the
        losses an uninterrupted run would have given. A finished run is returned as it is.
    overwrite : bool
        True to replace a run that is in the folder.
    train_split, val_split : helpers.data.records.Split, optional
        Data in memory, for example a doctored split. By default both are read from
        ``data.data_dir``, and the dataset is checked first.
    callbacks : sequence of transformers.TrainerCallback
        For example `helpers.show.panels.LivePlotCallback`.
    allow_empty : bool
        True to train although no object reaches the loss: it teaches to detect nothing. Switches
        off the guards that would stop this, see `helpers.train.guards.OFF_IF_EMPTY`.
    progress : bool, optional
        Progress bar on stderr; by default if stderr is a terminal.

    Returns
    -------
    RunResult
        With the kept checkpoint loaded: the one with the best ``evaluation.metric_for_best`` on
        the validation split, or the last if that metric never rose above 0.

    Raises
    ------
    InputError
        If base, data or settings cannot be used, or no object would reach the loss: nothing is
        written then. A `helpers.train.guards.GuardStop` if a guard of the config finds a fault, an
        `OutOfMemory` if memory runs out: ``stopped.json`` then holds ``cause`` (a key of `helpers.causes.CAUSES`, or
        null), ``message``, ``where``, ``fix`` and ``step``.
    """
    folder = resolve(output_dir or config.output.output_dir)
    state = state_of(folder, config, resume=resume, overwrite=overwrite)
    if state == "finished":
        return load_run(folder)
    config = _with_revision(config, folder if state == "interrupted" else None)
    ingredients = _prepare(config, train_split, val_split, allow_empty)
    data, audit, curves = ingredients.data, FirstStepAudit(), CurvesFile(folder)
    own = [SetEpoch(data.train), audit, curves]
    if sys.stderr.isatty() if progress is None else progress:
        own.append(ProgressBar())
    arguments = training_arguments(config, folder)
    processes = PartialState()
    processes.wait_for_everyone()  # all have looked at the folder before one writes to it
    if processes.is_main_process:
        (folder / STOPPED_FILE).unlink(missing_ok=True)
        if state == "new":
            _write_start(folder, config, data.train)
    trainer = Sam3Trainer(
        config,
        guards=Guards(config, data.counts["train"], allow_empty=allow_empty),
        model=ingredients.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.valid,
        data_collator=data.collator,
        callbacks=[*own, *callbacks],
    )
    try:
        _run(trainer, last_checkpoint(folder) if state == "interrupted" else None)
    except InputError as error:
        curves.write(trainer.state)
        if processes.is_main_process:
            _write_stop(folder, error, trainer.state.global_step)
        raise
    processes.wait_for_everyone()  # the last checkpoint is written
    result = _result(trainer, folder, config, ingredients, audit)
    if processes.is_main_process:
        _write_result(result, ingredients.own_resolution)
    return result


def _with_revision(config, resumed_folder):
    """Write down which commit a base on the hub is, so that the run can be loaded with the same."""
    if config.model.revision is not None:
        return config
    if resumed_folder is None:
        revision = newest_revision(config.model.name)
    else:
        revision = load_config(resumed_folder / RUN_CONFIG).model.revision
    model = config.model.model_copy(update={"revision": revision})
    return config.model_copy(update={"model": model})


def _prepare(config, train_split, val_split, allow_empty):
    """Load base and data, make sure that objects arrive, and put LoRA on."""
    set_seed(config.training.seed)
    base, dtype = config.model, base_dtype(config.training.mixed_precision)
    model, processor = load_base(base.name, base.revision, dtype, base.resolution)
    data = training_data(
        config,
        model,
        processor,
        train_split=train_split,
        val_split=val_split,
        allow_empty=allow_empty,
    )
    peft_model = add_lora(model, config.lora)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    own_resolution = base_config(base.name, base.revision).image_size
    return _Ingredients(peft_model, processor, data, own_resolution)


def _write_start(folder, config, train_dataset):
    """Write what is known before training, in place of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_run(folder)
    packages = {name: version(name) for name in SUBJECT_PACKAGES}
    running = {"machine": device(), "num_processes": num_processes()}
    write_json(folder / VERSIONS_FILE, {"packages": packages, **running})
    write_json(folder / PROMPTS_FILE, trained_prompts(train_dataset))
    write_text(folder / RUN_CONFIG, config.to_yaml())


def _write_stop(folder, error, step):
    """Write why training stopped."""
    cause = error.cause if isinstance(error, GuardStop) else None
    reason = {"message": error.message, "where": error.where, "fix": error.fix}
    write_json(folder / STOPPED_FILE, {"cause": cause, **reason, "step": step})


def _run(trainer, checkpoint):
    """Train, and translate running out of memory."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory at step {trainer.state.global_step}: {str(error).splitlines()[0]}",
            where=trainer.args.output_dir,
            fix="set training.gradient_checkpointing=true, lower training.batch_size (and raise "
            "gradient_accumulation_steps) or data.num_negatives, or lower model.resolution; "
            "'python -m helpers plan' with the same config says which of these fits",
        ) from error


def _is_out_of_memory(error):
    """Tell whether an error says that the GPU's or the machine's memory is full."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out_of_memory or "allocate memory" in str(error)


def _result(trainer, folder, config, ingredients, audit):
    """Load the chosen checkpoint and gather the numbers of the run."""
    state = trainer.state
    model, data = ingredients.model, ingredients.data
    best = folder / CHECKPOINTS / f"checkpoint-{state.best_global_step}"
    best_step = state.best_global_step if state.best_global_step and best.is_dir() else None
    report = adapter_report(model)  # of the last state: did every module move?
    if audit.report is not None:
        report["grad_norm"] = audit.report["grad_norm"]
    if best_step is not None:
        load_adapter_weights(model, read_adapter_weights(best), best)
    objects = {name: int(one["num_objects"].sum()) for name, one in data.counts.items()}
    metrics = run_metrics(state, config, best_step) | {"objects": objects}
    metrics["data_fingerprint"] = data.fingerprint
    metrics["trained_parameters"] = trained_parameters(trainer.optimizer, model)
    metrics["notes"] = run_notes(state, config, best_step, report)
    return RunResult(
        folder=folder,
        config=config,
        model=model.eval(),
        processor=ingredients.processor,
        prompts=trained_prompts(data.train),
        metrics=metrics,
        history=state.log_history,
        adapter=report,
    )


def _write_result(result, own_resolution):
    """Write adapter, report, card and metrics; the metrics come last and mark the run as finished."""
    base = result.config.model
    save_adapter(result.model, result.folder, base.name, base.revision)
    write_text(result.folder / AUDIT_FILE, result.adapter.to_csv())
    write_text(result.folder / CARD_FILE, model_card(result, own_resolution))
    write_json(result.folder / METRICS_FILE, result.metrics)


def train_within_memory(config, *, on_retry=None, output_dir=None, overwrite=False, **options):
    """Train; if memory runs out before the first checkpoint, start again with a smaller step.

    First activations are checkpointed, then the batch gets smaller and accumulation longer, so that
    an optimiser step sees the same number of images. What is learned from is never changed.

    Parameters
    ----------
    config : helpers.config.Config
    on_retry : callable, optional
        Called with a sentence before each new attempt.
    output_dir, overwrite, **options
        See `helpers.train.training.train`.

    Returns
    -------
    helpers.train.run.RunResult
        Its ``config`` is the one that fitted.

    Raises
    ------
    InputError
        See `helpers.train.training.train`. An `OutOfMemory` if nothing smaller is left, if a checkpoint
        would be lost, or with several processes, of which the others would wait for ever.
    """
    while True:
        try:
            return train(config, output_dir=output_dir, overwrite=overwrite, **options)
        except OutOfMemory as error:
            smaller = smaller_step(config)
            folder = resolve(output_dir or config.output.output_dir)
            if smaller is None or num_processes() > 1 or last_checkpoint(folder) is not None:
                raise
            message = error.message
        gc.collect()  # the failed attempt's model; its frames are gone only now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if on_retry is not None:
            on_retry(f"{message}; trying again with {' '.join(set_arguments(smaller))}")
        config, overwrite = changed(config, smaller), True


def smaller_step(config):
    """Return the next change that needs less memory and leaves what is learned as it is.

    Parameters
    ----------
    config : helpers.config.Config

    Returns
    -------
    dict or None
        ``section.key`` to value, all in ``training``; None if there is none.
    """
    try:
        shape = base_config(config.model.name, config.model.revision)
    except InputError:
        return None
    for _, changes in ladder(config, shape):
        if changes and all(name.startswith("training.") for name in changes):
            return changes
    return None


_MIN_SHARE_OF_RESOLUTION = 0.5


def ladder(config, shape):
    """List settings that need less and less memory, each on top of the one before.

    Parameters
    ----------
    config : helpers.config.Config
    shape : transformers.Sam3Config
        Of the base.

    Yields
    ------
    name : str
        What the setting changes, for a table.
    changes : dict
        ``section.key`` to value; empty for the config as it is.
    """
    training, changes = config.training, {}
    yield "as it is", {}
    if not training.gradient_checkpointing:
        changes["training.gradient_checkpointing"] = True
        yield "checkpointing", dict(changes)
    images = training.batch_size * training.gradient_accumulation_steps
    for size in range(training.batch_size - 1, 0, -1):
        if images % size == 0:
            changes["training.batch_size"] = size
            changes["training.gradient_accumulation_steps"] = images // size
            yield f"{size} x {images // size} images", dict(changes)
    negatives = config.data.num_negatives
    while negatives > 1:
        negatives //= 2
        changes["data.num_negatives"] = negatives
        yield f"{negatives} negatives", dict(changes)
    backbone = shape.vision_config.backbone_config
    window = backbone.patch_size * backbone.window_size  # a rest of a window would be padded
    largest = (config.model.resolution - 1) // window
    smallest = -(-config.model.resolution * _MIN_SHARE_OF_RESOLUTION // window)
    for multiple in range(largest, int(smallest) - 1, -1):
        changes["model.resolution"] = multiple * window
        yield f"{multiple * window} px", dict(changes)


def changed(config, changes):
    """Replace values of a config.

    Parameters
    ----------
    config : helpers.config.Config
    changes : dict
        ``section.key`` to value.

    Returns
    -------
    helpers.config.Config
    """
    sections = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    updates = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in sections.items()
    }
    return config.model_copy(update=updates)


def set_arguments(changes):
    """Write changes as arguments of the command line.

    Parameters
    ----------
    changes : dict
        ``section.key`` to value.

    Returns
    -------
    list of str
        For example ``["training.batch_size=1"]``, each to follow a ``--set``.
    """
    return [f"{name}={str(value).lower()}" for name, value in changes.items()]
