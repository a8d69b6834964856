"""Gates on what a run wrote down: its files, its settings, where LoRA sits, what learned."""

import math
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import get_scheduler

from helpers.causes import CAUSES
from helpers.config import load_config, read_yaml
from helpers.diagnose.examination import SLIP, Evidence, evidence_if, gate
from helpers.diagnose.patient import Inapplicable, Missing, module_of
from helpers.errors import InputError
from helpers.files import read_json
from helpers.model.lora import (
    BASE_FILE,
    COMPONENTS,
    CONFIG_FILE,
    SPELLINGS,
    WEIGHTS_FILE,
    component_of,
    read_adapter_weights,
)
from helpers.model.losses import WEIGHTS
from helpers.show.charts import schedule_frame
from helpers.train import run as run_folder
from helpers.train.trainer import CURVES_FILE

# Written before the first step, and after the last one; metrics.json follows.
EARLY_FILES = (run_folder.RUN_CONFIG, run_folder.PROMPTS_FILE, run_folder.VERSIONS_FILE)
LATE_FILES = (WEIGHTS_FILE, CONFIG_FILE, BASE_FILE, run_folder.AUDIT_FILE, run_folder.CARD_FILE)
MAX_DROPOUT = 0.2
FEW_IMAGES, MAX_EPOCHS = 100, 50
RATE_TOLERANCE = 1e-3  # relative to the peak; healthy: below 1e-9
IDLE_COMPONENT = "geometry_encoder"  # a text prompt never passes through it
LOSS_TOLERANCE = 0.02  # relative, logged loss against the sum of its terms; measured: 4e-8
DOMINANT = 0.95  # share of one term, in half of the steps with objects; measured: at most 0.38
WORD_PARTS = {"text_encoder", "detr_encoder"}  # where a word can be learned
FINDINGS = {
    "lora_elsewhere": ("lora_elsewhere", 1.0),
    "weights_not_loaded": ("weights_not_loaded", 0.5),
    "wrapped_keys": ("weights_not_loaded", 0.7),
}
"""Finding of `helpers.foreign.import_source` to cause and confidence; others name no cause."""
EMPTY_LOSS, SURELY_EMPTY = 2e-2, 5e-3
"""Last loss below which no object was in it: a batch with objects costs 7 or more in SAM3's loss, one
without never less than 4.5e-4 for each of 6 decoder layers, and in the loss of the failing script 3e-5."""
PIXEL_TERM, PIXEL_LOSS = 50.0, 1000.0
"""An L1 loss of four fractions is at most 4, and 20 where it is weighted; of pixels hundreds. A whole
training loss is up to 250 in healthy runs of Meta's trainer, which adds up 18 layers."""
LEAST_COURSE = 6  # values of a log from which its course is judged
FLAT, RISE = 1e-4, 1.3  # of the loss
FILE_GATES, CONFIG_GATES, RUN_GATES, LOG_GATES = [], [], [], []


@gate(FILE_GATES, "files of the run", "all there, complete, without NaN")
def _run_files(examination):
    folder, is_finished = examination.folder, examination.is_finished
    late = (CURVES_FILE, *LATE_FILES, run_folder.METRICS_FILE) if is_finished else ()
    names = (*EARLY_FILES, *late)
    problems = {}
    for name in names:
        try:
            _read_run_file(folder / name)
        except InputError as error:
            problems[name] = error.message
    saved = [name for name in LATE_FILES if (folder / name).is_file()]
    if saved and not is_finished:
        problem = f"is missing, although it is written after {saved[0]}"
        problems[run_folder.METRICS_FILE] = (
            f"{problem}: lost, or the run was interrupted while it saved"
        )
    if is_finished and not problems:
        try:
            _ = examination.files
        except InputError as error:
            problems[Path(error.where).name] = error.message
    evidence = [
        # Nothing that the model does depends on the card.
        Evidence("damaged_run", 0.7 if name == run_folder.CARD_FILE else 1.0, f"{name} {problem}")
        for name, problem in problems.items()
    ]
    if WEIGHTS_FILE in saved and WEIGHTS_FILE not in problems:
        weights = read_adapter_weights(folder)
        broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
        text = f"NaN or infinite numbers in {len(broken)} of {len(weights)} tensors"
        text = f"{WEIGHTS_FILE} holds {text}, for example {broken[:1]}"
        evidence += evidence_if(broken, "not_finite", 1.0, text)
    return "; ".join([f"{len(names)} files read", *(one.text for one in evidence)]), evidence


