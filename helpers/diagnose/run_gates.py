"""Gates on what a training wrote: files, settings, log, base, where LoRA sits, what it learned."""

import math
from pathlib import Path

import torch

from helpers.causes import CAUSES
from helpers.config import load_config, read_yaml
from helpers.data.coco import read_split
from helpers.diagnose.patient import FOUND, SLIP, Evidence, Inapplicable, evidence_if, gate, stated
from helpers.errors import InputError
from helpers.files import TINY_BASE, WALL_CRACKS, read_json, resolve
from helpers.model.lora import (
    BASE_FILE,
    COMPONENTS,
    CONFIG_FILE,
    WEIGHTS_FILE,
    WORD_PARTS,
    component_of,
)
from helpers.train import run as run_folder

# Written before the first step, and after the last one; metrics.json follows.
EARLY_FILES = (run_folder.RUN_CONFIG, run_folder.PROMPTS_FILE, run_folder.VERSIONS_FILE)
LATE_FILES = (WEIGHTS_FILE, CONFIG_FILE, BASE_FILE, run_folder.AUDIT_FILE, run_folder.CARD_FILE)
MAX_DROPOUT = 0.2
FEW_IMAGES, MAX_EPOCHS = 100, 50
IDLE_COMPONENT = "geometry_encoder"  # a text prompt never passes through it
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
# Of the stated learning rate, that a schedule reaches at its peak.
LEAST_PEAK, MOST_PEAK = 0.3, 1.01
KNOWN_PICTURES, KNOWN_SHARE = 12, 0.8  # of their concepts that the base finds; measured: 18 of 18
FILE_GATES, CONFIG_GATES, RUN_GATES, LOG_GATES = [], [], [], []
BASE_GATES, CHECKPOINT_GATES = [], []


@gate(FILE_GATES, "files of the run", "all there, complete, without NaN")
def _run_files(examination):
    folder = examination.folder
    late = (run_folder.CURVES_FILE, *LATE_FILES, run_folder.METRICS_FILE)
    was_saved = any((folder / name).is_file() for name in late[1:])
    names = (*EARLY_FILES, *(late if was_saved else ()))
    problems = {}
    for name in names:
        try:
            _read_run_file(examination, folder / name)
        except InputError as error:
            problems[name] = error.message
    if was_saved and not problems:
        try:
            _ = examination.files
        except InputError as error:
            problems[Path(error.where).name] = error.message
    evidence = [
        # Nothing that the model does depends on the card.
        Evidence("damaged_run", 0.7 if name == run_folder.CARD_FILE else 1.0, f"{name} {problem}")
        for name, problem in problems.items()
    ]
    if was_saved and WEIGHTS_FILE not in problems:
        weights = examination.adapter_weights
        broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
        text = f"NaN or infinite numbers in {len(broken)} of {len(weights)} tensors"
        text = f"{WEIGHTS_FILE} holds {text}, for example {broken[:1]}"
        evidence += evidence_if(broken, "not_finite", 1.0, text)
    return "; ".join([f"{len(names)} files read", *(one.text for one in evidence)]), evidence


def _read_run_file(examination, path):
    """Refuse a file of a run that is missing, cut off, or lacks what a training writes."""
    if not path.is_file():
        raise InputError("is missing")
    if path.name == WEIGHTS_FILE:
        tensors = examination.adapter_weights.values()
        if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
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
    dropout = stated(lambda: examination.config.lora.dropout)
    images = stated(lambda: len(examination.split("train").records))
    epochs = stated(lambda: examination.config.effective_num_epochs)
    if dropout is None and None in (images, epochs):
        return f"dropout {examination.config.lora.dropout}", []  # raises: it is not stated
    reason = f"lora.dropout is {dropout}: so much of the input of LoRA is left out"
    evidence = evidence_if((dropout or 0) > MAX_DROPOUT, "extreme_regularisation", 0.9, reason)
    is_long = None not in (images, epochs) and images < FEW_IMAGES and epochs > MAX_EPOCHS
    reason = f"{images} images were seen {epochs} times each"
    evidence += evidence_if(is_long, "extreme_regularisation", 0.8, reason)
    return f"dropout {dropout}, images {images}, epochs {epochs}; None is not stated", evidence


@gate(RUN_GATES, "the run", "finished, with objects to train on")
def _is_finished(examination):
    path = examination.folder / run_folder.STOPPED_FILE
    if path.is_file() and not examination.is_finished:
        record = read_json(path, fix="train again with --overwrite")
        text = f"the training was stopped: {record['message']}"
        if record["cause"] in CAUSES:  # others are such as a full memory
            return text, [Evidence(record["cause"], 1.0, text)]
    metrics = examination.files.metrics  # raises what the run lacks
    text = "finished: {steps} steps, {epochs:g} epochs, {objects[train]} objects".format(**metrics)
    return text, evidence_if(not metrics["objects"]["train"], "no_objects", 0.95, text)


