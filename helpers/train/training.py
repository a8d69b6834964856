"""From a config to a finished run folder; a single step first, and smaller ones if memory ends."""

import math
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from helpers.checks.boxes_and_masks import check_annotations
from helpers.checks.dataset import NUM_QUERIES, check_dataset
from helpers.checks.findings import Report
from helpers.config import load_config
from helpers.data import PromptCollator, PromptDataset, count_objects, load_dataset
from helpers.data.dataset import data_fingerprint, model_sizes
from helpers.data.records import nouns_overlap, rename_categories
from helpers.detect import clear_answers, evaluate_queries, retention
from helpers.detect.queries import SCORE_FLOOR, queries_from_outputs
from helpers.environment import SUBJECT_PACKAGES, device
from helpers.errors import InputError, explain
from helpers.files import resolve, write_json, write_text
from helpers.model import adapter_report, lora, prompted, sam3
from helpers.model.cache import BackboneCache, text_states
from helpers.model.losses import loss_divisors, sam3_losses, target_counts
from helpers.train import run as run_folder
from helpers.train.guards import Guards
from helpers.train.share import model_card

SELECTION = "selection"  # the trainer's name of the metric that chooses the checkpoint
# Settings that the library calls as the config does, and takes as they are.
SAME_NAMES = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"}
SAME_NAMES |= {"gradient_accumulation_steps", "seed", "logging_steps"}
_AT_CLAMP = 0.999
_WRITE_FAILED = ("inline_container", "PytorchStreamWriter", "file write failed")


class OutOfMemory(InputError):
    """The memory of the GPU or the machine does not hold a training step."""


def training_arguments(config, folder, **changes):
    """Translate a config, with its multipliers and `changes`, for a run in a folder."""
    training = config.training
    message = f"'{training.mixed_precision}' cannot be used here"
    fix = "set training.mixed_precision=no"
    with explain(ValueError, message, where="training.mixed_precision", fix=fix):
        if training.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("it needs a GPU")
        settings = training.model_dump(include=SAME_NAMES) | {
            "output_dir": str(folder / run_folder.CHECKPOINTS),
            "per_device_train_batch_size": training.batch_size,
            "num_train_epochs": config.effective_num_epochs,
            "learning_rate": config.effective_learning_rate,
            "warmup_steps": config.effective_warmup_steps,
            "lr_scheduler_type": training.lr_scheduler,
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": training.mixed_precision == "bf16",
            "fp16": training.mixed_precision == "fp16",
            "dataloader_num_workers": training.num_workers,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "data_seed": training.seed,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": training.save_total_limit + 1,
            "metric_for_best_model": SELECTION,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(**settings | changes)
    # Several would mean torch's DataParallel, which cannot split targets.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class Sam3Trainer(Trainer):
    """A `transformers.Trainer` for prompted images, with all terms of the loss in its log."""

    def __init__(self, config, *, guards=None, **options):
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self.config, self.guards = config, guards
        if guards is not None:
            self.add_callback(guards)
        self._sums, self._num_batches = defaultdict(float), 0
        self._divisors = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collect the batches of an optimiser step, and count what all of them hold together."""
        # Means over each batch would weigh an object or a prompt by how many others are in it.
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        targets = [target for batch in samples for target in batch["targets"]]
        counts = torch.tensor(target_counts(targets), device=self.args.device)
        counts = self.accelerator.reduce(counts, "sum")
        num_parts = len(samples) * self.accelerator.num_processes
        self._divisors = loss_divisors(counts.tolist(), max(num_parts, 1))
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the weighted loss of one batch and remember its terms for the log."""
        mask_rows = prompted.rows_with_objects(inputs["targets"])
        outputs = model(**prompted.model_inputs(inputs, self.args.device), mask_rows=mask_rows)
        if self.guards is None or self.guards.are_finite(outputs, inputs["targets"]):
            terms = self._terms(outputs, inputs["targets"], self._divisors)
        else:  # cannot be matched; the guard stops all processes before the step
            terms = {"total": outputs["pred_logits"].sum() * math.nan}
        total = terms.pop("total")
        statistics = output_statistics(outputs)
        if self.guards is not None:
            self.guards.observe(inputs, total, terms, statistics["train_share_at_clamp"])
        for name, value in (terms | statistics).items():
            self._sums[name] += value.detach()
        self._num_batches += 1
        return (total, outputs) if return_outputs else total

    def _terms(self, outputs, targets, divisors):
        variant = self.config.loss.variant
        return sam3_losses(prompted.loss_inputs(outputs), targets, variant, divisors=divisors)

    def log(self, logs, start_time=None):
        """Add to a training loss the means of its terms since the last log, over all devices."""
        if "loss" in logs and self._num_batches:
            values = self._sums.values()
            sums = torch.stack([torch.as_tensor(v, device=self.args.device) for v in values])
            means = self.accelerator.reduce(sums / self._num_batches, "mean").tolist()
            logs |= dict(zip(self._sums, means, strict=True))
            self._sums, self._num_batches = defaultdict(float), 0
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Judge the state on the validation split, all of it in every process; return the log."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # leaves the global generator, and so a resumed run, alone
        )
        settings = self.config.evaluation
        model = self.model.eval()
        queries, loss_sum = [], 0.0
        for batch in loader:
            targets, asked = batch["targets"], batch["queries"]
            divisors = loss_divisors(target_counts(targets))
            device, autocast = self.args.device, self.accelerator.autocast
            wanted = {"mask_rows": prompted.rows_with_objects(targets), "mask_floor": SCORE_FLOOR}
            for rows, outputs in prompted.outputs_by_rows(model, batch, device, autocast, **wanted):
                loss = self._terms(outputs, targets[rows], divisors)["total"]
                loss_sum += loss.item() * (int(batch["image_index"][-1]) + 1)
                about = asked[rows], dataset, settings.mask_threshold
                queries += queries_from_outputs(outputs, *about)
        metrics = evaluate_queries(queries, settings.score_threshold)
        numbers = ({"loss": loss_sum / len(dataset)} | metrics).items()
        numbers = [(name, value) for name, value in numbers if isinstance(value, int | float)]
        logs = {f"{metric_key_prefix}_{name}": float(value) for name, value in numbers}
        self.log(logs)
        self.write_curves()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        # 0 is what a detector that finds nothing gets, while the loss would prefer it where no
        # objects were read. Without a value nothing is chosen, and the last state is kept.
        chosen_by = metrics[settings.metric_for_best]
        return logs | {f"{metric_key_prefix}_{SELECTION}": chosen_by or math.nan}

    def write_curves(self):
        """Replace ``curves.csv`` by the log so far; its columns have one order, resumed or not."""
        if self.state.is_world_process_zero and self.state.log_history:
            table = pd.DataFrame(self.state.log_history)
            first = [name for name in ("step", "epoch", "loss", "eval_loss") if name in table]
            names = [*first, *sorted(set(table) - set(first))]
            path = Path(self.args.output_dir).parent / run_folder.CURVES_FILE
            write_text(path, table[names].to_csv(index=False))

    def floating_point_ops(self, inputs):
        """Return 0: the library counts all parameters anew for every batch, and nobody reads it."""
        return 0

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            folder, base = output_dir or self.args.output_dir, self.config.model
            lora.save_adapter(self.model, folder, base.name, base.revision)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = lora.read_adapter_weights(resume_from_checkpoint)
        lora.load_adapter_weights(model or self.model, weights, resume_from_checkpoint)