def _read_run_file(path):
    """Refuse a file of a run that is missing, cut off, or lacks what a training writes."""
    if not path.is_file():
        raise InputError("is missing")
    if path.name == WEIGHTS_FILE:
        tensors = read_adapter_weights(path.parent)
        if not tensors or not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise InputError("holds other tensors than a training writes, or none")
    elif path.name != CONFIG_FILE and not path.read_bytes().endswith(b"\n"):
        raise InputError("is empty or ends in the middle of a line, so its end is missing")
    elif path.name in run_folder.READABLE_FILES:
        run_folder.read_run_file(path)
    elif path.name == run_folder.RUN_CONFIG:
        missing = load_config(path).model_dump().keys() - read_yaml(path).keys()
        if missing:
            raise InputError(f"lacks {', '.join(sorted(missing))}")


@gate(
    CONFIG_GATES,
    "regularisation",
    f"dropout up to {MAX_DROPOUT:g}; fewer than {FEW_IMAGES} images at most {MAX_EPOCHS} times",
)
def regularisation(examination):
    """Compare dropout, images and epochs with what a small dataset bears."""
    questions = {
        "dropout": lambda: examination.config.lora.dropout,
        "images": lambda: len(examination.split("train").records),
        "epochs": lambda: examination.config.effective_num_epochs,
    }
    known, absent = {}, {}
    for name, question in questions.items():
        try:
            known[name] = question()
        except Missing as error:
            absent[name] = error
    if "dropout" not in known and len(known) < 2:
        raise absent["dropout"]
    dropout, images, epochs = (known.get(name) for name in questions)
    reason = f"lora.dropout is {dropout}: so much of the input of LoRA is left out"
    evidence = evidence_if((dropout or 0) > MAX_DROPOUT, "extreme_regularisation", 0.9, reason)
    is_long = None not in (images, epochs) and images < FEW_IMAGES and epochs > MAX_EPOCHS
    reason = f"{images} images were seen {epochs} times each"
    evidence += evidence_if(is_long, "extreme_regularisation", 0.8, reason)
    texts = [f"{name} {known.get(name, 'not stated')}" for name in questions]
    return ", ".join(texts), evidence


@gate(CONFIG_GATES, "settings in the log", "steps and learning rates are those of the config")
def settings_in_log(examination):
    """Compare the logged steps and learning rates with what config and data come to."""
    if not examination.is_own_data:
        raise Inapplicable("asked about another dataset than was trained on", where="data_dir")
    config, history = examination.config, examination.history
    logged = {one["step"]: one["learning_rate"] for one in history if "learning_rate" in one}
    if not logged:
        raise InputError("no learning rate was logged", where=examination.folder)
    versions = read_json(
        examination.folder / run_folder.VERSIONS_FILE, fix="train again with --overwrite"
    )
    images, processes = len(examination.train_dataset), versions.get("num_processes", 1)
    steps = int(schedule_frame({"run": config}, images, processes).loc["run", "steps"])
    peak, warmup = config.effective_learning_rate, config.effective_warmup_steps
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = get_scheduler(config.training.lr_scheduler, optimizer, warmup, steps)
    expected = [peak * scheduler.lr_lambdas[0](step) for step in range(steps)]
    off = [
        step
        for step, rate in logged.items()
        if step > steps or abs(rate - expected[step - 1]) > RATE_TOLERANCE * peak
    ]
    last = max(entry["step"] for entry in history)
    text = (
        f"{last} steps logged, {steps} expected with {processes} processes; highest learning rate "
        f"logged {max(logged.values()):g}, expected {max(expected):g}; {len(off)} of {len(logged)} "
        "logged learning rates are not those of the config"
    )
    is_fault = bool(off) or (examination.is_finished and last != steps)
    return text, evidence_if(is_fault, "dead_config_keys", 0.95, text)


