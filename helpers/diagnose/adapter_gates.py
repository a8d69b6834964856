"""Gates on base and adapter: are they the ones of the run, in memory, and do what was recorded."""

import torch
from peft import get_peft_model_state_dict
from PIL import Image
from transformers import Sam3Model

from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator
from helpers.data.images import open_upright
from helpers.detect.metrics import evaluate_queries
from helpers.detect.queries import predict_split
from helpers.diagnose.answer_gates import FOUND
from helpers.diagnose.examination import Evidence, Inapplicable, evidence_if, gate
from helpers.errors import InputError
from helpers.files import TINY_BASE, WALL_CRACKS, read_json, resolve
from helpers.model.lora import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from helpers.model.prompted import model_inputs
from helpers.model.sam3 import base_dtype, base_fingerprint
from helpers.train.trainer import CHECKPOINTS

PORT_TOLERANCE = 1e-2  # of a logit; measured on the embedded base: 3e-5, in float32 on a CPU
KNOWN_PICTURES, KNOWN_SHARE = 12, 0.8  # of their concepts that the base finds; measured: 18 of 18
PARITY = {"max_score_present": 0.01, "max_score_absent": 0.01, "AP50": 0.05}
"""Largest change of a recorded metric after loading. Measured on six healthy runs, on the machine
that trained them: below 1e-4; half of alpha changes them by 0.12, 0.02 and 0.15."""
BASE_GATES, CHECKPOINT_GATES = [], []


@gate(BASE_GATES, "base", "finds what it knows on bundled pictures")
def base_knows_its_concepts(examination):
    """Ask the embedded base for what it knows, on bundled pictures that show it."""
    if resolve(examination.config.model.name) != TINY_BASE:
        fix = "ask it for something that is plainly in one of your pictures"
        raise Inapplicable("no picture with a known answer is bundled for this base", fix=fix)
    predictor, count, total = examination.predictor(adapted=False), 0, 0
    for path, nouns in _known_pictures():
        raws = predictor.raw(path, nouns)
        count += sum(raw.max_score > FOUND for raw in raws)
        total += len(raws)
    text = f"the base finds {count} of {total} concepts that it knows and bundled pictures show"
    return text, evidence_if(count < KNOWN_SHARE * total, "blank_base", 1.0, text)


def _known_pictures():
    """List (path, words): bundled pictures and what the embedded base knows in them."""
    records = read_split(WALL_CRACKS, "test").records
    pictures = [(record.path, sorted(record.contents)) for record in records if record.contents]
    return pictures[:KNOWN_PICTURES]


@gate(BASE_GATES, "port", "equals transformers' Sam3Model, autocast off")
@torch.no_grad()
def _port_agrees(examination):
    leaked = [name for name in {"cpu", examination.device.type} if torch.is_autocast_enabled(name)]
    if leaked:
        text = f"autocast is on outside of training, on {', '.join(leaked)}"
        return text, [Evidence("port_divergence", 1.0, text)]
    model, processor = examination.base
    if base_dtype(examination.config.training.mixed_precision) != torch.float32:
        model, processor = examination.fresh_base(torch.float32)  # as the tolerance is
    path, nouns = _known_pictures()[0]
    tokens = PromptCollator(processor).tokenize(["crack", nouns[0]])
    tokens = {name: tensor.to(model.device) for name, tensor in tokens.items()}
    pixels = processor.image_processor(images=Image.open(path), return_tensors="pt")
    pixels = pixels["pixel_values"].to(model.device)
    index = torch.zeros(2, dtype=torch.long, device=model.device)
    ours = model(pixel_values=pixels, image_index=index, **tokens)
    tokens |= model.geometry_inputs(2)
    plain = Sam3Model.forward(model, pixel_values=pixels.repeat(2, 1, 1, 1), **tokens)
    names = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks")
    largest, shown = _largest_gap(ours, plain, names)
    text = f"largest difference to transformers' Sam3Model: {shown}"
    return text, evidence_if(largest > PORT_TOLERANCE, "port_divergence", 1.0, text)


def _largest_gap(tensors, others, names):
    """Return the largest absolute difference of equally named tensors, and text for each name."""
    gaps = {name: float((tensors[name] - others[name]).abs().max()) for name in names}
    shown = ", ".join(f"{name} {gap:.2g}" for name, gap in gaps.items())
    return max(gaps.values(), default=0.0), shown


@gate(CHECKPOINT_GATES, "base of the run", "the one that was trained on")
def _base_is_the_same(examination):
    recorded = read_json(examination.folder / BASE_FILE, fix="train again")["fingerprint"]
    now = base_fingerprint(examination.base[0])
    text = f"fingerprint of the base: {now}, of the base the adapter was saved from: {recorded}"
    counts = examination.files.metrics.get("trained_parameters", {"all": 0, "lora": 0})
    cause = "base_not_frozen" if counts["all"] > counts["lora"] else "blank_base"
    return text, evidence_if(now != recorded, cause, 0.7, text)


