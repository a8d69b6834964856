"""From a config to a finished run folder; a single step first, and smaller ones if memory ends."""

import math
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from transformers import ProgressCallback, TrainerCallback, set_seed

from helpers.checks.dataset import check_dataset
from helpers.config import load_config
from helpers.data import PromptCollator, PromptDataset, count_objects, load_dataset
from helpers.data.dataset import data_fingerprint
from helpers.data.records import nouns_overlap, rename_categories
from helpers.detect.knowledge import clear_answers, retention
from helpers.environment import SUBJECT_PACKAGES, device
from helpers.errors import InputError
from helpers.files import resolve, write_json, write_text
from helpers.model import sam3
from helpers.model.audit import adapter_report
from helpers.model.cache import BackboneCache, text_states
from helpers.model.lora import (
    add_lora,
    enabled_components,
    load_adapter_weights,
    read_adapter_weights,
    save_adapter,
)
from helpers.model.prompted import checkpoint_activations
from helpers.train import run as run_folder
from helpers.train.guards import Guards
from helpers.train.share import model_card
from helpers.train.trainer import CHECKPOINTS, Sam3Trainer, training_arguments

_WRITE_FAILED = ("inline_container", "PytorchStreamWriter", "file write failed")


class OutOfMemory(InputError):
    """The memory of the GPU or the machine does not hold a training step."""


class _FirstStep(TrainerCallback):
    """Tells the data the epoch, and keeps the report of the first step, which has all gradients."""

    def __init__(self, dataset):
        self.dataset, self.report = dataset, None

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.report is None:
            self.report = adapter_report(model)


