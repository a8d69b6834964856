"""All faults of the laboratory by name; see `helpers.planting` for what a fault is.

They lie where they live: in files and prompts (`helpers.faults_data`), in the code of the pipeline
(`helpers.faults_code`), in what a run leaves (`helpers.faults_checkpoint`), in the course of the
training (`helpers.faults_training`). No other part of the package knows of them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import torch
from safetensors.torch import save_file
from torchvision.ops import box_convert
from transformers import Sam3Model

from helpers.causes import CAUSES, LEFT_OUT
from helpers.data import coco as annotations
from helpers.data import coco as coco_entries
from helpers.data import dataset as targets
from helpers.data.masks import clip_box
from helpers.detect import detections
from helpers.detect import metrics as evaluation
from helpers.detect import queries as prediction_queries
from helpers.files import read_json, write_json
from helpers.lab import spoil as wrong_reader
from helpers.lab.planting import Fault, replaced, replaced_method
from helpers.lab.spoil import (
    KEEP_EVERY,
    SHRINK,
    boxes_as_corners,
    boxes_as_fractions,
    cut_image_off,
    halve_masks,
    in_every_file,
    leave_most_out,
    mark_as_crowd,
    number_from_zero,
    orient_images,
    remove_half,
    remove_objects,
    rename_images,
    rename_key,
    shrink_all,
    thin_boxes,
    turn_images,
)
from helpers.model import lora as adapter_targets
from helpers.model import lora as adapters
from helpers.model import losses, matching, sam3
from helpers.model import losses as loss_terms
from helpers.model import prompted as prompted_sam3
from helpers.model.lora import CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from helpers.model.prompted import base_of
from helpers.train import trainer
from helpers.train.trainer import Sam3Trainer

SHORT = ("scale.num_epochs=0.04",)
"""Two epochs of the 50 that the config asks for: enough for what is counted, not learned."""


def _targets_changed(change):
    """Return a patch that lets ``change`` modify the targets of each query."""

    @contextmanager
    def patch():
        original = targets.object_targets

        def object_targets(*args):
            return change(original(*args))

        with replaced("data.dataset.object_targets", object_targets):
            yield

    return patch


def _without_masks(made):
    lost = {name: torch.zeros_like(made[name]) for name in ("masks", "mask_valid")}
    return made | lost


def _without_objects(made):
    return {name: values[:0] for name, values in made.items()}


def _with_corners(made):
    return made | {"boxes_cxcywh": box_convert(made["boxes_cxcywh"], "cxcywh", "xyxy")}


def _with_nan(made):
    return made | {"boxes_cxcywh": made["boxes_cxcywh"] * float("nan")}


@contextmanager
def _wrong_keys():
    """Put the reader of the failing script in the place of ours, on which it builds."""
    right = annotations.read_split
    with (
        replaced("data.coco.read_split", wrong_reader.read_split_wrong_keys),
        replaced_method(wrong_reader, "read_split", right),
    ):
        yield


DATA_FAULTS = {
    "wrong keys": Fault(
        "no_objects",
        "objects are looked up under JSON keys that nobody writes, and a missing key is no error",
        "no error; box and mask terms of the loss are 0; every score falls to 0.000",
        settings=SHORT,
        patch=_wrong_keys,
    ),
    "empty lists": Fault(
        "no_objects",
        "the list of objects is empty in every file",
        "the same, and a look into the files shows it",
        settings=SHORT,
        spoil_data=in_every_file(remove_objects),
    ),
    "masks swallowed": Fault(
        "masks_lost",
        "an error while decoding masks is swallowed: boxes stay, masks are zero",
        "boxes are found, their masks stay empty or shapeless; the mask terms of the loss are 0",
        settings=SHORT,
        patch=_targets_changed(_without_masks),
    ),
    "all crowd": Fault(
        "objects_filtered",
        "iscrowd is 1 on every object, as some tools write for run lengths",
        "the files are full, and no object reaches the loss",
        settings=SHORT,
        spoil_data=in_every_file(mark_as_crowd),
    ),
    "emptied by a transform": Fault(
        "objects_filtered",
        "a transform after loading drops the objects and leaves their prompt in the batch",
        "presence falls on the very images that show the object",
        settings=SHORT,
        patch=_targets_changed(_without_objects),
    ),
    "corners in the file": Fault(
        "boxes_off_masks",
        "boxes are written as [x0, y0, x1, y1] where [x, y, width, height] is read",
        "the loss looks sane, boxes reach too far right and down",
        settings=SHORT,
        spoil_data=in_every_file(boxes_as_corners),
    ),
    "YOLO boxes": Fault(
        "boxes_off_masks",
        "boxes are centres and sizes as fractions of the image, as YOLO writes them",
        "boxes shrink into the upper left corner",
        settings=SHORT,
        spoil_data=in_every_file(boxes_as_fractions),
    ),
    "corners as targets": Fault(
        "wrong_box_targets",
        "the dataset gives corners where the loss expects centre and size, all within [0, 1]",
        "the loss looks sane, boxes deviate, box AP stays low while masks are right",
        settings=SHORT,
        patch=_targets_changed(_with_corners),
    ),
    "images turned": Fault(
        "annotations_off_image",
        "images were turned by 90 degrees after they had been annotated",
        "objects are found where nothing is, or not at all; every number in the files is sane",
        settings=SHORT,
        spoil_data=turn_images,
    ),
    "orientation ignored": Fault(
        "annotations_off_image",
        "images carry an EXIF orientation that the annotation tool ignored",
        "the same; a viewer shows the images turned",
        settings=SHORT,
        spoil_data=orient_images,
    ),
    "thin boxes": Fault(
        "not_finite",
        "every box is a fifth of a pixel wide",
        "GIoU divides by almost nothing; boxes collapse to lines",
        settings=SHORT,
        spoil_data=in_every_file(thin_boxes),
    ),
    "NaN targets": Fault(
        "not_finite",
        "boxes are divided by a width of 0, which gives NaN",
        "the training stops at the first batch, or goes on with a loss of NaN",
        settings=SHORT,
        patch=_targets_changed(_with_nan),
    ),
    "images renamed": Fault(
        "unreadable_data",
        "an upload renamed the images, the annotations name the old files",
        "the training does not start, or every image is skipped silently",
        spoil_data=rename_images,
        trains=False,
    ),
    "image cut off": Fault(
        "unreadable_data",
        "one image file was not copied to its end",
        "the training stops in the middle of an epoch",
        spoil_data=cut_image_off,
        trains=False,
    ),
    "ids from zero": Fault(
        "unreadable_data",
        "objects number the categories from 0, the table from 1",
        "the training does not start, or every object has the name of another category",
        spoil_data=in_every_file(number_from_zero),
        trains=False,
    ),
    "key renamed": Fault(
        "unreadable_data",
        "the list of objects is called 'objects' and not 'annotations'",
        "the training does not start, or sees no object at all",
        spoil_data=in_every_file(rename_key),
        trains=False,
    ),
    "masks at half size": Fault(
        "unreadable_data",
        "masks were drawn on a copy of half the size",
        "no mask fits its image, no outline is learned",
        settings=SHORT,
        spoil_data=in_every_file(halve_masks),
    ),
    "half the labels": Fault(
        "labels_missing",
        "every second object was not annotated, in all splits",
        "scores stay around a half, where the object is annotated and where it is not",
        spoil_data=in_every_file(remove_half),
    ),
    "seen from afar": Fault(
        "tiny_objects",
        f"every picture is {SHRINK} times smaller, on a plain wall",
        "no score rises; the objects are less than two cells of the mask grid wide",
        settings=SHORT,
        spoil_data=shrink_all,
    ),
    "hardly any object": Fault(
        "mostly_empty",
        f"of the training images with objects one in {KEEP_EVERY} is kept, of those without all",
        "presence stays low everywhere",
        spoil_data=leave_most_out,
    ),
}
"""Name to fault."""


SECOND_NAME, SHORT_PX = "fissure", 146
"""A second category for a dataset of one: cracks whose longer side is below so many pixels."""
DEFAULT_RATE = 5e-5
"""What `transformers.TrainingArguments` takes if no learning rate is passed."""


def _add_category(name, parent="none"):
    """Return a change of annotation files: a category without objects, perhaps a parent."""

    def change(content):
        ids = [category["id"] for category in content["categories"]]
        for category in content["categories"]:
            category["supercategory"] = name if parent == "root" else category["supercategory"]
        content["categories"].append({"id": max(ids) + 1, "name": name, "supercategory": "none"})

    return change


def _split_category(content):
    """Call the short ones among the objects by another name."""
    [category] = content["categories"]
    second = category | {"id": category["id"] + 1, "name": SECOND_NAME}
    content["categories"].append(second)
    for entry in content["annotations"]:
        if max(entry["bbox"][2:]) < SHORT_PX:
            entry["category_id"] = second["id"]


def _drop_empty_images(folder):
    """Leave out the images without objects; one layout is enough for that."""

    def change(content):
        shown = {entry["image_id"] for entry in content["annotations"]}
        content["images"] = [image for image in content["images"] if image["id"] in shown]

    for path in sorted(folder.glob("*/annotations")):
        shutil.rmtree(path)
    in_every_file(change)(folder)


def _names_compared_exactly():
    """Let two nouns exclude each other only where they are the same to the letter."""
    return replaced("data.prompts.nouns_overlap", lambda first, second: first == second)


@contextmanager
def _roots_asked():
    """Ask for every category of the table, parents without objects too."""
    original = annotations.read_split

    def read_split(*args, **kwargs):
        split = original(*args, **kwargs)
        names = dict.fromkeys(entry.name for entry in split.category_table)
        return replace(split, categories=tuple(names))

    with replaced("data.coco.read_split", read_split), _names_compared_exactly():
        yield


def _mode_category(record, categories, prompt=None):
    """Give all objects of an image to the category that most of them have."""
    usable = [
        item
        for item in record.objects
        if clip_box(item.box_xyxy, record.width, record.height) is not None
    ]
    counts = Counter(item.category for item in usable)
    return {counts.most_common(1)[0][0]: usable} if usable else {}


@contextmanager
def _contents_ignored():
    """Read images without what else is in the picture."""
    original = coco_entries.image_record

    def image_record(*args):
        return replace(original(*args), contents=frozenset())

    with replaced("data.coco.image_record", image_record):
        yield


@contextmanager
def _schedule_ignored():
    """Leave learning rate, warm-up and accumulation at the defaults of the library."""
    original = trainer.training_arguments

    def training_arguments(config, folder):
        arguments = original(config, folder)
        arguments.learning_rate, arguments.warmup_steps = DEFAULT_RATE, 0
        arguments.gradient_accumulation_steps = 1
        return arguments

    with replaced("train.trainer.training_arguments", training_arguments):
        yield


PROMPT_FAULTS = {
    "root category": Fault(
        "category_names",
        "a parent category without objects, as Roboflow adds, is asked as absent on every image",
        "the plural of the object's own name stops working, then the name itself",
        settings=SHORT,
        spoil_data=in_every_file(_add_category("cracks", parent="root")),
        patch=_roots_asked,
    ),
    "two spellings": Fault(
        "category_names",
        "'cracks' is in the table beside 'crack', and names are compared letter by letter",
        "'cracks' is trained as absent on pictures of cracks; both words weaken",
        settings=SHORT,
        spoil_data=in_every_file(_add_category("cracks")),
        patch=_names_compared_exactly,
    ),
    "one prompt for all": Fault(
        "merged_categories",
        "all objects of an image are given to its most frequent category",
        "the rarer category is never found, or under the name of the other",
        settings=SHORT,
        spoil_data=in_every_file(_split_category),
        patch=lambda: replaced("data.prompts.present_prompts", _mode_category),
    ),
    "no absent prompts": Fault(
        "only_positive_prompts",
        "every prompt of the training has objects",
        "any word finds the trained object",
        settings=(*SHORT, "data.num_negatives=0"),
        spoil_data=_drop_empty_images,
    ),
    "contents ignored": Fault(
        "present_negatives",
        "absent prompts are drawn without looking at what is in the picture",
        "words the base knew are found less and less",
        settings=(
            *SHORT,
            "data.negative_prompts=[stain, rust, moss, hole, bolt, tile, brick, marking, tape, joint]",
        ),
        patch=_contents_ignored,
    ),
    "trained as object": Fault(
        "other_training_prompt",
        "the training asks for 'object', the use for the category",
        "good metrics for 'object', nothing for the category's name",
        settings=(*SHORT, "data.prompt=object"),
    ),
    "dropout of a half": Fault(
        "extreme_regularisation",
        "half of the input of LoRA is left out at random",
        "the training loss stays high, scores stay low",
        settings=(*SHORT, "lora.dropout=0.5"),
    ),
    "schedule ignored": Fault(
        "dead_config_keys",
        "learning rate, warm-up and accumulation of the config are not passed on",
        "changing them in the config changes nothing",
        settings=(*SHORT, "training.gradient_accumulation_steps=2"),
        patch=_schedule_ignored,
    ),
}
"""Name to fault."""


ONE_EPOCH, THREE_EPOCHS = ("scale.num_epochs=0.02",), ("scale.num_epochs=0.06",)
"""Of the 50 epochs that the config asks for."""
COARSE_STEP = 0.1


@contextmanager
def _flag_without_effect():
    original = adapter_targets.enabled_components

    def enabled_components(lora):
        return [name for name in original(lora) if name != "text_encoder"]

    with replaced("model.lora.enabled_components", enabled_components):
        yield


@contextmanager
def _names_of_another_model():
    pattern, modules = adapter_targets.target_pattern, adapter_targets.target_modules

    def only_mlp(lora):
        return lora.model_copy(update={"target_modules": ("fc1", "fc2")})

    with (
        replaced("model.lora.enabled_components", lambda lora: ["vision_encoder"]),
        replaced("model.lora.target_pattern", lambda lora: pattern(only_mlp(lora))),
        replaced("model.lora.target_modules", lambda model, lora: modules(model, only_mlp(lora))),
    ):
        yield


def _requires_grad_changed(change):
    """Return a patch that calls ``change(name, parameter)`` after LoRA was put on."""

    @contextmanager
    def patch():
        original = adapters.add_lora

        def add_lora(model, lora):
            peft_model = original(model, lora)
            for name, parameter in peft_model.named_parameters():
                change(name, parameter)
            return peft_model

        with replaced("model.lora.add_lora", add_lora):
            yield

    return patch


def _freeze_b(name, parameter):
    if ".lora_B" in name:
        parameter.requires_grad_(False)


@contextmanager
def _text_features_detached():
    original = Sam3Model.get_text_features

    def get_text_features(self, *args, **kwargs):
        features = original(self, *args, **kwargs)
        features.pooler_output = features.pooler_output.detach()
        return features

    with replaced_method(Sam3Model, "get_text_features", get_text_features):
        yield


@contextmanager
def _loader_without_effect():
    with replaced("model.lora.load_adapter_weights", lambda model, weights, where: None):
        yield


@contextmanager
def _emptiest_state_kept():
    original = trainer.Sam3Trainer.evaluate

    def evaluate(self, *args, **kwargs):
        metrics = original(self, *args, **kwargs)
        return metrics | {"eval_selection": 1 - metrics["eval_max_score_present"]}

    with replaced_method(trainer.Sam3Trainer, "evaluate", evaluate):
        yield


def _rename_keys(rename):
    """Return what renames the keys in the adapter file of a run."""

    def spoil_run(run):
        weights = {rename(key): tensor for key, tensor in read_adapter_weights(run).items()}
        save_file(weights, run / WEIGHTS_FILE, metadata={"format": "pt"})

    return spoil_run


def _round_weights(run):
    """Save the adapter with few distinct values."""
    weights = {
        key: (tensor / COARSE_STEP).round() * COARSE_STEP
        for key, tensor in read_adapter_weights(run).items()
    }
    save_file(weights, run / WEIGHTS_FILE, metadata={"format": "pt"})


def _halve_alpha(run):
    """Save the adapter with half of its scale."""
    config = read_json(run / CONFIG_FILE, fix="")
    write_json(run / CONFIG_FILE, config | {"lora_alpha": config["lora_alpha"] / 2})


CHECKPOINT_FAULTS = {
    "flag without effect": Fault(
        "lora_elsewhere",
        "apply_to_text_encoder is true, but no module of the text encoder gets LoRA",
        "as many parameters are trained as with the flag off; the new word stays unknown",
        settings=ONE_EPOCH,
        patch=_flag_without_effect,
    ),
    "names of another model": Fault(
        "lora_elsewhere",
        "the target names match nothing but the MLPs of the vision encoder",
        "a fraction of the parameters is trained; the new word stays unknown",
        settings=ONE_EPOCH,
        patch=_names_of_another_model,
    ),
    "lora b frozen": Fault(
        "adapter_at_zero",
        "lora_B receives no gradient and stays zero",
        "outputs are those of the base, bit by bit; the loss does not fall",
        settings=ONE_EPOCH,
        patch=_requires_grad_changed(_freeze_b),
    ),
    "text features detached": Fault(
        "adapter_at_zero",
        "the text features are detached, so the LoRA of the text encoder receives no gradient",
        "the loss falls because other components learn; every B of the text encoder is zero",
        settings=ONE_EPOCH,
        patch=_text_features_detached,
    ),
    "base unfrozen": Fault(
        "base_not_frozen",
        "all weights of the base are trained besides LoRA",
        "good validation in training, another model after loading the adapter",
        settings=ONE_EPOCH,
        patch=_requires_grad_changed(lambda name, parameter: parameter.requires_grad_(True)),
    ),
    "loader without effect": Fault(
        "weights_not_loaded",
        "the loader loads nothing and says nothing",
        "good validation in training, the answers of the base afterwards: nothing is detected",
        patch=_loader_without_effect,
        trains=False,
    ),
    "keys with prefix": Fault(
        "adapter_keys",
        "the adapter was saved from a wrapped model, its keys begin with 'module.'",
        "the adapter cannot be loaded, or loads nothing where missing keys are only warned of",
        spoil_run=_rename_keys(lambda key: f"module.{key}"),
        trains=False,
    ),
    "keys of another version": Fault(
        "adapter_keys",
        "another version calls the mask decoder mask_head",
        "the adapter cannot be loaded, or loads in part where missing keys are only warned of",
        spoil_run=_rename_keys(lambda key: key.replace("mask_decoder", "mask_head")),
        trains=False,
    ),
    "alpha halved": Fault(
        "merge_changed_outputs",
        "the saved adapter is applied with half of its scale",
        "scores are lower than in the training's validation, though nothing was retrained",
        spoil_run=_halve_alpha,
        trains=False,
    ),
    "weights rounded": Fault(
        "merge_changed_outputs",
        f"the adapter was saved with weights rounded to steps of {COARSE_STEP}",
        "other detections than in the training's validation, though nothing was retrained",
        spoil_run=_round_weights,
        trains=False,
    ),
    "emptiest state kept": Fault(
        "wrong_checkpoint",
        "the state with the lowest scores is kept, as a loss without objects would choose",
        "the log shows a better state than the one that was kept",
        settings=THREE_EPOCHS,
        patch=_emptiest_state_kept,
    ),
}


DEEP = -30.0
"""Presence logit; the clamp is at -10."""


def scores_without_gradient():
    """Let boxes and masks learn while the scores stay what they are.

    Returns
    -------
    contextlib.AbstractContextManager
        Detaches query and presence logits between the model and a loss that is left as it is.
    """
    original = Sam3Trainer._terms
    names = ("pred_logits", "presence_logits")

    def _terms(self, outputs, targets, *args, **kwargs):
        for layer in (outputs, *outputs["aux"]):
            for name in names:
                layer[name] = layer[name].detach()
        return original(self, outputs, targets, *args, **kwargs)

    return replaced_method(Sam3Trainer, "_terms", _terms)


def presence_pushed_down():
    """Pull the presence logit to `DEEP`, far below its clamp, whatever the picture shows.

    Returns
    -------
    contextlib.AbstractContextManager
        Adds a gradient to the loss of a batch and leaves its value as it is.
    """
    original = Sam3Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        raw_logits = []
        head = base_of(self.model).detr_decoder.presence_head
        handle = head.register_forward_hook(lambda *call: raw_logits.append(call[-1]))
        try:
            loss = original(self, model, inputs, *args, **kwargs)
        finally:
            handle.remove()
        push = 100 * sum(torch.relu(logits - DEEP).mean() for logits in raw_logits)
        return loss + push - push.detach()

    return replaced_method(Sam3Trainer, "compute_loss", compute_loss)


TRAINING_FAULTS = {
    "trained far too hard": Fault(
        "overtrained",
        "trains with a learning rate five times too high that never decays",
        "the update outgrows the weights of the base; the validation score peaks early or never",
        settings=(
            "scale.learning_rate=150.0",
            "training.lr_scheduler=constant",
            "training.num_epochs=15",
        ),
    ),
    "words run together": Fault(
        "text_distorted",
        "tunes the text encoder alone, with a learning rate twenty times too high",
        "all words come to mean the same, so either all are found or none is",
        settings=(
            "lora.apply_to_vision_encoder=false",
            "lora.apply_to_mask_decoder=false",
            "scale.learning_rate=600.0",
            "training.num_epochs=10",
        ),
    ),
    "presence at its clamp": Fault(
        "at_clamp",
        "lets training push presence down where the clamp hides it, as where a loss has no clamp",
        "presence is exactly -10 for every word and picture; training on changes nothing",
        patch=presence_pushed_down,
        settings=("training.num_epochs=10",),
    ),
    "scores held back": Fault(
        "low_confidence",
        "gives boxes and masks a gradient, but not the scores",
        "the best boxes lie on the objects, with scores far below any threshold",
        patch=scores_without_gradient,
        settings=("training.num_epochs=20",),
    ),
}
"""Name to fault."""


REWARDED_QUERIES = 4
SHORT = ("scale.num_epochs=0.04",)
"""Two epochs of the 50 that the config asks for."""


def _weights_changed(change):
    """Return a patch that adds the terms up with other weights."""

    @contextmanager
    def patch():
        original = losses.weighted_sum

        def weighted_sum(terms, weights):
            return original(terms, change(weights))

        with replaced("model.losses.weighted_sum", weighted_sum):
            yield

    return patch


@contextmanager
def _sum_instead_of_mean():
    original = loss_terms.loss_divisors

    def loss_divisors(*args, **kwargs):
        return original(*args, **kwargs)._replace(boxes=1.0)

    with replaced("model.losses.loss_divisors", loss_divisors):
        yield


@contextmanager
def _double_sigmoid():
    original = loss_terms.score_terms

    def score_terms(pred_logits, *args, **kwargs):
        return original(pred_logits.sigmoid(), *args, **kwargs)

    with replaced("model.losses.score_terms", score_terms):
        yield


@contextmanager
def _several_queries_per_object():
    original = matching.hungarian_match

    def hungarian_match(outputs, targets):
        repeated = [
            {"boxes_cxcywh": target["boxes_cxcywh"].repeat(REWARDED_QUERIES, 1)}
            for target in targets
        ]
        counts = [max(len(target["boxes_cxcywh"]), 1) for target in targets]
        pairs = zip(original(outputs, repeated), counts, strict=True)
        return [(query_idx, target_idx % count) for (query_idx, target_idx), count in pairs]

    with replaced("model.matching.hungarian_match", hungarian_match):
        yield


@contextmanager
def _presence_forgotten():
    scores = property(lambda raw: raw.query_prob)
    with replaced_method(detections.RawPrediction, "scores", scores):
        yield


@contextmanager
def _threshold_literal():
    original = detections.detect

    def detect(raw, score_threshold, mask_threshold=0.5, max_detections=None):
        return original(raw, 0.5, mask_threshold, max_detections)

    with replaced("detect.detections.detect", detect):
        yield


@contextmanager
def _masks_changed(change):
    original = detections.masks_at_image_size

    def masks_at_image_size(mask_logits, height, width, mask_threshold):
        return change(original, mask_logits, height, width, mask_threshold)

    with replaced("detect.detections.masks_at_image_size", masks_at_image_size):
        yield


def _logits_above_probability(original, mask_logits, height, width, mask_threshold):
    """Compare the logit itself with the threshold: 0.5 then cuts at a probability of 0.62."""
    as_probability = float(torch.tensor(mask_threshold).sigmoid())
    return original(mask_logits, height, width, as_probability)


def _at_grid_size(original, mask_logits, height, width, mask_threshold):
    """Leave masks at the size of the model's grid."""
    return original(mask_logits, *mask_logits.shape[-2:], mask_threshold)