@gate(RUN_GATES, "the run", "finished")
def _is_finished(examination):
    folder = examination.folder
    if examination.is_finished:
        metrics = examination.files.metrics
        return f"finished: {metrics['steps']} steps, {metrics['epochs']:g} epochs", []
    if (folder / run_folder.STOPPED_FILE).is_file():
        record = read_json(folder / run_folder.STOPPED_FILE, fix="train again with --overwrite")
        text = f"the training was stopped: {record['message']}"
        if record["cause"] not in CAUSES:  # such as a full memory
            raise InputError(text, where=record["where"], fix=record["fix"])
        return text, [Evidence(record["cause"], 1.0, text)]
    reach = "it has no checkpoint, so it ended before or in the first validation"
    if checkpoint := run_folder.last_checkpoint(folder):
        reach = f"its last complete checkpoint is {checkpoint.name}"
    raise InputError(
        f"the run was interrupted, its last files are not there; {reach}",
        where=folder,
        fix="read the error it ended with, then continue with 'python -m helpers train ... "
        "--resume'; the gates below examine what can be examined without it",
    )


@gate(FILE_GATES, "weights as they are", "finite, and where a word can be learned")
def weights_as_they_are(examination):
    """Say what the file of weights shows by itself, and what its import found."""
    findings = examination.findings
    try:
        weights = examination.raw_weights
    except InputError as error:
        if not str(error.where).endswith(WEIGHTS_FILE):
            raise
        return str(error), [Evidence("damaged_run", 1.0, str(error))]
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    text = f"{len(weights)} tensors, NaN or infinite numbers in {len(broken)} of them"
    evidence = evidence_if(broken, "not_finite", 1.0, f"{text}, for example {broken[:1]}")
    for finding in findings:
        cause, confidence = FINDINGS.get(finding.code, (finding.code, SLIP))
        if cause in CAUSES:
            evidence.append(Evidence(cause, confidence, finding.message))
    matrices = {module_of(key): tensor for key, tensor in weights.items() if ".lora_B" in key}
    if matrices and not any(tensor.any() for tensor in matrices.values()):
        evidence.append(Evidence("adapter_at_zero", 1.0, "every B is zero: it answers as its base"))
    if matrices and WORD_PARTS.isdisjoint(map(component_of, matrices)):
        reason = "LoRA is nowhere in text encoder and DETR encoder, so no word can be learned"
        evidence.append(Evidence("lora_elsewhere", 0.6, reason, is_direct=False))
    return "; ".join([text, *(finding.message for finding in findings)]), evidence


@gate(RUN_GATES, "places of LoRA", "every enabled component has LoRA, no other")
def _lora_places(examination):
    modules = {module_of(key) for key in examination.adapter_weights if ".lora_B" in key}
    if not examination.is_own:
        return _claimed_places(examination.config.lora, modules)
    lora, (base, _) = examination.config.lora, examination.base
    names = {name for target in lora.target_modules for name in SPELLINGS.get(target, (target,))}
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    targets = [component_of(name) for name in linear if name.rpartition(".")[2] in names]
    if unknown := modules - set(linear):
        where, fix = examination.folder / WEIGHTS_FILE, CAUSES["adapter_keys"].fix
        raise InputError(f"{len(unknown)} keys name no linear layer", where=where, fix=fix)
    adapted = [component_of(name) for name in modules]
    counts, evidence = [], []
    for component in COMPONENTS:
        is_on = getattr(lora, f"apply_to_{component}")
        expected, count = targets.count(component) if is_on else 0, adapted.count(component)
        counts.append(f"{component} {count} of {expected}")
        text = (
            f"lora.apply_to_{component} is {str(is_on).lower()}, so {expected} modules should carry "
            f"LoRA; the adapter file has {count}"
        )
        evidence += evidence_if(count != expected, "lora_elsewhere", 1.0, text)
    return f"modules with LoRA: {', '.join(counts)}", evidence


def _claimed_places(lora, modules):
    """Compare the modules with the components that the settings of another script claim."""
    adapted = [component_of(name) for name in modules]
    claims = {name: vars(lora).get(f"apply_to_{name}") for name in COMPONENTS}
    if set(claims.values()) == {None}:
        return lora.apply_to_text_encoder, []  # raises: no component is claimed
    counts, evidence = [], []
    for component, is_on in claims.items():
        count = adapted.count(component)
        counts.append(f"{component} {count}")
        if component == IDLE_COMPONENT or is_on is None or bool(is_on) == bool(count):
            continue
        text = f"lora.apply_to_{component} is {str(is_on).lower()}, and {count} modules carry LoRA"
        # More than was asked for does no harm to what was.
        evidence.append(Evidence("lora_elsewhere", 0.95 if is_on else SLIP, text))
    return f"modules with LoRA: {', '.join(counts)}", evidence


