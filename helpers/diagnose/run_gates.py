"""Gates on what a run wrote down: whether it finished, where LoRA sits, what learned, what was kept.

No model is loaded here.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import get_scheduler

from helpers.causes import CAUSES
from helpers.diagnose.examination import Evidence, Gate
from helpers.diagnose.self_tests import weighted_terms
from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.lora import COMPONENTS, SPELLINGS, WEIGHTS_FILE, component_of
from helpers.show.charts import schedule_frame
from helpers.train import run as run_folder
from helpers.train.run import read_history

MAX_DROPOUT = 0.2
FEW_IMAGES, MAX_EPOCHS = 100, 50
RATE_TOLERANCE = 1e-3  # relative to the peak; healthy: below 1e-9


def regularisation(examination):
    """Compare dropout, images and epochs with what a small dataset bears."""
    config = examination.config
    images, epochs = len(examination.split("train").records), config.effective_num_epochs
    dropout = config.lora.dropout
    text = f"dropout {dropout:g}, {images} images, {epochs} epochs"
    evidence = []
    if dropout > MAX_DROPOUT:
        reason = f"lora.dropout is {dropout:g}: so much of the input of LoRA is left out"
        evidence.append(Evidence("extreme_regularisation", 0.9, reason))
    if images < FEW_IMAGES and epochs > MAX_EPOCHS:
        reason = f"{images} images were seen {epochs} times each"
        evidence.append(Evidence("extreme_regularisation", 0.8, reason))
    return text, evidence


def settings_in_log(examination):
    """Compare the logged steps and learning rates with what config and data come to."""
    config = examination.config
    if resolve(config.data.data_dir) != examination.data_dir:
        raise InputError("asked about another dataset than was trained on", where="data_dir")
    history = read_history(examination.folder)
    logged = {
        entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry
    }
    if not logged:
        raise InputError("no learning rate was logged", where=examination.folder)
    plan = schedule_frame({"run": config}, len(examination.train_dataset)).loc["run"]
    steps = int(plan["steps"])
    expected = _expected_rates(config, steps)
    peak = config.effective_learning_rate
    off = [
        step
        for step, rate in logged.items()
        if step > steps or abs(rate - expected[step - 1]) > RATE_TOLERANCE * peak
    ]
    last = max(entry["step"] for entry in history)
    text = (
        f"{last} steps logged, {steps} expected; highest learning rate logged "
        f"{max(logged.values()):g}, expected {max(expected):g}; {len(off)} of {len(logged)} "
        "logged learning rates are not those of the config"
    )
    if off or (examination.is_finished and last != steps):
        return text, [Evidence("dead_config_keys", 0.95, text)]
    return text, []


def _expected_rates(config, steps):
    """Return the learning rate that is logged after each step of a schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.effective_learning_rate)
    scheduler = get_scheduler(
        config.training.lr_scheduler,
        optimizer,
        num_warmup_steps=config.effective_warmup_steps,
        num_training_steps=steps,
    )
    return [config.effective_learning_rate * scheduler.lr_lambdas[0](step) for step in range(steps)]


CONFIG_GATES = (
    Gate(
        "regularisation",
        f"dropout up to {MAX_DROPOUT:g}; fewer than {FEW_IMAGES} images at most {MAX_EPOCHS} times",
        regularisation,
    ),
    Gate(
        "settings in the log", "steps and learning rates are those of the config", settings_in_log
    ),
)


IDLE_COMPONENT = "geometry_encoder"
"""A text prompt never passes through it; `helpers.model.lora.add_lora` warns of that."""
LOSS_TOLERANCE = 0.02
"""Relative, logged loss against the weighted sum of the logged terms; measured: 4e-8."""
DOMINANT = 0.95
"""Share of one term in the total, in half of the steps with objects; measured: at most 0.38."""


def is_finished(examination):
    """Read whether the run finished, and if not, what stopped it."""
    if examination.is_finished:
        metrics = examination.files.metrics
        return f"finished: {metrics['steps']} steps, {metrics['epochs']:g} epochs", []
    stopped = examination.folder / run_folder.STOPPED_FILE
    if stopped.is_file():
        record = read_json(stopped, fix="train again with --overwrite")
        text = f"the training was stopped: {record['message']}"
        if record["cause"] not in CAUSES:  # such as a full memory
            raise InputError(text, where=record["where"], fix=record["fix"])
        return text, [Evidence(record["cause"], 1.0, text)]
    raise InputError(
        f"unfinished: the training ended without its last files; {_last_sign(examination)}",
        where=examination.folder,
        fix="read the error it ended with, then continue with 'python -m helpers train ... "
        "--resume'; the gates below examine what can be examined without it",
    )


def lora_places(examination):
    """Count the adapted modules of each component in the file; compare with the flags."""
    lora, (base, _) = examination.config.lora, examination.base
    names = {one for target in lora.target_modules for one in SPELLINGS.get(target, (target,))}
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    named = [component_of(name) for name in linear if name.rpartition(".")[2] in names]
    modules = _adapted_modules(examination)
    if unknown := set(modules) - set(linear):
        raise InputError(
            f"{len(unknown)} keys of the adapter file name no linear layer of the base",
            where=examination.folder / WEIGHTS_FILE,
            fix=CAUSES["adapter_keys"].fix,
        )
    adapted = [component_of(name) for name in modules]
    counts, wrong = [], []
    for component in COMPONENTS:
        is_on = getattr(lora, f"apply_to_{component}")
        expected, found = named.count(component) if is_on else 0, adapted.count(component)
        counts.append(f"{component} {found} of {expected}")
        if found != expected:
            wrong.append(
                f"lora.apply_to_{component} is {str(is_on).lower()}, so {expected} modules should "
                f"carry LoRA; the adapter file has {found}"
            )
    evidence = [Evidence("lora_elsewhere", 1.0, text) for text in wrong]
    return f"modules with LoRA: {', '.join(counts)}", evidence