class _Progress(ProgressCallback):
    """The library's progress bar on stderr with the loss; stdout stays free."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_description(f"train, loss {logs['loss']:.3f}")


class _Clock(TrainerCallback):
    """Measures the last step, until the device has done its work."""

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start


class TrainingData(NamedTuple):
    """What the loop reads, with `count_objects` of both datasets and `data_fingerprint`."""

    train: PromptDataset
    valid: PromptDataset
    collator: PromptCollator
    counts: dict
    fingerprint: str


def training_data(config, model, processor, *, train_split=None, val_split=None, allow_empty=False):
    """Read and check the data of a run, and make sure that objects arrive, unless `allow_empty`."""
    data, dataset, pictures = config.data, None, {}
    if train_split is None or val_split is None:
        dataset = load_dataset(config)
        pictures = dataset.pictures  # what the check sees of the images is not looked at again
        if not allow_empty:
            check_dataset(dataset, model, processor).raise_for_errors()
    splits = [
        dataset.split(name) if split is None else rename_categories(split, data.prompts_by_category)
        for split, name in ((train_split, data.train_split), (val_split, data.val_split))
    ]
    cache = _filled_cache(config, model, processor, splits, pictures)
    train = PromptDataset.from_config(config, splits[0], model, processor, backbone_cache=cache)
    asked = {"prompt": data.prompt, "absent_prompts": config.evaluation.absent_prompts}
    valid = PromptDataset.for_evaluation(splits[1], model, processor, **asked, backbone_cache=cache)
    counts = {"train": count_objects(train), "valid": count_objects(valid)}
    if data.replay_words:  # after the counts: a run whose own objects are missing must not pass
        model.to(PartialState().device)
        for word, noun in product(data.replay_words, train.own_names):
            if nouns_overlap(word, noun):
                message = f"{word!r} means what is annotated as {noun!r}; the base would deny it"
                raise InputError(message, where="data.replay_words", fix="list other things")
        answers = clear_answers(model, processor, train.records, data.replay_words)
        if not any(detected for detected, _ in answers.values()):
            words = ", ".join(data.replay_words)
            message = f"the base detects none of {words} on {len(answers)} images to replay"
            fix = "list what the images show and the base knows, see 'python -m helpers knows'"
            raise InputError(message, where="data.replay_words", fix=fix)
        train.set_replay(answers)
    for _ in counts:  # the draw of a loader that starts: seeds give the runs that they always gave
        torch.empty((), dtype=torch.int64).random_()
    if not counts["train"]["num_objects"].any() and not allow_empty:
        message = f"no object of {len(splits[0].records)} images reaches the loss (cause "
        message += "no_objects in data/causes.csv); training would teach to detect nothing"
        fix = "run 'python -m helpers check' on the dataset, or pass allow_empty=True on purpose"
        raise InputError(message, where=splits[0].root, fix=fix)
    states = None
    if config.training.feature_cache is not None and not config.lora.apply_to_text_encoder:
        states = text_states(model, processor, (*train.nouns, *valid.nouns))
    collator = PromptCollator(processor, states)
    return TrainingData(train, valid, collator, counts, data_fingerprint(splits[0], pictures))


def _filled_cache(config, model, processor, splits, pictures):
    """Return a cache with the features of all images; None if the run wants or can have none."""
    folder, lora = config.training.feature_cache, config.lora
    if folder is None:
        return None
    if lora.apply_to_vision_encoder and lora.apply_to_text_encoder:
        message = "both encoders are trained, so neither has features that stay the same"
        fix = "set it to null, or freeze an encoder: lora.apply_to_vision_encoder=false"
        raise InputError(message, where="training.feature_cache", fix=fix)
    model.to(PartialState().device)
    if lora.apply_to_vision_encoder:
        return None
    cache = BackboneCache(folder, model, processor, pictures)
    records = [record for split in splits for record in split.records]
    missing = len(cache.missing(records))
    if missing and PartialState().is_main_process:
        size = f"{missing * cache.bytes_per_image / 1e6:,.0f} MB"
        print(f"feature cache: {missing} images, {size} in {cache.folder}", file=sys.stderr)
    loading = {"batch_size": config.training.batch_size, "num_workers": config.training.num_workers}
    cache.fill(records, **loading, progress=sys.stderr.isatty())
    return cache


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

    What stops it on the way, as a `GuardStop` or an `OutOfMemory`, is in ``stopped.json``.

    Parameters
    ----------
    config : helpers.config.Config
    output_dir : os.PathLike, optional
        Run folder; by default ``output.output_dir`` of the config.
    resume, overwrite : bool
        Continue an interrupted run from its last complete checkpoint, with the losses of an
        uninterrupted one (a finished run is returned as it is); or replace a run in the folder.
    train_split, val_split : helpers.data.records.Split, optional
        Data in memory; by default both are read from ``data.data_dir``, checked first.
    callbacks : sequence of transformers.TrainerCallback
    allow_empty : bool
        Train, without the guards `OFF_IF_EMPTY`, although no object reaches the loss.
    progress : bool, optional
        Progress bar on stderr; by default if stderr is a terminal.

    Returns
    -------
    helpers.train.run.RunResult
        With the checkpoint of the best ``evaluation.metric_for_best``, or the last if that never
        rose above 0. Its config leaves the mask decoder out if no training object has a mask.
    """
    folder = resolve(output_dir or config.output.output_dir)
    state = run_folder.state_of(folder, config, resume=resume, overwrite=overwrite)
    if state == "finished":
        return run_folder.load_run(folder)
    if state == "interrupted":
        own = run_folder.read_config(folder).model.model_dump()
    else:  # which commit a base on the hub is, so that it loads again, and how it is asked
        own = {"revision": config.model.revision or sam3.newest_revision(config.model.name)}
        base = sam3.base_config(config.model.name, own["revision"])
        own["native_prompt"] = sam3.has_native_prompt(base, config.model.name)
    unknown = [key for key in ("revision", "native_prompt") if getattr(config.model, key) is None]
    config = config.replace({f"model.{key}": own[key] for key in unknown})
    config, model, data = _prepare(config, train_split, val_split, allow_empty)
    arguments = training_arguments(config, folder)  # decides about the device, too
    processes = PartialState()
    processes.wait_for_everyone()  # all have looked at the folder before one writes to it
    if state == "interrupted":
        _refuse_other_data(folder, config, data)
    elif processes.is_main_process:
        _write_start(folder, config, data)
    if processes.is_main_process:
        run_folder.remove(folder, (".partial-*", run_folder.STOPPED_FILE))
    first_step = _FirstStep(data.train)
    own = [first_step]
    if sys.stderr.isatty() if progress is None else progress:
        own.append(_Progress())
    trainer = _trainer(config, model, data, arguments, [*own, *callbacks], allow_empty)
    checkpoint = run_folder.last_checkpoint(folder) if state == "interrupted" else None
    try:
        with _readable_errors(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.write_curves()
            processes.wait_for_everyone()  # the last checkpoint is written
            return _finish(trainer, folder, data, first_step.report)
    except InputError as error:
        if processes.is_main_process:
            with suppress(OSError):  # on a full disk the error itself is what counts
                trainer.write_curves()
                names = ("cause", "message", "where", "fix")
                reason = {name: getattr(error, name, None) for name in names}
                reason["step"] = trainer.state.global_step
                write_json(folder / run_folder.STOPPED_FILE, reason)
        raise


def _prepare(config, train_split, val_split, allow_empty):
    """Load base and data, make sure that objects arrive, and put LoRA on: config, model, data."""
    set_seed(config.training.seed)
    base, dtype = config.model, sam3.base_dtype(config.training.mixed_precision)
    own = {"resolution": base.resolution, "native_prompt": base.native_prompt}
    model, processor = sam3.load_base(base.name, base.revision, dtype, **own)
    splits = {"train_split": train_split, "val_split": val_split}
    data = training_data(config, model, processor, **splits, allow_empty=allow_empty)
    counts = data.counts["train"]
    has_no_mask = counts["num_objects"].any() and not counts["num_masks"].any()
    if config.lora.apply_to_mask_decoder and has_no_mask:  # it would have no gradient
        text = "no object of the training split has a mask, which the mask decoder would need"
        if enabled_components(config.lora) == ["mask_decoder"]:
            raise InputError(text, where="lora", fix="adapt another component, or add masks")
        print(f"note: {text}; it is left out", file=sys.stderr)
        config = config.replace({"lora.apply_to_mask_decoder": False})
    peft_model = add_lora(model, config.lora)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    return config, peft_model, data


def _trainer(config, model, data, arguments, callbacks, allow_empty):
    return Sam3Trainer(
        config,
        guards=Guards(config, data.counts["train"], allow_empty=allow_empty),
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.valid,
        data_collator=data.collator,
        callbacks=callbacks,
    )


def _write_start(folder, config, data):
    """Write what is known before training, in place of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.remove(folder, (*run_folder.RUN_FILES, CHECKPOINTS))
    versions = {
        "packages": {name: version(name) for name in SUBJECT_PACKAGES},
        "machine": device(),
        "num_processes": run_folder.num_processes(),
        "data_fingerprint": data.fingerprint,
    }
    write_json(folder / run_folder.VERSIONS_FILE, versions)
    write_json(folder / run_folder.PROMPTS_FILE, run_folder.trained_prompts(data.train))
    write_text(folder / run_folder.RUN_CONFIG, config.to_yaml())


def _refuse_other_data(folder, config, data):
    """Raise InputError if an interrupted run was trained on other images or other components."""
    before = run_folder.read_run_file(folder / run_folder.VERSIONS_FILE).get("data_fingerprint")
    lora = load_config(folder / run_folder.RUN_CONFIG).lora
    if before not in (None, data.fingerprint) or lora != config.lora:
        message = "the run to resume had other training data, or adapted other components"
        fix = "resume with the dataset it was started with, or start a new run"
        raise InputError(message, where=folder, fix=fix)


@contextmanager
def _readable_errors(trainer):
    """Translate what a full memory, a full disk or a read-only folder raises."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        where, step = trainer.args.output_dir, trainer.state.global_step
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_memory or "allocate memory" in str(error):
            message = f"out of memory at step {step}: {reason}"
            fix = "set training.gradient_checkpointing=true, or lower training.batch_size, "
            fix += "data.num_negatives or model.resolution; 'python -m helpers train --dry-run' tests it"
            raise OutOfMemory(message, where=where, fix=fix) from error
        is_file = isinstance(error, OSError | SafetensorError)
        if is_file or any(part in reason for part in _WRITE_FAILED):
            message = f"a file could not be written or read at step {step} ({reason})"
            fix = "make room or correct the permissions, then continue with --resume"
            where = getattr(error, "filename", None) or where
            raise InputError(message, where=where, fix=fix) from error
        raise


def _finish(trainer, folder, data, first_report):
    """Load the chosen checkpoint, gather the numbers of the run, and write all that is left."""
    state, config, model = trainer.state, trainer.config, trainer.model
    best = folder / CHECKPOINTS / f"checkpoint-{state.best_global_step}"
    best_step = state.best_global_step if state.best_global_step and best.is_dir() else None
    report = adapter_report(model)  # of the last state: did every module move?
    report["grad_norm"] = report["grad_norm"] if first_report is None else first_report["grad_norm"]
    if best_step is not None:
        load_adapter_weights(model, read_adapter_weights(best), best)
    metrics = run_folder.run_metrics(state, config, best_step) | {
        "objects": {name: int(counts["num_objects"].sum()) for name, counts in data.counts.items()},
        "data_fingerprint": data.fingerprint,
        "trained_parameters": run_folder.trained_parameters(trainer.optimizer, model),
        "notes": run_folder.run_notes(state, config, best_step, report),
    }
    if config.data.replay_words:
        processor, valid = data.collator.processor, data.valid.split
        metrics["retention"] = retention(model, processor, valid, config.data.replay_words)
    prompts = run_folder.trained_prompts(data.train)
    files = (folder, config, prompts, metrics, state.log_history, report)
    result = run_folder.RunResult(*files, model.eval(), data.collator.processor)
    if PartialState().is_main_process:
        base = config.model
        own_resolution = sam3.base_config(base.name, base.revision).image_size
        save_adapter(model, folder, base.name, base.revision)
        write_text(folder / run_folder.AUDIT_FILE, report.to_csv())
        write_text(folder / run_folder.CARD_FILE, model_card(result, own_resolution))
        write_json(folder / run_folder.METRICS_FILE, metrics)  # last: it marks the run as finished
    return result


def train_within_memory(config, *, on_retry=None, **options):
    """Train, with a `smaller_step` again and again while memory runs out; see `train`."""
    while True:
        try:
            return train(config, **options)
        except OutOfMemory as error:
            changes = smaller_step(config)
            folder = resolve(options.get("output_dir") or config.output.output_dir)
            has_checkpoint = run_folder.last_checkpoint(folder) is not None  # would be lost
            if changes is None or has_checkpoint or run_folder.num_processes() > 1:
                raise  # other processes would wait for ever
            message = error.message
        clear_device_cache(garbage_collection=True)  # the frames of the failed attempt are gone now
        if on_retry is not None:
            on_retry(f"{message}; trying again with {' '.join(_set_arguments(changes))}")
        config = config.replace(changes)
        options |= {"resume": False, "overwrite": True}


def dry_run(config):
    """Take a training step on the fullest batch of a dataset, on the device at hand.

    Parameters
    ----------
    config : helpers.config.Config

    Returns
    -------
    dict
        ``fits``; ``device``; ``images``, ``prompts`` and ``objects`` of the batch;
        ``peak_memory_bytes`` of ``peak_memory_of``; ``seconds_per_step``, with its accumulation;
        ``steps_per_epoch``; ``seconds_per_epoch``, if all batches were as full, without validation;
        ``next``, the settings to try, as arguments of ``--set``. What was not measured is None.
    """
    training, on_gpu = config.training, torch.cuda.is_available()
    dataset = load_dataset(config)
    splits = [dataset.split(name) for name in (config.data.train_split, config.data.val_split)]
    counts = count_objects(PromptDataset.from_config(config, splits[0]))
    sizes = counts.groupby("image_id")["num_objects"].agg(["size", "sum"])
    fullest = sizes.sort_values(["size", "sum"], ascending=False).head(training.batch_size)
    records = {record.image_id: record for record in splits[0].records}
    batch = replace(splits[0], records=tuple(records[name] for name in fullest.index))
    images_per_step = training.batch_size * training.gradient_accumulation_steps
    steps = math.ceil(len(records) / (images_per_step * run_folder.num_processes()))
    result = dict.fromkeys(("peak_memory_bytes", "seconds_per_step", "seconds_per_epoch")) | {
        "fits": False,
        "device": device()["name" if on_gpu else "device"],
        "images": len(fullest),
        "prompts": int(fullest["size"].sum()),
        "objects": int(fullest["sum"].sum()),
        "peak_memory_of": "the GPU" if on_gpu else "this process, resident",
        "steps_per_epoch": steps,
        "next": [],
    }
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        cache = training.feature_cache and str(Path(folder) / "features")
        one_batch = {"training.gradient_accumulation_steps": 1, "training.feature_cache": cache}
        one_batch["data.prompts_by_category"] = {}  # the splits have their nouns already
        valid = replace(splits[1], records=batch.records[:1])
        try:
            parts = _prepare(config.replace(one_batch), batch, valid, allow_empty=True)
            # The second step is measured: the first also allocates the optimiser's state.
            no_files = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 2}
            arguments = training_arguments(parts[0], Path(folder), **no_files)
            trainer = _trainer(*parts, arguments, [clock], allow_empty=True)
            with _readable_errors(trainer):
                trainer.train()
        except OutOfMemory:
            return result | {"next": _set_arguments(_next_setting(config))}
    seconds = clock.seconds * training.gradient_accumulation_steps
    return result | {
        "fits": True,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else _peak_memory(),
        "seconds_per_step": seconds,
        "seconds_per_epoch": seconds * steps,
    }