@torch.no_grad()
def output_statistics(outputs):
    """Return scalar tensors over all queries of a batch that describe a step beside its loss."""
    logits, presence = outputs["pred_logits"].float(), outputs["presence_logits"].float()
    clamped_logits = logits.abs() >= _AT_CLAMP * prompted.SCORE_LOGIT_CLAMP
    clamped_presence = presence.abs() >= _AT_CLAMP * prompted.PRESENCE_LOGIT_CLAMP
    clamped = torch.cat([clamped_logits.flatten(), clamped_presence.flatten()])
    return {
        "train_query_logit_mean": logits.mean(),
        "train_query_logit_max": logits.max(),
        # what a loss without objects pushes down
        "train_softplus_mean": torch.nn.functional.softplus(logits).mean(),
        "train_presence_prob": presence.sigmoid().mean(),
        # where the gradient is zero: with most logits there a state cannot be trained on
        "train_share_at_clamp": clamped.float().mean(),
    }


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
    folder = config.training.feature_cache
    if folder is None:
        return None
    if config.lora.apply_to_vision_encoder and config.lora.apply_to_text_encoder:
        message = "both encoders are trained, so neither has features that stay the same"
        fix = "set it to null, or freeze an encoder: lora.apply_to_vision_encoder=false"
        raise InputError(message, where="training.feature_cache", fix=fix)
    model.to(PartialState().device)
    if config.lora.apply_to_vision_encoder:
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
    base, dtype = config.model.model_dump(), sam3.base_dtype(config.training.mixed_precision)
    model, processor = sam3.load_base(base.pop("name"), dtype=dtype, **base)
    splits = {"train_split": train_split, "val_split": val_split}
    data = training_data(config, model, processor, **splits, allow_empty=allow_empty)
    counts = data.counts["train"]
    has_no_mask = counts["num_objects"].any() and not counts["num_masks"].any()
    if config.lora.apply_to_mask_decoder and has_no_mask:  # it would have no gradient
        text = "no training object has a mask: the mask decoder has nothing to learn from"
        if lora.enabled_components(config.lora) == ["mask_decoder"]:
            raise InputError(text, where="lora", fix="adapt another component, or add masks")
        print(f"note: {text}; it is left out", file=sys.stderr)
        config = config.replace({"lora.apply_to_mask_decoder": False})
    peft_model = lora.add_lora(model, config.lora)
    if config.training.gradient_checkpointing:
        prompted.checkpoint_activations(model)
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
    run_folder.remove(folder, (*run_folder.RUN_FILES, run_folder.CHECKPOINTS))
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
    adapted = load_config(folder / run_folder.RUN_CONFIG).lora
    if before not in (None, data.fingerprint) or adapted != config.lora:
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
    best = folder / run_folder.CHECKPOINTS / f"checkpoint-{state.best_global_step}"
    best_step = state.best_global_step if state.best_global_step and best.is_dir() else None
    report = adapter_report(model)  # of the last state: did every module move?
    report["grad_norm"] = report["grad_norm"] if first_report is None else first_report["grad_norm"]
    if best_step is not None:
        lora.load_adapter_weights(model, lora.read_adapter_weights(best), best)
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
        lora.save_adapter(model, folder, base.name, base.revision)
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
    sizes = {"mask_size": model_sizes(config)[1], "num_queries": NUM_QUERIES}
    for split in splits:  # without the images, which take long
        Report(dataset.root, check_annotations(split, **sizes), {}).raise_for_errors()
        missing = [record.path for record in split.records if not record.path.is_file()]
        if missing:
            fix = "restore it or remove its entry"
            raise InputError("no such image", where=missing[0], fix=fix)
    counts = count_objects(PromptDataset.from_config(config, splits[0]))
    if not counts["num_objects"].any():
        fix = "run 'python -m helpers check' on the dataset"
        raise InputError("no object reaches the loss", where=splits[0].root, fix=fix)
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
