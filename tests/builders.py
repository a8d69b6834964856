"""Tiny datasets and a processor without weights, for tests that write to tmp_path.

A dataset is `DATASET`: split -> file name -> list of (category, x, y, width, height). Every object
is a rectangle, so boxes, masks and grids can be checked by hand.
"""

import json
from types import SimpleNamespace

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import Sam3ImageProcessor

from helpers.checks.dataset import check_dataset
from helpers.config import load_config
from helpers.data.dataset import load_dataset
from helpers.files import CONFIGS

WIDTH, HEIGHT = 96, 64
CATEGORIES = ("crack", "joint")
DATASET = {
    "train": {
        "a.png": [("crack", 8, 8, 16, 32)],
        "b.png": [("crack", 40, 4, 12, 40), ("joint", 60, 0, 8, 64)],
        "c.png": [],
        "d.png": [("crack", 10, 10, 20, 20), ("crack", 50, 30, 30, 20)],
    },
    "valid": {"e.png": [("crack", 8, 8, 40, 10)], "f.png": [("joint", 0, 20, 96, 6)]},
    "test": {"g.png": [("crack", 20, 20, 12, 12), ("joint", 50, 0, 8, 64)], "h.png": []},
}


def mask_of(x, y, width, height, size=(HEIGHT, WIDTH)):
    """Return a (height, width) uint8 mask with a filled rectangle."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[y : y + height, x : x + width] = 1
    return mask


def segmentation_of(mask, form):
    """Write a mask as "polygon" (its bounding rectangle), "runs", or "rle"."""
    if form == "polygon":
        rows, columns = np.nonzero(mask)
        x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        return [[int(n) for n in (x0, y0, x1, y0, x1, y1, x0, y1)]]
    if form == "runs":
        flat = np.concatenate([[0], mask.flatten(order="F"), [2]])
        edges = np.flatnonzero(np.diff(flat))
        counts = np.diff(np.concatenate([[0], edges])).tolist()
        return {"size": list(mask.shape), "counts": counts}
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def annotation_of(annotation_id, image_id, category, x, y, width, height, form="polygon"):
    """Return the COCO annotation of a rectangle; a negative width or height is written as it is."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": CATEGORIES.index(category) + 1,
        "bbox": [x, y, width, height],
        "iscrowd": 0,
        "segmentation": segmentation_of(mask_of(x, y, width, height), form),
    }


def coco_of(files, form="polygon"):
    """Return the COCO content of one split."""
    images, annotations = [], []
    for image_id, (file_name, objects) in enumerate(files.items(), start=1):
        images.append({"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT})
        for shape in objects:
            annotations.append(annotation_of(len(annotations) + 1, image_id, *shape, form=form))
    categories = [
        {"id": number, "name": name, "supercategory": "defect"}
        for number, name in enumerate(CATEGORIES, start=1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_image(path, size=(WIDTH, HEIGHT), seed=None, **options):
    """Write a noise image that differs from file to file; options go to Pillow's save."""
    seed = sum(map(ord, path.name)) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_coco(root, dataset=DATASET, form="polygon"):
    """Write the layout with one annotation file per split; returns root."""
    for split, files in dataset.items():
        for file_name in files:
            write_image(root / split / file_name)
        (root / split).mkdir(parents=True, exist_ok=True)
        text = json.dumps(coco_of(files, form))
        (root / split / "_annotations.coco.json").write_text(text, encoding="utf-8")
    return root


def write_per_image(root, dataset=DATASET, form="rle"):
    """Write the layout with one annotation file per image; returns root."""
    for split, files in dataset.items():
        whole = coco_of(files, form)
        folder = root / split / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        for image in whole["images"]:
            path = write_image(root / split / "images" / image["file_name"])
            own = [a for a in whole["annotations"] if a["image_id"] == image["id"]]
            text = json.dumps({**whole, "images": [image], "annotations": own})
            (folder / f"{path.stem}.json").write_text(text, encoding="utf-8")
    return root


def edit_coco(root, split, change):
    """Let change(content) modify the parsed annotation file of a split in place."""
    path = root / split / "_annotations.coco.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


class WordTokenizer:
    """One token per word between a start and an end token, padded but never cut, as SAM3's."""

    def __call__(self, prompts, padding, max_length):
        assert padding == "max_length"
        rows = [[1, *(3 + sum(map(ord, word)) for word in text.split()), 2] for text in prompts]
        return {
            "input_ids": [row + [0] * (max_length - len(row)) for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (max_length - len(row)) for row in rows],
        }


def make_processor():
    """Return what a Sam3Processor is used for here, without a download."""
    return SimpleNamespace(image_processor=Sam3ImageProcessor(), tokenizer=WordTokenizer())


def dataset_at(root, **settings):
    """Open a dataset with the data settings of the crack config, but for those given."""
    config = load_config(CONFIGS / "crack_detection_config.yaml", profile="tiny")
    plain = {"num_negatives": 0, "negative_prompts": (), "prompt": None, "prompts_by_category": {}}
    data = config.data.model_copy(update=plain | settings)
    return load_dataset(config.model_copy(update={"data": data}), root)


def model_of(resolution=56, mask_size=32, num_queries=200):
    """Return what a check reads of a model."""
    decoder = SimpleNamespace(num_queries=num_queries)
    config = SimpleNamespace(detr_decoder_config=decoder)
    return SimpleNamespace(resolution=resolution, mask_size=mask_size, config=config)


def check(root, *, mask_size=32, num_queries=200, **settings):
    """Check a dataset for a model of 56 pixels."""
    model = model_of(mask_size=mask_size, num_queries=num_queries)
    return check_dataset(dataset_at(root, **settings), model, make_processor())
