"""From a config to a finished run folder; a single step first, and smaller ones if memory ends."""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback, set_seed

from helpers.config import load_config
from helpers.data.dataset import PromptDataset, count_objects, load_dataset
from helpers.environment import SUBJECT_PACKAGES, device
from helpers.errors import InputError
from helpers.files import resolve, write_json, write_text
from helpers.model import sam3
from helpers.model.audit import adapter_report
from helpers.model.lora import add_lora, load_adapter_weights, read_adapter_weights, save_adapter
from helpers.model.prompted import checkpoint_activations
from helpers.train import run as run_folder
from helpers.train import trainer as training_loop
from helpers.train.data import TrainingData, training_data
from helpers.train.guards import Guards, GuardStop
from helpers.train.share import model_card
from helpers.train.trainer import Sam3Trainer, training_arguments

_MIN_SHARE_OF_RESOLUTION = 0.5
_WRITE_FAILED = ("inline_container", "PytorchStreamWriter", "file write failed")


class OutOfMemory(InputError):
    """The memory of the GPU or the machine does not hold a training step."""


@dataclass(frozen=True)
class _Ingredients:
    """What a run needs, built before anything is written."""

    config: object
    model: torch.nn.Module
    processor: object
    data: TrainingData


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
        For example `helpers.show.LossPanel`.
    allow_empty : bool
        True to train although no object reaches the loss: it teaches to detect nothing. Switches
        off the guards that would stop this, see `helpers.train.guards.OFF_IF_EMPTY`.
    progress : bool, optional
        Progress bar on stderr; by default if stderr is a terminal.

    Returns
    -------
    helpers.train.run.RunResult
        With the kept checkpoint loaded: the one with the best ``evaluation.metric_for_best`` on
        the validation split, or the last if that metric never rose above 0. Its config leaves the
        mask decoder out if no object of the training split has a mask.

    Raises
    ------
    InputError
        If base, data or settings cannot be used, or no object would reach the loss: nothing is
        written then. A `helpers.train.guards.GuardStop` if a guard of the config finds a fault, an
        `OutOfMemory` if memory runs out: ``stopped.json`` then holds ``cause`` (a key of
        `helpers.causes.CAUSES`, or null), ``message``, ``where``, ``fix`` and ``step``.
    """
    folder = resolve(output_dir or config.output.output_dir)
    state = run_folder.state_of(folder, config, resume=resume, overwrite=overwrite)
    if state == "finished":
        return run_folder.load_run(folder)
    config = _with_revision(config, folder if state == "interrupted" else None)
    parts = _prepare(config, train_split, val_split, allow_empty)
    arguments = training_arguments(parts.config, folder)  # decides about the device, too
    processes = PartialState()
    processes.wait_for_everyone()  # all have looked at the folder before one writes to it
    if state == "interrupted":
        _refuse_other_data(folder, parts)
    elif processes.is_main_process:
        _write_start(folder, parts)
    if processes.is_main_process:
        run_folder.clear_partial_files(folder)
        (folder / run_folder.STOPPED_FILE).unlink(missing_ok=True)
    audit = training_loop.FirstStepAudit()
    own = [training_loop.SetEpoch(parts.data.train), audit, training_loop.CurvesFile(folder)]
    if sys.stderr.isatty() if progress is None else progress:
        own.append(training_loop.ProgressBar())
    trainer = _trainer(parts, arguments, [*own, *callbacks], allow_empty)
    checkpoint = run_folder.last_checkpoint(folder) if state == "interrupted" else None
    try:
        with _readable_errors(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            processes.wait_for_everyone()  # the last checkpoint is written
            result = _result(trainer, folder, parts, audit)
            if processes.is_main_process:
                _write_result(result)
    except InputError as error:
        if processes.is_main_process:
            with suppress(OSError):  # on a full disk the error itself is what counts
                own[2].write(trainer.state)
                _write_stop(folder, error, trainer.state.global_step)
        raise
    return result


def _with_revision(config, resumed_folder):
    """Write down which commit a base on the hub is, so that the run can be loaded with the same."""
    if config.model.revision is not None:
        return config
    if resumed_folder is None:
        revision = sam3.newest_revision(config.model.name)
    else:
        revision = load_config(resumed_folder / run_folder.RUN_CONFIG).model.revision
    return config.replace({"model.revision": revision})


def _prepare(config, train_split=None, val_split=None, allow_empty=False):
    """Load base and data, make sure that objects arrive, and put LoRA on."""
    set_seed(config.training.seed)
    base, dtype = config.model, sam3.base_dtype(config.training.mixed_precision)
    model, processor = sam3.load_base(base.name, base.revision, dtype, base.resolution)
    data = training_data(
        config,
        model,
        processor,
        train_split=train_split,
        val_split=val_split,
        allow_empty=allow_empty,
    )
    config = _without_idle_mask_decoder(config, data)
    peft_model = add_lora(model, config.lora)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    return _Ingredients(config, peft_model, processor, data)


def _without_idle_mask_decoder(config, data):
    """Leave the mask decoder out if objects arrive and none has a mask: it would have no gradient."""
    counts = data.counts["train"]
    if not config.lora.apply_to_mask_decoder or not counts["num_objects"].any():
        return config
    if counts["num_masks"].any():
        return config
    text = (
        "no object of the training split has a mask, so the mask decoder has nothing to learn from"
    )
    others = [key for key, on in config.lora if key.startswith("apply_to_") and on]
    if others == ["apply_to_mask_decoder"]:
        raise InputError(text, where="lora", fix="adapt another component, or add masks")
    print(f"note: {text} and is left out", file=sys.stderr)
    return config.replace({"lora.apply_to_mask_decoder": False})


def _trainer(parts, arguments, callbacks, allow_empty):
    """Build the trainer of a run."""
    data = parts.data
    return Sam3Trainer(
        parts.config,
        guards=Guards(parts.config, data.counts["train"], allow_empty=allow_empty),
        model=parts.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.valid,
        data_collator=data.collator,
        callbacks=callbacks,
    )


def _write_start(folder, parts):
    """Write what is known before training, in place of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.clear_run(folder)
    versions = {
        "packages": {name: version(name) for name in SUBJECT_PACKAGES},
        "machine": device(),
        "num_processes": run_folder.num_processes(),
        "data_fingerprint": parts.data.fingerprint,
    }
    write_json(folder / run_folder.VERSIONS_FILE, versions)
    write_json(folder / run_folder.PROMPTS_FILE, run_folder.trained_prompts(parts.data.train))
    write_text(folder / run_folder.RUN_CONFIG, parts.config.to_yaml())