@gate(CHECKPOINT_GATES, "keys of the adapter", "each names a module of the base")
def _keys_fit(examination):
    weights = examination.adapter_weights
    modules = {name for name, _ in examination.base[0].named_modules()}
    lost = [
        key
        for key in weights
        if key.removeprefix("base_model.model.").partition(".lora_")[0] not in modules
    ]
    text = f"{len(lost)} of {len(weights)} keys of the adapter file name no module of the base"
    if lost:
        return text, [Evidence("adapter_keys", 1.0, f"{text}, for example {lost[0]}")]
    try:
        _ = examination.loaded
    except InputError as error:
        is_config = str(error.where).endswith(CONFIG_FILE)
        if _base_is_the_same(examination)[1] or is_config:
            raise  # other gates name that
        return text, [Evidence("adapter_keys", 0.9, f"the adapter cannot be loaded: {error}")]
    return text, []


@gate(CHECKPOINT_GATES, "weights in memory", "equal to the file")
def _weights_are_in_memory(examination):
    weights = examination.adapter_weights
    memory = get_peft_model_state_dict(examination.loaded.model, save_embedding_layers=False)
    differing = [
        name
        for name, tensor in weights.items()
        if name not in memory or not torch.equal(memory[name].detach().cpu(), tensor)
    ]
    in_file, in_memory = (
        sum(float(tensor.float().norm()) for name, tensor in tensors.items() if ".lora_B" in name)
        for tensors in (weights, memory)
    )
    text = f"{len(differing)} of {len(weights)} tensors differ between file and model; sum of the "
    text += f"norms of B {in_file:.3g} in the file, {in_memory:.3g} in the model"
    if not in_file:
        return text, [Evidence("adapter_at_zero", 1.0, f"every B in the file is zero: {text}")]
    return text, evidence_if(differing, "weights_not_loaded", 1.0, text)


@gate(CHECKPOINT_GATES, "saved adapter", "as trained, with alpha / rank of the config")
def _saved_as_trained(examination):
    run, lora = examination.files, examination.config.lora
    saved = read_json(run.folder / CONFIG_FILE, fix="train again")
    text = f"alpha / rank is {saved['lora_alpha']:g} / {saved['r']} in the adapter, "
    text += f"{lora.alpha:g} / {lora.rank} in the config"
    is_scaled = saved["lora_alpha"] / saved["r"] != lora.alpha / lora.rank
    evidence = evidence_if(is_scaled, "merge_changed_outputs", 1.0, text)
    step = run.metrics["best_step"] or run.metrics["steps"]
    checkpoint = run.folder / CHECKPOINTS / f"checkpoint-{step}"
    if (checkpoint / WEIGHTS_FILE).is_file():
        weights, others = examination.adapter_weights, read_adapter_weights(checkpoint)
        shared = weights.keys() & others.keys()
        gap, _ = _largest_gap(weights, others, shared)
        text += f"; largest difference to {checkpoint.name}: {gap:.2g}"
        evidence += evidence_if(gap, "merge_changed_outputs", 1.0, text)
    return text, evidence


@gate(CHECKPOINT_GATES, "effect of the adapter", "outputs differ from the base")
@torch.no_grad()
def _adapter_has_an_effect(examination):
    run, words = examination.loaded, examination.words
    if any(one.cause == "weights_not_loaded" for one in _weights_are_in_memory(examination)[1]):
        raise InputError("the saved weights are not in the model, so it cannot show their effect")
    picture = open_upright(examination.sample[0].path)
    batch = {
        **run.processor.image_processor(images=picture, return_tensors="pt"),
        **PromptCollator(run.processor).tokenize(words),
        "image_index": torch.zeros(len(words), dtype=torch.long),
    }
    batch = model_inputs(batch, examination.device)
    adapted = run.model(**batch)
    with run.model.disable_adapter():
        plain = run.model(**batch)
    names = ("pred_logits", "presence_logits", "pred_masks")
    largest, shown = _largest_gap(adapted, plain, names)
    text = f"largest difference that the adapter makes: {shown}"
    return text, evidence_if(not largest, "adapter_at_zero", 1.0, text)


@gate(CHECKPOINT_GATES, "results after loading", "equal to the recorded ones")
def results_are_kept(examination):
    """Validate the reloaded run again; compare with what it recorded when it was saved."""
    if not examination.is_own_data:
        raise Inapplicable("another dataset than that of the run is examined")
    config, recorded = examination.config, examination.files.metrics["valid"]
    run, precision = examination.loaded, config.training.mixed_precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(examination.device.type, dtype, enabled=precision != "no"):
        queries = predict_split(
            run.model,
            run.processor,
            examination.split("valid"),
            prompt=config.data.prompt,
            absent_prompts=config.evaluation.absent_prompts,
            mask_threshold=config.evaluation.mask_threshold,
        )
    now = evaluate_queries(queries, config.evaluation.score_threshold)
    names = [name for name in PARITY if None not in (recorded.get(name), now.get(name))]
    if not names:
        raise InputError("the run recorded none of the metrics", where=examination.folder)
    text = "; ".join(f"{name} {recorded[name]:.4f} recorded, {now[name]:.4f} now" for name in names)
    is_lost = any(abs(now[name] - recorded[name]) > PARITY[name] for name in names)
    # Indirect: whatever else is wrong with data, base or adapter changes the results too.
    return text, evidence_if(is_lost, "merge_changed_outputs", 0.9, text, is_direct=False)