def _peak_memory():
    """Return the peak of this process in bytes, or None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def dry_run_text(result):
    """Write the result of `dry_run` for people."""
    lines = ["fullest batch: {images} images, {prompts} prompts, {objects} objects, on {device}"]
    if result["fits"]:
        if result["peak_memory_bytes"] is not None:
            peak = result["peak_memory_bytes"] / 2**30
            lines.append(f"peak memory of {{peak_memory_of}}: {peak:.2f} GiB")
        lines.append("{seconds_per_step:.3g} s per step; {steps_per_epoch} steps, at most")
        lines[-1] += " {seconds_per_epoch:.3g} s, per epoch, without validation"
    else:
        options = " ".join(f"--set {setting}" for setting in result["next"])
        lines.append(f"out of memory; next to try: {options or 'nothing smaller is left'}")
    return "\n".join(lines).format(**result)


def smaller_step(config):
    """Return the next settings that need less memory and see the same images per step, or None."""
    training = config.training
    if not training.gradient_checkpointing:
        return {"training.gradient_checkpointing": True}
    images = training.batch_size * training.gradient_accumulation_steps
    for size in range(training.batch_size - 1, 0, -1):
        if images % size == 0:
            accumulation = "training.gradient_accumulation_steps"
            return {"training.batch_size": size, accumulation: images // size}
    return None


def _next_setting(config):
    """Return a `smaller_step`, or else fewer absent prompts, or else a lower resolution, if any."""
    if changes := smaller_step(config):
        return changes
    if config.data.num_negatives > 1:
        return {"data.num_negatives": config.data.num_negatives // 2}
    backbone = sam3.base_config(config.model.name, config.model.revision)
    backbone = backbone.vision_config.backbone_config
    window = backbone.patch_size * backbone.window_size  # a rest of a window would be padded
    lower = (config.model.resolution - 1) // window * window
    return {"model.resolution": lower} if 2 * lower >= config.model.resolution else {}


def _set_arguments(changes):
    """Write settings as texts such as "training.batch_size=1" for ``--set``."""
    return [f"{name}={str(value).lower()}" for name, value in changes.items()]