@gate(RUN_GATES, "learning", "gradients arrive and no B stays zero")
def _learning(examination):
    report = examination.adapter_report
    idle, texts = [], []
    for component, row in report.drop(index="total").iterrows():
        if not row["modules"] or component == IDLE_COMPONENT:
            continue
        texts.append(
            f"{component} gradient {row['grad_norm']:.2g}, norm of B {row['B_norm']:.2g}, "
            f"{row['B_nonzero']:.0%} of B not zero"
        )
        if not row["B_nonzero"] or row["grad_norm"] == 0:
            idle.append(component)
    if not texts:
        raise InputError("the run's report lists no module with LoRA", where=examination.folder)
    text = "; ".join(texts)
    is_part = len(idle) < len(texts)
    if not idle or (is_part and not _had_objects(examination)):
        return text, []  # without objects, boxes and masks give no gradient
    # One branch alone may be idle because something earlier leaves it nothing to learn.
    reason = f"no gradient or B all zero in {', '.join(idle)}: {text}"
    confidence = 0.8 if is_part else 1.0
    return text, [Evidence("adapter_at_zero", confidence, reason, is_direct=not is_part)]


def _had_objects(examination):
    """Return whether the training recorded objects; nobody else's did."""
    return examination.is_finished and examination.files.metrics["objects"]["train"]


@gate(RUN_GATES, "trained parameters", "those of LoRA and no others")
def _trained_weights(examination):
    counts = examination.trained_parameters
    beside = counts["all"] - counts["lora"]
    text = f"the optimiser trained {counts['all']:,} parameters, {counts['lora']:,} of LoRA"
    reason = f"{text}: {beside:,} of the base were changed and are not in the adapter file"
    return text, evidence_if(beside, "base_not_frozen", 1.0, reason)


@gate(RUN_GATES, "kept checkpoint", "the best one by the metric of the config")
def _kept_checkpoint(examination):
    metrics, name = examination.files.metrics, examination.config.evaluation.metric_for_best
    validations = [entry for entry in examination.files.history if "eval_loss" in entry]
    values = {entry["step"]: entry.get(f"eval_{name}", 0.0) for entry in validations}
    kept = metrics["best_step"] or max(values)
    best = max(values, key=lambda step: (values[step], -step))
    text = f"kept step {kept} with {name} {values.get(kept, 0.0):.3f}; best in the log: step "
    text += f"{best} with {values[best]:.3f}"
    return text, evidence_if(values.get(kept, 0.0) < values[best], "wrong_checkpoint", 1.0, text)