@contextmanager
def _answers_to_the_next_question():
    original = prediction_queries.queries_from_outputs

    def queries_from_outputs(outputs, batch, *args, **kwargs):
        names = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks", "semantic_logits")
        moved = {name: outputs[name].roll(1, dims=0) for name in names}
        return original(moved, batch, *args, **kwargs)

    with replaced("detect.queries.queries_from_outputs", queries_from_outputs):
        yield


@contextmanager
def _absent_prompts_dropped():
    original = evaluation.evaluate_queries

    def evaluate_queries(queries, score_threshold):
        asked = [query for query in queries if query.is_positive]
        return original(asked or queries, score_threshold)

    with replaced("detect.metrics.evaluate_queries", evaluate_queries):
        yield


@contextmanager
def _masks_missing_in_validation():
    def queries_from_outputs(outputs, asked, dataset, mask_threshold):
        raise KeyError("masks")

    with replaced("detect.queries.queries_from_outputs", queries_from_outputs):
        yield


@contextmanager
def _finest_level_dropped():
    original = prompted_sam3.repeat_vision_embeds

    def repeat_vision_embeds(vision_embeds, image_index, num_prompts):
        repeated = original(vision_embeds, image_index, num_prompts)
        finest, *others = repeated.fpn_hidden_states
        return replace(repeated, fpn_hidden_states=(torch.zeros_like(finest), *others))

    with replaced("prompted_sam3.repeat_vision_embeds", repeat_vision_embeds):
        yield