def _refuse_other_data(folder, parts):
    """Raise InputError if an interrupted run was trained on other images or other components."""
    versions = run_folder.read_run_file(folder / run_folder.VERSIONS_FILE, run_folder.Versions)
    before = versions.get("data_fingerprint")  # runs of older releases have none
    lora = load_config(folder / run_folder.RUN_CONFIG).lora
    if before not in (None, parts.data.fingerprint) or lora != parts.config.lora:
        raise InputError(
            "the run to resume had other training data, or adapted other components",
            where=folder,
            fix="resume with the dataset it was started with, or start a new run",
        )


def _write_stop(folder, error, step):
    """Write why training stopped."""
    cause = error.cause if isinstance(error, GuardStop) else None
    reason = {"message": error.message, "where": error.where, "fix": error.fix}
    write_json(folder / run_folder.STOPPED_FILE, {"cause": cause, **reason, "step": step})


@contextmanager
def _readable_errors(trainer):
    """Translate what a full memory, a full disk or a read-only folder raises."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        where, step = trainer.args.output_dir, trainer.state.global_step
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if _is_out_of_memory(error):
            raise OutOfMemory(
                f"out of memory at step {step}: {reason}",
                where=where,
                fix="set training.gradient_checkpointing=true, lower training.batch_size (and "
                "raise gradient_accumulation_steps) or data.num_negatives, or lower "
                "model.resolution; 'python -m helpers train --dry-run' tries a single step",
            ) from error
        if isinstance(error, OSError | SafetensorError) or any(
            part in reason for part in _WRITE_FAILED
        ):
            raise InputError(
                f"a file could not be written or read at step {step} ({reason})",
                where=getattr(error, "filename", None) or where,
                fix="make room or correct the permissions, then continue with --resume",
            ) from error
        raise


def _is_out_of_memory(error):
    """Return whether an error says that the GPU's or the machine's memory is full."""
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return out_of_memory or "allocate memory" in str(error)


def _result(trainer, folder, parts, audit):
    """Load the chosen checkpoint and gather the numbers of the run."""
    state, config, model, data = trainer.state, parts.config, parts.model, parts.data
    best = folder / training_loop.CHECKPOINTS / f"checkpoint-{state.best_global_step}"
    best_step = state.best_global_step if state.best_global_step and best.is_dir() else None
    report = adapter_report(model)  # of the last state: did every module move?
    if audit.report is not None:
        report["grad_norm"] = audit.report["grad_norm"]
    if best_step is not None:
        load_adapter_weights(model, read_adapter_weights(best), best)
    objects = {name: int(counts["num_objects"].sum()) for name, counts in data.counts.items()}
    metrics = run_folder.run_metrics(state, config, best_step) | {"objects": objects}
    metrics["data_fingerprint"] = data.fingerprint
    metrics["trained_parameters"] = run_folder.trained_parameters(trainer.optimizer, model)
    metrics["notes"] = run_folder.run_notes(state, config, best_step, report)
    return run_folder.RunResult(
        folder=folder,
        config=config,
        model=model.eval(),
        processor=parts.processor,
        prompts=run_folder.trained_prompts(data.train),
        metrics=metrics,
        history=state.log_history,
        adapter=report,
    )


def _write_result(result):
    """Write adapter, report, card and metrics; the metrics come last and mark the run as finished."""
    base = result.config.model
    own_resolution = sam3.base_config(base.name, base.revision).image_size
    save_adapter(result.model, result.folder, base.name, base.revision)
    write_text(result.folder / run_folder.AUDIT_FILE, result.adapter.to_csv())
    write_text(result.folder / run_folder.CARD_FILE, model_card(result, own_resolution))
    write_json(result.folder / run_folder.METRICS_FILE, result.metrics)


def train_within_memory(
    config, *, on_retry=None, output_dir=None, resume=False, overwrite=False, **options
):
    """Train; if memory runs out before the first checkpoint, start again with a smaller step.

    First activations are checkpointed, then the batch gets smaller and accumulation longer, so that
    an optimiser step sees the same number of images. `on_retry` is called with a sentence before
    each new attempt; the rest is as for `train`. The config of the result is the one that fitted.
    Memory still runs out, as an `OutOfMemory`, if nothing smaller is left, if a checkpoint would be
    lost, or with several processes, of which the others would wait for ever.
    """
    while True:
        try:
            return train(
                config, output_dir=output_dir, resume=resume, overwrite=overwrite, **options
            )
        except OutOfMemory as error:
            changes = smaller_step(config)
            folder = resolve(output_dir or config.output.output_dir)
            has_checkpoint = run_folder.last_checkpoint(folder) is not None
            if changes is None or run_folder.num_processes() > 1 or has_checkpoint:
                raise
            message = error.message
        _free_memory()  # the failed attempt's model; its frames are gone only now
        if on_retry is not None:
            on_retry(f"{message}; trying again with {' '.join(set_arguments(changes))}")
        config, resume, overwrite = config.replace(changes), False, True


def _free_memory():
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def dry_run(config):
    """Take a training step on the fullest batch of a dataset, on the device at hand.

    Of two steps the second is measured: the first also allocates the optimiser's state.

    Parameters
    ----------
    config : helpers.config.Config

    Returns
    -------
    dict
        ``fits``; ``device``; ``images``, ``prompts`` and ``objects`` of the batch;
        ``peak_memory_bytes`` and ``peak_memory_of``, which says what was measured;
        ``seconds_per_step``, an optimiser step with its accumulation; ``steps_per_epoch``;
        ``seconds_per_epoch``, if all batches were as full, without the validation; ``next``, the
        settings that need less memory, as arguments of ``--set``; empty if it fits or nothing is
        left. What was not measured is None.

    Raises
    ------
    InputError
        If base, data or settings cannot be used. Nothing is written to the run folder.
    """
    training = config.training
    dataset = load_dataset(config)
    splits = [dataset.split(name) for name in (config.data.train_split, config.data.val_split)]
    counts = count_objects(PromptDataset.from_config(config, splits[0]))
    sizes = counts.groupby("image_id")["num_objects"].agg(["size", "sum"])
    fullest = sizes.sort_values(["size", "sum"], ascending=False).head(training.batch_size)
    records = {record.image_id: record for record in splits[0].records}
    batch = replace(splits[0], records=tuple(records[name] for name in fullest.index))
    images_per_step = training.batch_size * training.gradient_accumulation_steps
    steps = math.ceil(len(records) / (images_per_step * run_folder.num_processes()))
    result = {
        "fits": True,
        "device": device()["name"] if torch.cuda.is_available() else device()["device"],
        "images": len(fullest),
        "prompts": int(fullest["size"].sum()),
        "objects": int(fullest["sum"].sum()),
        "peak_memory_bytes": None,
        "peak_memory_of": "the GPU" if torch.cuda.is_available() else "this process, resident",
        "seconds_per_step": None,
        "steps_per_epoch": steps,
        "seconds_per_epoch": None,
        "next": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        one_batch = {"training.gradient_accumulation_steps": 1}
        one_batch["data.prompts_by_category"] = {}  # the splits have their nouns already
        if training.feature_cache is not None:
            one_batch["training.feature_cache"] = str(Path(folder) / "features")
        clock = _Clock()
        try:
            parts = _prepare(
                config.replace(one_batch),
                batch,
                replace(splits[1], records=batch.records[:1]),
                True,
            )
            no_files = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 2}
            arguments = training_arguments(parts.config, Path(folder), **no_files)
            trainer = _trainer(parts, arguments, [clock], allow_empty=True)
            with _readable_errors(trainer):
                trainer.train()
        except OutOfMemory:
            rungs = (changes for _, changes in ladder(config) if changes)
            return result | {"fits": False, "next": set_arguments(next(rungs, {}))}
    seconds = clock.seconds * training.gradient_accumulation_steps
    return result | {
        "peak_memory_bytes": _peak_memory(),
        "seconds_per_step": seconds,
        "seconds_per_epoch": seconds * steps,
    }


class _Clock(TrainerCallback):
    """Measure the last step."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock when the device has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start


