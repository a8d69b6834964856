"""Faults of the words: which are asked as present or absent, and settings that are not used."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

from helpers import annotations, coco_entries, trainer
from helpers.faults_data import SHORT
from helpers.planting import Fault, replaced
from helpers.prompts import clip_box
from helpers.spoiled_data import in_every_file
from helpers.synthetic import BASE_CONCEPTS

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
    return replaced("nouns.nouns_overlap", lambda first, second: first == second)


@contextmanager
def _roots_asked():
    """Ask for every category of the table, parents without objects too."""
    original = annotations.read_split

    def read_split(*args, **kwargs):
        split = original(*args, **kwargs)
        names = dict.fromkeys(entry.name for entry in split.category_table)
        return replace(split, categories=tuple(names))

    with replaced("annotations.read_split", read_split), _names_compared_exactly():
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

    with replaced("coco_entries.image_record", image_record):
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

    with replaced("trainer.training_arguments", training_arguments):
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
        patch=lambda: replaced("prompts.present_prompts", _mode_category),
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
        settings=(*SHORT, f"data.negative_prompts=[{', '.join(BASE_CONCEPTS)}]"),
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