def _module_of(name):
    """Return the module of the base that a tensor of a PEFT file belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


@gate(FILE_GATES, "weights as they are", "finite, and where a word can be learned")
def weights_as_they_are(examination):
    """Say what the file of weights shows by itself, and what its import found."""
    if examination.is_own:
        raise Inapplicable("'files of the run' looks at them")
    try:
        weights = examination.weights
    except InputError as error:
        if not str(error.where).endswith(".safetensors"):
            raise
        return str(error), [Evidence("damaged_run", 1.0, str(error))]
    findings = examination.findings
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    text = f"{len(weights)} tensors, NaN or infinite numbers in {len(broken)} of them"
    evidence = evidence_if(broken, "not_finite", 1.0, f"{text}, for example {broken[:1]}")
    evidence += evidence_if(not weights, "damaged_run", 1.0, text)
    for finding in findings:
        cause, confidence = FINDINGS.get(finding.code, (finding.code, SLIP))
        if cause in CAUSES:
            evidence.append(Evidence(cause, confidence, finding.message))
    matrices = {_module_of(key): tensor for key, tensor in weights.items() if ".lora_B" in key}
    if matrices and not any(tensor.any() for tensor in matrices.values()):
        reason, is_saved = "every B is zero: it answers as its base", not examination.is_live
        # In memory it may be that the training has not begun, or was stopped by an earlier cause.
        evidence.append(Evidence("adapter_at_zero", 1.0, reason, is_direct=is_saved))
    if matrices and WORD_PARTS.isdisjoint(map(component_of, matrices)):
        reason = "LoRA is nowhere in text encoder and DETR encoder, so no word can be learned"
        evidence.append(Evidence("lora_elsewhere", 0.6, reason, is_direct=False))
    texts = [text, *(finding.message for finding in findings), *(one.text for one in evidence)]
    return "; ".join(dict.fromkeys(texts)), evidence


@gate(RUN_GATES, "places of LoRA", "every enabled component has LoRA, no other")
def _lora_places(examination):
    modules = {_module_of(key) for key in examination.adapter_weights if ".lora_B" in key}
    lora, adapted = examination.config.lora, [component_of(name) for name in modules]
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
    rows = report[(report["modules"] > 0) & ~report.index.isin(["total", IDLE_COMPONENT])]
    if rows.empty:
        raise InputError("no module with LoRA is listed")
    text = "; ".join(
        f"{component} norm of B {row['B_norm']:.2g}, {row['B_nonzero']:.0%} of B not zero, gradient "
        f"{'not kept' if math.isnan(row['grad_norm']) else format(row['grad_norm'], '.2g')}"
        for component, row in rows.iterrows()
    )
    idle = rows.index[(rows["B_nonzero"] == 0) | (rows["grad_norm"] == 0)]
    is_part = len(idle) < len(rows)
    had_objects = examination.is_finished and examination.files.metrics["objects"]["train"]
    if is_part and not examination.is_own:
        idle = idle.drop("mask_decoder", errors="ignore")  # without objects it gets no gradient
    elif is_part and not had_objects:
        return text, []  # without objects, boxes and masks give no gradient
    # Something earlier may have left it nothing to learn, or kept a training from its first step.
    reason = f"no gradient or B all zero in {', '.join(idle)}: {text}"
    confidence, is_direct = (0.8, False) if is_part else (1.0, not examination.is_live)
    return text, evidence_if(len(idle), "adapter_at_zero", confidence, reason, is_direct)


@gate(RUN_GATES, "trained parameters", "those of LoRA and no others")
def _trained_weights(examination):
    counts = examination.trained_parameters
    beside = counts["all"] - counts["lora"]
    text = f"the optimiser trained {counts['all']:,} parameters, {counts['lora']:,} of LoRA"
    reason = f"{text}: {beside:,} of the base were changed and are not in the adapter file"
    return text, evidence_if(beside, "base_not_frozen", 1.0, reason)


def _losses(examination):
    """Return the logged values of the losses that there are: dict of column to series."""
    table = examination.log.filter(["loss", "valid_loss"]).dropna(axis=1, how="all")
    if table.empty:
        raise InputError("the log holds no loss and no valid_loss")
    return {name: values.dropna() for name, values in table.items()}


@gate(LOG_GATES, "numbers of the log", "every loss is finite and above 0")
def numbers_of_the_log(examination):
    """Look for a loss that is not a number, or nothing at all."""
    texts, evidence = [], []
    for name, values in _losses(examination).items():
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
    for name, values in _losses(examination).items():
        last, first = float(values.iloc[-1]), float(values.iloc[0])
        text = f"{name} goes from {first:.3g} to {last:.3g}"
        if 0 < last < EMPTY_LOSS and len(values) > 1 and last <= first:
            logit = math.log(math.expm1(last / 2))  # of 2 mean(softplus(logit)), see lesson 02
            text += f", the value 2 softplus(logit) of every logit at {logit:.1f} and no object"
            evidence.append(Evidence("no_objects", 0.9 if last < SURELY_EMPTY else 0.6, text))
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
    for name, values in _losses(examination).items():
        size = float(values[values < math.inf].median())
        texts.append(f"{name} {size:.3g}")
        reason = f"half of all values of {name} are above {size:.4g}: boxes in pixels cost as much"
        evidence += evidence_if(size > PIXEL_LOSS and not sizes, "wrong_box_targets", 0.9, reason)
    return f"median: {', '.join(texts)}", evidence


@gate(LOG_GATES, "settings in the log", "the learning rate and no more epochs than are stated")
def settings_in_the_log(examination):
    """Compare the learning rate and the epochs of the log with what the settings state."""
    if examination.is_own:
        raise Inapplicable("the trainer of this project wrote both")
    training, log = examination.config.training, examination.log
    texts, evidence = [], []
    rates = log["learning_rate"].dropna() if "learning_rate" in log else []
    if (rate := stated(lambda: training.learning_rate)) and len(rates) > 1:
        texts.append(f"learning rate up to {max(rates):.3g}, stated {rate:.3g}")
        is_off = not LEAST_PEAK * rate < max(rates) < MOST_PEAK * rate
        evidence += evidence_if(is_off, "dead_config_keys", 0.7, texts[-1])
    if (epochs := stated(lambda: training.num_epochs)) and "epoch" in log:
        texts.append(f"last epoch {log['epoch'].max():g}, stated {epochs:g}")
        is_off = log["epoch"].max() > epochs + 0.5  # fewer: a training may be stopped early
        evidence += evidence_if(is_off, "dead_config_keys", 0.7, texts[-1])
    if not texts:
        _ = training.learning_rate  # raises if it is not stated
        raise InputError("the log holds neither two learning rates nor an epoch")
    return "; ".join(texts), evidence


@gate(LOG_GATES, "course of the loss", "it falls, and the validation loss does not rise again")
def course_of_the_loss(examination):
    """Look for a loss that never falls, and for a validation loss that rises for good."""
    log = examination.log.replace(math.inf, float("nan"))
    name, values = next(iter(_losses(examination).items()))
    values = values[values < math.inf]
    quarter = max(1, len(values) // 4)
    start, end = float(values[:quarter].median()), float(values[-quarter:].median())
    text = f"{name}: median {start:.4g} in the first quarter, {end:.4g} in the last"
    is_flat = len(values) >= LEAST_COURSE and values.max() - values.min() < FLAT * abs(start)
    evidence = evidence_if(is_flat, "adapter_at_zero", 0.8, f"{text}: it does not move at all")
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


@gate(BASE_GATES, "base", "finds what it knows on bundled pictures")
def base_knows_its_concepts(examination):
    """Ask the embedded base for what it knows, on bundled pictures that show it."""
    if resolve(examination.base_name) != TINY_BASE:
        fix = "ask it for something that is plainly in one of your pictures"
        raise Inapplicable("no picture with a known answer is bundled for this base", fix=fix)
    predictor, count, total = examination.predictor(adapted=False), 0, 0
    records = [one for one in read_split(WALL_CRACKS, "test").records if one.contents]
    for record in records[:KNOWN_PICTURES]:
        raws = predictor.raw(record.path, sorted(record.contents))
        count += sum(raw.max_score > FOUND for raw in raws)
        total += len(raws)
    text = f"the base finds {count} of {total} concepts that it knows and bundled pictures show"
    counts = examination.trained_parameters if examination.is_live else {"all": 0, "lora": 0}
    if counts["all"] > counts["lora"]:
        return f"{text}, after it was trained itself", []
    return text, evidence_if(count < KNOWN_SHARE * total, "blank_base", 1.0, text)


@gate(CHECKPOINT_GATES, "keys of the adapter", "each names a module of the base")
def _keys_fit(examination):
    weights = examination.adapter_weights
    modules = {name for name, _ in examination.base[0].named_modules()}
    lost = [key for key in weights if _module_of(key) not in modules]
    text = f"{len(lost)} of {len(weights)} keys of the adapter file name no module of the base"
    if not lost:
        _ = examination.loaded  # raises what else does not fit
    return text, evidence_if(lost, "adapter_keys", 1.0, f"{text}, for example {lost[:1]}")


@gate(CHECKPOINT_GATES, "saved adapter", "with alpha / rank of the config")
def _saved_as_trained(examination):
    if examination.is_live or not examination.is_adapter:
        raise Inapplicable("no adapter was saved")
    saved = read_json(examination.place / CONFIG_FILE, fix="train again")
    lora = examination.config.lora
    text = f"alpha / rank is {saved['lora_alpha']:g} / {saved['r']} in the adapter, "
    text += f"{lora.alpha:g} / {lora.rank} in the config"
    is_scaled = saved["lora_alpha"] / saved["r"] != lora.alpha / lora.rank
    return text, evidence_if(is_scaled, "merge_changed_outputs", 1.0, text)