def _peak_memory():
    """Return the peak in bytes: allocated on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def dry_run_text(result):
    """Write the result of `dry_run` for people."""
    lines = [
        f"fullest batch: {result['images']} images, {result['prompts']} prompts, "
        f"{result['objects']} objects, on {result['device']}"
    ]
    if result["fits"]:
        if result["peak_memory_bytes"] is not None:
            peak = result["peak_memory_bytes"] / 2**30
            lines.append(f"peak memory of {result['peak_memory_of']}: {peak:.2f} GiB")
        lines.append(
            f"{result['seconds_per_step']:.3g} s per step; {result['steps_per_epoch']} steps, at "
            f"most {result['seconds_per_epoch']:.3g} s, per epoch, without validation"
        )
    elif result["next"]:
        options = " ".join(f"--set {setting}" for setting in result["next"])
        lines.append(f"out of memory; the next setting to try: {options}")
    else:
        lines.append("out of memory, and no smaller setting is left")
    return "\n".join(lines)


def smaller_step(config):
    """Return the next change that needs less memory and leaves what is learned as it is, or None."""
    for _, changes in ladder(config):
        if not all(name.startswith("training.") for name in changes):
            return None  # each setting is on top of the one before
        if changes:
            return changes
    return None


def ladder(config):
    """Yield a name and settings that need less and less memory, each on top of the one before.

    Each sees the same number of images per optimiser step. Checkpointing changes no number, and a
    smaller batch with more accumulation only what dropout draws; fewer absent prompts and a lower
    resolution change what is learned. The settings are ``section.key`` to value, at first empty.
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
    backbone = sam3.base_config(config.model.name, config.model.revision)
    backbone = backbone.vision_config.backbone_config
    window = backbone.patch_size * backbone.window_size  # a rest of a window would be padded
    largest = (config.model.resolution - 1) // window
    smallest = -(-config.model.resolution * _MIN_SHARE_OF_RESOLUTION // window)
    for multiple in range(largest, int(smallest) - 1, -1):
        changes["model.resolution"] = multiple * window
        yield f"{multiple * window} px", dict(changes)


def set_arguments(changes):
    """Write ``section.key`` to value as texts such as "training.batch_size=1" for ``--set``."""
    return [f"{name}={str(value).lower()}" for name, value in changes.items()]
