"""Gates on what a run wrote down: whether it finished, where LoRA sits, what learned, what was kept.

No model is loaded here.
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import nn
from transformers import get_scheduler

from helpers.causes import CAUSES
from helpers.config import load_config, read_yaml
from helpers.diagnose.examination import Evidence, Gate, Inapplicable
from helpers.diagnose.self_tests import weighted_terms
from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.lora import (
    BASE_FILE,
    COMPONENTS,
    CONFIG_FILE,
    SPELLINGS,
    WEIGHTS_FILE,
    component_of,
    read_adapter_weights,
)
from helpers.show.charts import schedule_frame
from helpers.train import run as run_folder
from helpers.train.run import read_history
from helpers.train.trainer import CURVES_FILE

EARLY_FILES = (run_folder.RUN_CONFIG, run_folder.PROMPTS_FILE, run_folder.VERSIONS_FILE)
"""Written before the first step; curves.csv follows with the first log."""
LATE_FILES = (WEIGHTS_FILE, CONFIG_FILE, BASE_FILE, run_folder.AUDIT_FILE, run_folder.CARD_FILE)
"""Written after the last step, and then metrics.json."""
_KEYS = {
    run_folder.METRICS_FILE: {
        "steps": int,
        "epochs": Real,
        "best_step": int | None,
        "valid": dict,
        "train_loss": dict,
        "valid_loss": dict,
        "objects": dict,
    },
    run_folder.PROMPTS_FILE: {"prompts": dict, "negatives": dict, "negatives_per_image": int},
    run_folder.VERSIONS_FILE: {"packages": dict},
    CONFIG_FILE: {"peft_type": str, "r": int, "lora_alpha": Real, "target_modules": str | list},
    BASE_FILE: {"name": str, "fingerprint": str},
}
_COLUMNS = {
    CURVES_FILE: ("step", "loss", "learning_rate"),
    run_folder.AUDIT_FILE: ("modules", "parameters", "grad_norm", "B_norm", "B_nonzero"),
}


def run_files(examination):
    """Read every file that the run should hold; name what is missing, cut or of another type."""
    folder = examination.folder
    if examination.is_finished:
        names = (*EARLY_FILES, CURVES_FILE, *LATE_FILES, run_folder.METRICS_FILE)
    else:
        names = EARLY_FILES
    texts = {}
    for name in names:
        try:
            _read_run_file(folder / name)
        except InputError as error:
            texts[name] = f"{name} {error.message}"
    saved = [name for name in LATE_FILES if (folder / name).is_file()]
    if saved and not examination.is_finished:
        texts[run_folder.METRICS_FILE] = (
            f"{run_folder.METRICS_FILE} is missing, which is written after {saved[0]}: it was lost, "
            "or the run was interrupted while it saved"
        )
    if examination.is_finished and not texts.keys() & {CURVES_FILE, run_folder.METRICS_FILE}:
        last = int(pd.read_csv(folder / CURVES_FILE)["step"].max())
        steps = read_json(folder / run_folder.METRICS_FILE, fix="")["steps"]
        if last != steps:
            texts[CURVES_FILE] = (
                f"{CURVES_FILE} ends at step {last}, {run_folder.METRICS_FILE} counts {steps} steps"
            )
    evidence = [
        Evidence("damaged_run", 0.7 if name == run_folder.CARD_FILE else 1.0, text)
        for name, text in texts.items()
    ]
    if WEIGHTS_FILE in saved and WEIGHTS_FILE not in texts:
        evidence += _not_finite(read_adapter_weights(folder))
    return "; ".join([f"{len(names)} files looked at", *(one.text for one in evidence)]), evidence


def _not_finite(weights):
    """Return evidence if adapter tensors hold NaN or infinite numbers."""
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if not broken:
        return []
    text = (
        f"{WEIGHTS_FILE} holds NaN or infinite numbers in {len(broken)} of {len(weights)} tensors, "
        f"for example {broken[0]}"
    )
    return [Evidence("not_finite", 1.0, text)]


def _read_run_file(path):
    """Read one file of a run as its kind asks; raise InputError if that is impossible."""
    if not path.is_file():
        raise InputError("is missing")
    if not path.stat().st_size:
        raise InputError("is empty")
    if path.name == WEIGHTS_FILE:
        _check_weights(read_adapter_weights(path.parent))
        return
    if not path.read_bytes().endswith(b"\n") and path.name != CONFIG_FILE:
        raise InputError("ends in the middle of a line, so its end is missing")
    if path.suffix == ".json":
        _check_keys(read_json(path, fix=""), _KEYS[path.name])
    elif path.suffix == ".csv":
        _check_table(path)
    elif path.name == run_folder.RUN_CONFIG:
        sections = load_config(path).model_dump()
        missing = [name for name in sections if name not in read_yaml(path)]
        if missing:
            raise InputError(f"lacks the section {missing[0]}")


def _check_weights(weights):
    """Refuse weights that no training writes: none at all, or whole numbers."""
    whole = [name for name, tensor in weights.items() if not tensor.is_floating_point()]
    if whole or not weights:
        raise InputError(f"holds whole numbers as {whole[0]}" if whole else "holds no tensor")


def _check_keys(content, types):
    """Refuse a JSON object that lacks a key, or has one of another type."""
    for key, expected in types.items():
        if key not in content:
            raise InputError(f"lacks the key {key}")
        if not isinstance(content[key], expected):
            raise InputError(f"has {content[key]!r:.40} as {key}")


def _check_table(path):
    """Refuse a table that lacks a column, holds text among numbers, or ends too early."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})") from error
    columns = _COLUMNS[path.name]
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"lacks the column {missing[0]}")
    texts = [name for name in columns if not pd.api.types.is_numeric_dtype(table[name])]
    if table.empty or texts:
        raise InputError(f"has text in the column {texts[0]}" if texts else "has no row")
    if (
        path.name == run_folder.AUDIT_FILE
        and "total" not in table.get("component", pd.Series()).values
    ):
        raise InputError("lacks the row total")


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
        raise Inapplicable("asked about another dataset than was trained on", where="data_dir")
    history = read_history(examination.folder)
    logged = {
        entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry
    }
    if not logged:
        raise InputError("no learning rate was logged", where=examination.folder)
    images, processes = len(examination.train_dataset), examination.num_processes
    steps = int(schedule_frame({"run": config}, images, processes).loc["run", "steps"])
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


FILE_GATES = (Gate("files of the run", "all there, complete, without NaN", run_files),)
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
