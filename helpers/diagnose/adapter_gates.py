"""Gates on the saved adapter: is it in the model, and does it do what the run recorded."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import Sam3Model

from helpers.data import dataset as datasets
from helpers.data import images
from helpers.detect import metrics as evaluation
from helpers.detect import queries as prediction_queries
from helpers.detect.predictor import Predictor
from helpers.diagnose.examination import Evidence, Gate, Inapplicable
from helpers.errors import InputError
from helpers.files import TINY_BASE, WALL_CRACKS, read_json, resolve
from helpers.model import prompted as prompt_rows
from helpers.model.lora import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from helpers.model.sam3 import base_dtype, base_fingerprint
from helpers.train import trainer
from helpers.train.trainer import CHECKPOINTS

PORT_TOLERANCE = 1e-2
"""Largest difference of a logit; measured on the embedded base: 3e-5, in float32 on a CPU."""
KNOWN_PICTURES, KNOWN_SCORE, KNOWN_SHARE = 12, 0.3, 0.8
"""Share of the concepts of so many bundled pictures that the embedded base finds with at least
this score; measured: 18 of 18."""


def validation_runs(examination):
    """Take one validation step with the base, as the trainer does after the first epoch."""
    config, (model, processor) = examination.config, examination.fresh_base()
    split = examination.split("valid")
    some = sorted(split.records, key=lambda record: not record.objects)
    dataset = prediction_queries.evaluation_dataset(
        replace(split, records=(some[0], some[-1])[: len(some)]),
        processor,
        model,
        prompt=config.data.prompt,
        absent_prompts=config.evaluation.absent_prompts,
    )
    with tempfile.TemporaryDirectory() as folder:
        loop = trainer.Sam3Trainer(
            config,
            model=model,
            args=trainer.training_arguments(config, Path(folder)),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=datasets.PromptCollator(processor),
        )
        try:
            metrics = loop.evaluate()
        except InputError:
            raise
        except Exception as error:
            text = f"a validation step raised {type(error).__name__}: {error}"
            return text, [Evidence("validation_crash", 1.0, text)]
    return f"a validation step on 2 images ran, loss {metrics['eval_loss']:.3g}", []


@torch.no_grad()
def port_agrees(examination):
    """Compare the model of this project with the plain `Sam3Model` on the same weights."""
    leaked = [name for name in {"cpu", examination.device.type} if torch.is_autocast_enabled(name)]
    if leaked:
        text = f"autocast is on outside of training, on {', '.join(leaked)}"
        return text, [Evidence("port_divergence", 1.0, text)]
    model, processor = examination.base
    if base_dtype(examination.config.training.mixed_precision) != torch.float32:
        model, processor = examination.fresh_base(torch.float32)  # the tolerance is that of float32
    path, nouns = _known_pictures()[0]
    tokens = datasets.PromptCollator(processor).tokenize(["crack", nouns[0]])
    tokens = {name: tensor.to(model.device) for name, tensor in tokens.items()}
    pixels = processor.image_processor(images=Image.open(path), return_tensors="pt")
    pixels = pixels["pixel_values"].to(model.device)
    index = torch.zeros(2, dtype=torch.long, device=model.device)
    ours = model(pixel_values=pixels, image_index=index, **tokens)
    plain = Sam3Model.forward(model, pixel_values=pixels.repeat(2, 1, 1, 1), **tokens)
    gaps = {
        name: float((ours[name] - plain[name]).abs().max())
        for name in ("pred_logits", "presence_logits", "pred_boxes", "pred_masks")
    }
    text = ", ".join(f"{name} {gap:.1g}" for name, gap in gaps.items())
    text = f"largest difference to transformers' Sam3Model: {text}"
    if max(gaps.values()) <= PORT_TOLERANCE:
        return text, []
    return text, [Evidence("port_divergence", 1.0, text)]


def base_knows_its_concepts(examination):
    """Ask the embedded base for what it knows, on bundled pictures that show it."""
    if resolve(examination.config.model.name) != TINY_BASE:
        raise Inapplicable(
            "no picture with a known answer is bundled for this base",
            where=examination.config.model.name,
            fix="ask it for something that is plainly in one of your pictures",
        )
    predictor, found, asked = Predictor(*examination.base), 0, 0
    for path, nouns in _known_pictures():
        raws = predictor.raw(path, nouns)
        found += sum(raw.query_prob.max() * raw.presence_prob > KNOWN_SCORE for raw in raws)
        asked += len(raws)
    text = f"the base finds {found} of {asked} concepts that it knows and bundled pictures show"
    if found >= KNOWN_SHARE * asked:
        return text, []
    return text, [Evidence("blank_base", 1.0, text)]


def _known_pictures():
    """List bundled pictures and what the embedded base knows in them.

    The file is read here and not by the pipeline's reader, which may be what is wrong.
    """
    folder = WALL_CRACKS / "test"
    described = read_json(folder / "_annotations.coco.json", fix="restore the folder data")
    pictures = [
        (folder / entry["file_name"], sorted(entry["contents"]))
        for entry in described["images"]
        if entry["contents"]
    ]
    return pictures[:KNOWN_PICTURES]


CODE_GATES = (
    Gate("base", "finds what it knows on bundled pictures", base_knows_its_concepts),
    Gate("port", "equals transformers' Sam3Model, autocast off", port_agrees),
    Gate("validation", "one step runs", validation_runs),
)


PARITY = {"max_score_present": 0.01, "max_score_absent": 0.01, "AP50": 0.05}
"""Largest change of a recorded metric after loading. Measured on six healthy runs, on the machine
that trained them: below 1e-4; half of alpha changes them by 0.12, 0.02 and 0.15."""
DUPLICATE_IOU, DUPLICATE_SHARE, LEAST_DETECTIONS = 0.7, 0.5, 8
"""Share of detections, if there are so many, that overlap a better one of the same prompt by more
than the IoU. Measured on six healthy runs: 0.07 to 0.19; with four queries rewarded per object,
after five epochs: 0.36, which the self-test of the matching sees and this gate does not yet."""


def base_is_the_same(examination):
    """Compare the base in memory with the fingerprint of the one that was trained on."""
    path = examination.files.folder / BASE_FILE
    made_for = read_json(path, fix="train again")["fingerprint"]
    now = base_fingerprint(examination.base[0])
    text = f"fingerprint of the base: {now}, of the base the adapter was saved from: {made_for}"
    if now == made_for:
        return text, []
    counted = examination.files.metrics.get("trained_parameters", {"all": 0, "lora": 0})
    was_trained = counted["all"] > counted["lora"]
    return text, [Evidence("base_not_frozen" if was_trained else "blank_base", 0.7, text)]


def keys_fit(examination):
    """Look up in the base every module that the adapter file has weights for."""
    weights = read_adapter_weights(examination.files.folder)
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
        if base_is_the_same(examination)[1]:
            raise
        return text, [Evidence("adapter_keys", 0.9, f"the adapter cannot be loaded: {error}")]
    return text, []


def weights_are_in_memory(examination):
    """Compare every tensor of the adapter file with the model after loading."""
    weights = read_adapter_weights(examination.files.folder)
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
    return text, [Evidence("weights_not_loaded", 1.0, text)] if differing else []


def saved_as_trained(examination):
    """Compare the saved adapter with the checkpoint it was taken from, and its scale."""
    run, lora = examination.files, examination.config.lora
    saved = read_json(run.folder / CONFIG_FILE, fix="train again")
    text = f"alpha / rank is {saved['lora_alpha']:g} / {saved['r']} in the adapter, "
    text += f"{lora.alpha:g} / {lora.rank} in the config"
    evidence = []
    if saved["lora_alpha"] / saved["r"] != lora.alpha / lora.rank:
        evidence.append(Evidence("merge_changed_outputs", 1.0, text))
    step = run.metrics["best_step"] or run.metrics["steps"]
    checkpoint = run.folder / CHECKPOINTS / f"checkpoint-{step}"
    if (checkpoint / WEIGHTS_FILE).is_file():
        gap = _largest_gap(read_adapter_weights(run.folder), read_adapter_weights(checkpoint))
        text += f"; largest difference to {checkpoint.name}: {gap:.2g}"
        if gap:
            evidence.append(Evidence("merge_changed_outputs", 1.0, text))
    return text, evidence


@torch.no_grad()
def adapter_has_an_effect(examination):
    """Switch the adapter off and compare the outputs on one image."""
    run = examination.loaded
    if any(one.cause == "weights_not_loaded" for one in weights_are_in_memory(examination)[1]):
        raise InputError("the saved weights are not in the model, so it cannot show their effect")
    record = examination.sample[0]
    picture = images.open_upright(record.path)
    pixels = run.processor.image_processor(images=picture, return_tensors="pt")
    batch = {
        "pixel_values": pixels["pixel_values"],
        **datasets.PromptCollator(run.processor).tokenize(examination.asked),
        "image_index": torch.zeros(len(examination.asked), dtype=torch.long),
    }
    batch = prompt_rows.model_inputs(batch, next(run.model.parameters()).device)
    names = ("pred_logits", "presence_logits", "pred_masks")
    adapted = run.model(**batch)
    with run.model.disable_adapter():
        plain = run.model(**batch)
    gaps = {name: float((adapted[name] - plain[name]).abs().max()) for name in names}
    text = ", ".join(f"{name} {gap:.2g}" for name, gap in gaps.items())
    text = f"largest difference that the adapter makes: {text}"
    return text, [] if any(gaps.values()) else [Evidence("adapter_at_zero", 1.0, text)]


def results_are_kept(examination):
    """Validate the reloaded run again; compare with what it recorded when it was saved."""
    if examination.data_dir != resolve(examination.config.data.data_dir):
        raise Inapplicable("another dataset than that of the run is examined")
    config, recorded = examination.config, examination.files.metrics["valid"]
    device = next(examination.loaded.model.parameters()).device
    precision = config.training.mixed_precision
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        queries = prediction_queries.predict_split(
            examination.loaded.model,
            examination.loaded.processor,
            examination.split("valid"),
            prompt=config.data.prompt,
            absent_prompts=config.evaluation.absent_prompts,
            mask_threshold=config.evaluation.mask_threshold,
            batch_size=config.training.batch_size,
        )
    now = evaluation.evaluate_queries(queries, config.evaluation.score_threshold)
    shown, gaps = [], {}
    for name in PARITY:
        if recorded.get(name) is not None and now.get(name) is not None:
            gaps[name] = abs(now[name] - recorded[name])
            shown.append(f"{name} {recorded[name]:.4f} recorded, {now[name]:.4f} now")
    text = "; ".join(shown)
    lost = any(gap > PARITY[name] for name, gap in gaps.items())
    # Indirect: whatever else is wrong with data, base or adapter changes the results too.
    return text, [Evidence("merge_changed_outputs", 0.9, text, is_direct=False)] if lost else []


def objects_are_found_once(examination):
    """Count detections that lie on a better one of the same prompt and image."""
    threshold, found, doubles = examination.config.evaluation.score_threshold, 0, 0
    for query in examination.queries:
        kept = query.rles(threshold)
        found += len(kept)
        if len(kept) > 1:
            ious = np.triu(coco_mask.iou(kept, kept, [0] * len(kept)), k=1)
            doubles += int((ious > DUPLICATE_IOU).any(axis=0).sum())
    objects = sum(len(query.gt) for query in examination.queries)
    text = f"{doubles} of {found} detections lie on a better one (IoU above {DUPLICATE_IOU:g}); "
    text += f"{objects} objects"
    if found < LEAST_DETECTIONS or doubles <= DUPLICATE_SHARE * found:
        return text, []
    return text, [Evidence("one_to_many_matching", 0.8, text, is_direct=False)]


def _largest_gap(weights, others):
    """Return the largest difference between equally named tensors; 0 if no name is shared."""
    shared = weights.keys() & others.keys()
    return max((float((weights[key] - others[key]).abs().max()) for key in shared), default=0.0)


CHECKPOINT_GATES = (
    Gate("base of the run", "the one that was trained on", base_is_the_same),
    Gate("keys of the adapter", "each names a module of the base", keys_fit),
    Gate("weights in memory", "equal to the file", weights_are_in_memory),
    Gate("saved adapter", "as trained, with alpha / rank of the config", saved_as_trained),
    Gate("effect of the adapter", "outputs differ from the base", adapter_has_an_effect),
    Gate("results after loading", "equal to the recorded ones", results_are_kept),
    Gate("duplicates", "each object is found once", objects_are_found_once),
)