def learning(examination):
    """Read from the run's report whether gradients arrived and B left zero."""
    report = examination.files.adapter
    idle, measured = [], []
    for component, row in report.drop(index="total").iterrows():
        if not row["modules"] or component == IDLE_COMPONENT:
            continue
        measured.append(
            f"{component} gradient {row['grad_norm']:.2g}, norm of B {row['B_norm']:.2g}, "
            f"{row['B_nonzero']:.0%} of B not zero"
        )
        if not row["B_nonzero"] or row["grad_norm"] == 0:
            idle.append(component)
    if not measured:
        raise InputError("the run's report lists no module with LoRA", where=examination.folder)
    text = f"no gradient or B all zero in {', '.join(idle)}: {'; '.join(measured)}"
    is_part = len(idle) < len(measured)
    if not idle or (is_part and not examination.files.metrics["objects"]["train"]):
        return "; ".join(measured), []  # without objects, boxes and masks give no gradient
    # One branch alone may be idle because something earlier leaves it nothing to learn.
    evidence = Evidence("adapter_at_zero", 0.8 if is_part else 1.0, text, is_direct=not is_part)
    return "; ".join(measured), [evidence]


def trained_weights(examination):
    """Compare the number of trained parameters with that of LoRA."""
    counted = examination.files.metrics.get("trained_parameters")
    if counted is None:
        raise InputError(
            "the run did not record how many parameters it trained",
            where=examination.folder / run_folder.METRICS_FILE,
            fix="train again",
        )
    beside = counted["all"] - counted["lora"]
    text = f"the optimiser trained {counted['all']:,} parameters, {counted['lora']:,} of LoRA"
    if not beside:
        return text, []
    reason = f"{text}: {beside:,} of the base were changed and are not in the adapter file"
    return text, [Evidence("base_not_frozen", 1.0, reason)]


def kept_checkpoint(examination):
    """Compare the kept state with the best one in the log, by the metric of the config."""
    metrics, name = examination.files.metrics, examination.config.evaluation.metric_for_best
    judged = {
        int(entry["step"]): entry.get(f"eval_{name}", math.nan)
        for entry in examination.files.history
        if "eval_loss" in entry
    }
    kept = metrics["best_step"] or max(judged)
    best = max(judged, key=lambda step: (_or_zero(judged[step]), -step))
    text = f"kept step {kept} with {name} {judged.get(kept, math.nan):.3f}; best in the log: step "
    text += f"{best} with {judged[best]:.3f}"
    if _or_zero(judged.get(kept, math.nan)) < _or_zero(judged[best]):
        return text, [Evidence("wrong_checkpoint", 1.0, text)]
    return text, []


def logged_loss(examination):
    """Add the logged terms up with the published weights; compare with the logged loss."""
    variant = examination.config.loss.variant
    entries = [entry for entry in run_folder.read_history(examination.folder) if "loss" in entry]
    if not entries:
        raise InputError("the run logged no loss", where=examination.folder)
    gaps, shares = [], []
    for entry in entries:
        weighted = weighted_terms(entry, variant)
        total = sum(weighted.values())
        gaps.append(abs(entry["loss"] - total) / max(total, 1e-9))
        if entry["loss_bbox"] > 0:
            largest = max(weighted, key=weighted.get)
            shares.append((weighted[largest] / total, largest))
    gap = float(np.median(gaps))
    text = f"logged loss against the weighted sum of its terms: {gap:.1g} apart"
    evidence = []
    if gap > LOSS_TOLERANCE:
        reason = f"{text}: the training did not weigh the terms as published"
        evidence.append(Evidence("loss_weights", 1.0, reason))
    if shares:
        share, name = sorted(shares)[len(shares) // 2]
        text += f"; largest share of one term, median: {share:.0%} ({name})"
        if share > DOMINANT:
            reason = f"{name} makes up {share:.1%} of the loss in half of the steps"
            evidence.append(Evidence("loss_weights", 0.7, reason, is_direct=False))
    return text, evidence


def _adapted_modules(examination):
    """List the modules of the base that the adapter file has weights for."""
    path = examination.files.folder / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"holds no {WEIGHTS_FILE}", where=path.parent, fix="train again")
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if ".lora_B" in key]
    return [key.removeprefix("base_model.model.").partition(".lora_B")[0] for key in keys]


def _last_sign(examination):
    """Say how far an unfinished run came."""
    checkpoint = run_folder.last_checkpoint(examination.folder)
    if checkpoint is not None:
        return f"its last complete checkpoint is {checkpoint.name}"
    return "it has no checkpoint, so it ended before or in the first validation"


def _or_zero(value):
    """Read a metric without meaning as its lowest value."""
    return 0.0 if math.isnan(value) else value


RUN_GATES = (
    Gate("the run", "finished", is_finished),
    Gate("places of LoRA", "every enabled component has LoRA, no other", lora_places),
    Gate("learning", "gradients arrive and no B stays zero", learning),
    Gate("trained parameters", "those of LoRA and no others", trained_weights),
    Gate("kept checkpoint", "the best one by the metric of the config", kept_checkpoint),
    Gate("logged loss", "the published weights, and no term dominates", logged_loss),
)
