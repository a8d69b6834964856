"""What lessons 01, 04 and 07 need besides the pipeline: broken copies, a silent detector, a photograph."""

import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from helpers.convert.conversion import convert, read_source
from helpers.data.coco import SPLIT_FOLDERS
from helpers.data.images import open_upright, upright_size
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.data.records import ImageRecord
from helpers.detect.queries import as_queries
from helpers.errors import InputError
from helpers.files import resolve, write_json
from helpers.lab.spoil import JPEG_QUALITY, SPOIL_DATA
from helpers.model.losses import WEIGHTS, sam3_losses
from helpers.model.prompted import (
    PRESENCE_LOGIT_CLAMP,
    SCORE_LOGIT_CLAMP,
    loss_inputs,
    model_inputs,
)

NUM_IMAGES = 8  # of a copy


def write_copy(split, folder, num_images=NUM_IMAGES):
    """Write the first images with objects of a `Split` as a dataset with one split ``train``.

    Returns the folder, replaced if it exists, with one annotation file per image.
    """
    records = [record for record in split.records if record.objects][:num_images]
    if not records:
        fix = "choose a split with annotations"
        raise InputError("no image has an object", where=split.root, fix=fix)
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "annotations"):
        (folder / "train" / name).mkdir(parents=True)
    ids = {entry.name: entry.category_id for entry in split.category_table}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    object_ids = count(1)
    for number, record in enumerate(records, start=1):
        stem = PurePosixPath(record.image_id).with_suffix("").as_posix().replace("/", "_")
        file_name = f"images/{stem}.jpg"
        open_upright(record.path).save(folder / "train" / file_name, quality=JPEG_QUALITY)
        image = {"id": number, "file_name": file_name, "contents": sorted(record.contents)}
        image |= {"width": record.width, "height": record.height}
        entries = []
        for item in record.objects:
            x0, y0, x1, y1 = item.box_xyxy
            entry = {"id": next(object_ids), "image_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            entry |= {"category_id": ids[item.category], "iscrowd": int(item.is_crowd)}
            entries.append(entry if item.rle is None else entry | {"segmentation": dict(item.rle)})
        content = {"images": [image], "categories": categories, "annotations": entries}
        write_json(folder / "train" / "annotations" / f"{stem}.json", content)
    return folder


def write_broken_copy(split, folder, name):
    """Write a copy as `write_copy` does, plant a fault of `SPOIL_DATA` in it, and return the folder."""
    if name not in SPOIL_DATA:
        raise InputError(f"there is no fault {name!r}", fix=f"use one of {', '.join(SPOIL_DATA)}")
    folder = write_copy(split, folder)
    SPOIL_DATA[name](folder)
    return folder


def import_dataset(source, output, *, shares, seed, category=None, tile=None):
    """Convert a dataset into a folder, which is replaced, and divide it unless it has three splits.

    The arguments are those of `helpers.convert.convert`; `shares` of train, valid and test.
    """
    source, output = resolve(source).resolve(), Path(output).resolve()
    if source == output or output in source.parents:
        message = "the source lies in the folder that its conversion replaces"
        raise InputError(message, where=source, fix="copy it to another place")
    splits = read_source(source, category=category).splits
    split = None if set(SPLIT_FOLDERS) <= set(splits) else shares
    shutil.rmtree(output, ignore_errors=True)
    return convert(source, output, category=category, split=split, seed=seed, tile=tile)


def lay_out(records, path, columns=3):
    """Lay pictures side by side as one PNG, and return its `ImageRecord` with all their masks.

    Takes pictures of the most frequent size, those with objects first: at most `columns` squared.
    """
    size, _ = Counter((record.width, record.height) for record in records).most_common(1)[0]
    fitting = [record for record in records if (record.width, record.height) == size]
    fitting.sort(key=lambda record: not record.objects)
    columns = min(columns, math.isqrt(len(fitting)))
    chosen, (width, height) = fitting[: columns**2], size
    photograph, objects = Image.new("RGB", (width * columns, height * columns)), []
    for index, record in enumerate(chosen):
        x, y = index % columns * width, index // columns * height
        photograph.paste(open_upright(record.path), (x, y))
        for item in record.objects:
            if item.rle is not None:
                mask = np.zeros(photograph.size[::-1], dtype=bool)
                mask[y : y + height, x : x + width] = coco_mask.decode(item.rle)
                rle = mask_to_rle(mask)
                objects.append(replace(item, rle=rle, box_xyxy=rle_box_xyxy(rle)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.save(path)
    contents = frozenset().union(*(record.contents for record in chosen))
    return ImageRecord(path.name, path, *photograph.size, tuple(objects), contents)


def open_photograph(path):
    """Return the `ImageRecord` of a photograph of which no annotation is known."""
    path = resolve(path)
    (width, height), _ = upright_size(path)
    return ImageRecord(path.name, path, width, height, ())


def queries_by_category(predictions, record):
    """Set predictions on one image beside the objects of the category that each asked for."""
    queries = []
    for prediction in predictions:
        objects = tuple(item for item in record.objects if item.category == prediction.prompt)
        queries += as_queries([prediction], [replace(record, objects=objects)])
    return queries


@torch.no_grad()
def losses_beside_silence(model, dataset, collator):
    """Compute the mean loss of a model, put into eval mode, and of one with all scores at the bottom.

    Returns a DataFrame with rows ``model`` and ``silent``, whose highest score is below 1e-9, and columns
    ``native`` and ``early``: the mean of the weighted total over the images of a `PromptDataset`.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = pd.DataFrame(0.0, index=["model", "silent"], columns=list(WEIGHTS))
    for batch in DataLoader(dataset, collate_fn=collator):
        outputs = loss_inputs(model(**model_inputs(batch, device)))
        for name, detector in (("model", outputs), ("silent", silenced(outputs))):
            for variant in WEIGHTS:
                total = sam3_losses(detector, batch["targets"], variant)["total"]
                sums.loc[name, variant] += total.item()
    return sums / len(dataset)


def silenced(outputs):
    """Return outputs, a dict for the losses, with all scores at the lowest the model can give."""
    lowest = {"pred_logits": -SCORE_LOGIT_CLAMP, "presence_logits": -PRESENCE_LOGIT_CLAMP}

    def silent(layer):
        return layer | {name: torch.full_like(layer[name], value) for name, value in lowest.items()}

    return silent(outputs) | {"aux": [silent(layer) for layer in outputs["aux"]]}