@contextmanager
def _autocast_left_on():
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        yield


@contextmanager
def _decoder_zeroed():
    original = sam3.load_base

    def load_base(*args, **kwargs):
        model, processor = original(*args, **kwargs)
        for parameter in model.detr_decoder.parameters():
            torch.nn.init.zeros_(parameter)
        return model, processor

    with replaced("model.sam3.load_base", load_base):
        yield


CODE_FAULTS = {
    "mask weight times 100": Fault(
        "loss_weights",
        "the mask term is weighted 100 times as much as published",
        "the loss falls, the scores stay where they were",
        settings=SHORT,
        patch=_weights_changed(lambda weights: weights | {"loss_mask": 100 * weights["loss_mask"]}),
    ),
    "score weight zero": Fault(
        "loss_weights",
        "the score terms have weight 0",
        "boxes and masks improve, no score ever rises: nothing is detected",
        settings=SHORT,
        patch=_weights_changed(
            lambda weights: weights | dict.fromkeys(("loss_ce", "presence_loss"), 0.0)
        ),
    ),
    "sum instead of mean": Fault(
        "loss_weights",
        "box and mask terms are summed over the objects instead of averaged",
        "the loss is several times as high, and the higher the more objects a batch has",
        settings=SHORT,
        patch=_sum_instead_of_mean,
    ),
    "double sigmoid": Fault(
        "ported_loss",
        "the score loss takes the sigmoid of probabilities",
        "the score term cannot fall, the scores are not calibrated",
        settings=SHORT,
        patch=_double_sigmoid,
    ),
    "several queries per object": Fault(
        "one_to_many_matching",
        f"the matching rewards {REWARDED_QUERIES} queries for each object",
        "more detections lie on a better one, the longer it is trained: 36 % after five epochs, "
        "at most 19 % in healthy runs",
        settings=SHORT,
        patch=_several_queries_per_object,
    ),
    "presence forgotten": Fault(
        "presence_ignored",
        "the score is the query probability alone",
        "absent prompts get high scores; scores differ from those of the training's validation",
        patch=_presence_forgotten,
        trains=False,
    ),
    "threshold literal": Fault(
        "threshold_ignored",
        "detections are cut at 0.5 whatever threshold is asked for",
        "lowering the threshold brings no detection back",
        patch=_threshold_literal,
        trains=False,
    ),
    "mask logits as probabilities": Fault(
        "mask_threshold_on_logits",
        "mask logits are compared with the probability threshold",
        "masks are eroded, thin ones vanish; boxes and scores are right",
        patch=lambda: _masks_changed(_logits_above_probability),
        trains=False,
    ),
    "masks at grid size": Fault(
        "mask_threshold_on_logits",
        "masks stay at the size of the model's grid",
        "the evaluation refuses the masks, or every metric is 0",
        patch=lambda: _masks_changed(_at_grid_size),
        trains=False,
    ),
    "answers to the next question": Fault(
        "evaluation_mismatch",
        "the evaluation takes the answer to a prompt for that to the next one",
        "pictures look right, AP is near 0",
        patch=_answers_to_the_next_question,
        trains=False,
    ),
    "absent prompts dropped": Fault(
        "evaluation_mismatch",
        "the evaluation leaves absent prompts out",
        "metrics look good, but the detector fires on everything",
        patch=_absent_prompts_dropped,
        trains=False,
    ),
    "masks missing in validation": Fault(
        "validation_crash",
        "the validation asks its batch for a key that is not there",
        "the training ends with KeyError: 'masks' after the first epoch",
        settings=("scale.num_epochs=0.02",),
        patch=_masks_missing_in_validation,
    ),
    "finest level dropped": Fault(
        "port_divergence",
        "the finest level of the vision features is lost on the way to the mask decoder",
        "scores are as before, masks are coarse or empty",
        patch=_finest_level_dropped,
        trains=False,
    ),
    "autocast left on": Fault(
        "port_divergence",
        "a notebook cell left autocast on",
        "outputs change in the third digit, in every model of the process",
        patch=_autocast_left_on,
        trains=False,
    ),
    "decoder zeroed": Fault(
        "blank_base",
        "the weights of the base's DETR decoder are all zero",
        "nothing is found, neither with the adapter nor without it",
        patch=_decoder_zeroed,
        trains=False,
    ),
}


FAULTS = DATA_FAULTS | PROMPT_FAULTS | CODE_FAULTS | TRAINING_FAULTS | CHECKPOINT_FAULTS


def faults_frame():
    """Return the faults as a table, in the order of the catalogue.

    Returns
    -------
    pandas.DataFrame
        Index ``row`` and ``fault``; columns ``cause``, ``what``, ``signature``, ``cure``. Rows of
        the catalogue that are left out have no fault and their reason as ``what``.
    """
    rows = [(f.row, name, f.cause, f.what, f.signature, f.cure) for name, f in FAULTS.items()]
    rows += [(row, "", "", reason, "", "") for row, reason in LEFT_OUT.items()]
    columns = ["row", "fault", "cause", "what", "signature", "cure"]
    table = pd.DataFrame(rows, columns=columns)
    order = table["row"].map(lambda row: (int(row.rstrip("b")), row))
    return table.loc[order.sort_values(kind="stable").index].set_index(["row", "fault"])


def rows_covered():
    """Return the rows of the catalogue of which a fault is planted, as a set of texts."""
    return {CAUSES[fault.cause].row for fault in FAULTS.values()}