@gate(RUN_GATES, "logged loss", "the published weights, and no term dominates")
def _logged_loss(examination):
    folder, weights = examination.folder, WEIGHTS[examination.config.loss.variant]
    log = pd.DataFrame([entry for entry in examination.history if "loss" in entry])
    if log.empty:
        raise InputError("the run logged no loss", where=folder)
    leaves = {name: name.rpartition(".")[2] for name in log}
    names = [name for name, leaf in leaves.items() if leaf in weights]
    terms = log[names].fillna(0) * [weights[leaves[name]] for name in names]
    total = terms.sum(axis=1)
    gap = float(((log["loss"] - total).abs() / total.clip(lower=1e-9)).median())
    text = f"logged loss against the weighted sum of its terms: {gap:.1g} apart"
    reason = f"{text}: the training did not weigh the terms as published"
    evidence = evidence_if(gap > LOSS_TOLERANCE, "loss_weights", 1.0, reason)
    shares = (terms.max(axis=1) / total)[log["loss_bbox"] > 0].sort_values()
    if len(shares):
        row = shares.index[len(shares) // 2]
        share, name = shares[row], terms.loc[row].idxmax()
        text += f"; largest share of one term, median: {share:.0%} ({name})"
        reason = f"{name} makes up {share:.1%} of the loss in half of the steps"
        evidence += evidence_if(share > DOMINANT, "loss_weights", 0.7, reason, is_direct=False)
    return text, evidence


def _points(examination, *names):
    """Return the logged values of the first columns that there are: list of (name, series)."""
    log = examination.log
    found = [(name, log[name].dropna()) for name in names if name in log]
    found = [(name, values) for name, values in found if len(values)]
    if not found:
        raise InputError(f"the log holds no {' and no '.join(names)}")
    return found


@gate(LOG_GATES, "numbers of the log", "every loss is finite and above 0")
def numbers_of_the_log(examination):
    """Look for a loss that is not a number, or nothing at all."""
    texts, evidence = [], []
    for name, values in _points(examination, "loss", "valid_loss"):
        broken, zeros = int((values == math.inf).sum()), int((values == 0).sum())
        texts.append(f"{name}: {len(values)} values, {broken} NaN or infinite, {zeros} are 0")
        evidence += evidence_if(broken, "not_finite", 1.0, texts[-1])
        if name == "loss":
            evidence += evidence_if(zeros > len(values) / 2, "no_objects", 0.9, texts[-1])
    return "; ".join(texts), evidence


@gate(LOG_GATES, "value without objects", f"a loss that ends above {EMPTY_LOSS:g}")
def value_without_objects(examination):
    """Compare the last loss with what a loss costs that has no object to learn."""
    texts, evidence = [], []
    for name, values in _points(examination, "loss", "valid_loss"):
        last, first = float(values.iloc[-1]), float(values.iloc[0])
        text = f"{name} goes from {first:.3g} to {last:.3g}"
        if 0 < last < EMPTY_LOSS and len(values) > 1 and last <= first:
            logit = math.log(math.expm1(last / 2))  # of 2 mean(softplus(logit)), see lesson 02
            text += f", the value 2 softplus(logit) of every logit at {logit:.1f} and no object"
            confidence = 0.9 if last < SURELY_EMPTY else 0.6
            evidence.append(Evidence("no_objects", confidence, text))
        texts.append(text)
    return "; ".join(texts), evidence


@gate(LOG_GATES, "size of the box loss", f"below {PIXEL_TERM:g}, the loss below {PIXEL_LOSS:g}")
def size_of_box_loss(examination):
    """Look for a box loss, or a loss, of a size that only pixels can have."""
    log = examination.log.replace(math.inf, float("nan"))
    boxes = [n for n in log if "loss" in n.lower() and ("box" in n.lower() or "l1" in n.lower())]
    sizes = {name: float(log[name].median()) for name in boxes if log[name].notna().any()}
    texts = [f"{name} {size:.3g}" for name, size in sizes.items()]
    is_fault = max(sizes.values(), default=0) > PIXEL_TERM
    evidence = evidence_if(is_fault, "wrong_box_targets", 1.0, f"median {', '.join(texts)}")
    for name, values in _points(examination, "loss", "valid_loss"):
        size = float(values[values < math.inf].median())
        texts.append(f"{name} {size:.3g}")
        reason = f"half of all values of {name} are above {size:.4g}: boxes in pixels cost as much"
        evidence += evidence_if(size > PIXEL_LOSS and not sizes, "wrong_box_targets", 0.9, reason)
    return f"median: {', '.join(texts)}", evidence


@gate(LOG_GATES, "course of the loss", "it falls, and the validation loss does not rise again")
def course_of_the_loss(examination):
    """Look for a loss that never falls, and for a validation loss that rises for good."""
    log = examination.log.replace(math.inf, float("nan"))
    [(name, values), *_] = _points(examination, "loss", "valid_loss")
    values = values[values < math.inf]
    quarter = max(1, len(values) // 4)
    start, end = float(values[:quarter].median()), float(values[-quarter:].median())
    text = f"{name}: median {start:.4g} in the first quarter, {end:.4g} in the last"
    is_flat = len(values) >= LEAST_COURSE and values.max() - values.min() < FLAT * abs(start)
    reason = f"{text}: it does not move at all"
    evidence = evidence_if(is_flat, "adapter_at_zero", 0.8, reason)
    if {"loss", "valid_loss"} <= set(log):
        losses = log["loss"].ffill()  # a step may be logged in another row than its validation
        valid = log["valid_loss"].dropna()
        best = valid.idxmin() if len(valid) else None
        if len(valid) >= LEAST_COURSE:
            text += f"; validation loss: lowest {valid[best]:.4g} at {list(valid.index).index(best) + 1} "
            text += f"of {len(valid)}, last {valid.iloc[-1]:.4g}"
            is_fault = valid.iloc[-1] > RISE * valid[best] and losses.iloc[-1] < losses[best]
            is_fault &= list(valid.index).index(best) < len(valid) / 2
            evidence += evidence_if(is_fault, "overtrained", 0.6, text, is_direct=False)
    return text, evidence
