"""The losses of a model beside those of a detector that never finds anything.

Two questions about a validation loss can be answered with numbers: on which scale it is, since the
same outputs give one value under SAM3's weights and another under the seed script's, and whether
it can be trusted to choose a checkpoint, since a detector without detections may have the lower
one.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageEnhance
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from helpers.convert.conversion import convert, read_source
from helpers.data.coco import SPLIT_FOLDERS, find_splits, read_split
from helpers.data.images import open_upright, upright_size
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.data.records import ImageRecord
from helpers.detect.queries import as_queries
from helpers.errors import InputError
from helpers.files import WALL_CRACKS, resolve, staged_folder
from helpers.model.losses import WEIGHTS, sam3_losses
from helpers.model.prompted import PRESENCE_LOGIT_CLAMP, SCORE_LOGIT_CLAMP, model_inputs

EXAMPLE_NOUNS = {"0": "crack"}
"""The category of the example, and what its objects are."""
TWICE = 12
"""Every so many pictures of the example are in it a second time, brighter."""


def source_of(source, data_dir, folder):
    """Find the dataset to start from.

    Parameters
    ----------
    source : str
        Folder of the reader's own; empty if he has none.
    data_dir : pathlib.Path
        Dataset of the course, or what he put in its place.
    folder : pathlib.Path
        Where the example goes if neither is his own.

    Returns
    -------
    path : pathlib.Path
    nouns : dict of str to str
        What its categories are to be asked as, where that is known: of the example only.
    """
    if source:
        return resolve(source), {}
    if data_dir.resolve() != WALL_CRACKS.resolve():
        return data_dir, {}
    return write_example(folder), EXAMPLE_NOUNS


def write_example(folder, data_dir=WALL_CRACKS):
    """Write a dataset of one category as a YOLO export that tells little.

    Parameters
    ----------
    folder : os.PathLike
        Replaced by ``data.yaml``, ``images/`` and ``labels/``: all splits in one, in mixed order.
    data_dir : os.PathLike
        The dataset. What is lost of it: its splits, the name of its category, the ``contents`` of
        its images, and holes in masks, which a YOLO polygon cannot have.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    records = [one for name in find_splits(data_dir) for one in read_split(data_dir, name).records]
    order = np.random.default_rng(0).permutation(len(records))
    shots = [(records[index], False) for index in order]
    shots += [(records[index], True) for index in order[::TWICE]]
    with staged_folder(folder) as staging:
        for name in ("images", "labels"):
            (staging / name).mkdir()
        (staging / "data.yaml").write_text("names: ['0']\n", encoding="utf-8")
        for number, (record, again) in enumerate(shots):
            name = f"photo_{number:03d}"
            lines = [_yolo_line(item.rle) for item in record.objects]
            (staging / "labels" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
            target = staging / "images" / f"{name}{record.path.suffix}"
            if again:
                ImageEnhance.Brightness(open_upright(record.path)).enhance(1.15).save(target)
            else:
                shutil.copyfile(record.path, target)
    return folder


def _yolo_line(rle):
    """Trace the outline of a mask at twice its size, as a line of class and shares of the sides."""
    mask = coco_mask.decode(rle)
    doubled = mask.repeat(2, 0).repeat(2, 1)
    outlines, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = max(outlines, key=cv2.contourArea)[:, 0] / 2 + 0.25
    shares = corners / mask.shape[::-1]
    return " ".join(["0", *(f"{value:.6f}" for value in shares.ravel())]) + "\n"


def import_dataset(source, output, *, shares, seed, category=None, tile=None):
    """Convert a dataset, and divide it unless it has all three splits.

    Parameters
    ----------
    source : os.PathLike
        Of any format that `helpers.convert.conversion.read_source` knows.
    output : os.PathLike
        Folder, replaced.
    shares : sequence of float
        Of train, valid and test.
    seed : int
        Of the division.
    category : str, optional
        What mask pictures show.
    tile : int, optional
        Side in pixels of the tiles that larger images are cut into.

    Returns
    -------
    dict
        See `helpers.convert.conversion.convert`.

    Raises
    ------
    InputError
        If the source cannot be read, or lies in the folder that would be replaced.
    """
    source, output = resolve(source).resolve(), Path(output).resolve()
    if source == output or output in source.parents:
        raise InputError(
            "the source lies in the folder that its conversion replaces",
            where=source,
            fix="copy it to another place",
        )
    splits = read_source(source, category=category).splits
    split = None if set(SPLIT_FOLDERS) <= set(splits) else shares
    shutil.rmtree(output, ignore_errors=True)
    return convert(source, output, category=category, split=split, seed=seed, tile=tile)


def lay_out(records, path, columns=3):
    """Lay pictures side by side as one large photograph, with their objects.

    Parameters
    ----------
    records : sequence of helpers.data.records.ImageRecord
        At least one. Those of the most frequent size are used, pictures with objects first.
    path : os.PathLike
        PNG to write.
    columns : int
        Pictures per row, and rows; fewer if there are not enough pictures.

    Returns
    -------
    helpers.data.records.ImageRecord
        Of the photograph. Objects without a mask are left out, and ``contents`` are united.
    """
    size, _ = Counter((one.width, one.height) for one in records).most_common(1)[0]
    fitting = [one for one in records if (one.width, one.height) == size]
    fitting.sort(key=lambda one: not one.objects)
    columns = min(columns, math.isqrt(len(fitting)))
    chosen, (width, height) = fitting[: columns**2], size
    photograph = Image.new("RGB", (width * columns, height * columns))
    objects = []
    for index, record in enumerate(chosen):
        x, y = index % columns * width, index // columns * height
        photograph.paste(open_upright(record.path), (x, y))
        objects += [
            _moved(item, x, y, photograph.size) for item in record.objects if item.rle is not None
        ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.save(path)
    contents = frozenset().union(*(one.contents for one in chosen))
    return ImageRecord(path.name, path, *photograph.size, tuple(objects), contents)


def open_photograph(path):
    """Describe a photograph of which no annotation is known.

    Parameters
    ----------
    path : os.PathLike

    Returns
    -------
    helpers.data.records.ImageRecord
        Without objects.

    Raises
    ------
    InputError
        If it is no readable image.
    """
    path = resolve(path)
    (width, height), _ = upright_size(path)
    return ImageRecord(path.name, path, width, height, ())


def _moved(item, x, y, size):
    """Move an object into a picture of another size (width, height)."""
    part = coco_mask.decode(item.rle).astype(bool)
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y : y + part.shape[0], x : x + part.shape[1]] = part
    rle = mask_to_rle(mask)
    return replace(item, rle=rle, box_xyxy=rle_box_xyxy(rle))


def queries_by_category(predictions, record):
    """Set the predictions on one image beside the objects of the category each asked for.

    Parameters
    ----------
    predictions : sequence of helpers.detect.predictor.Prediction
        One per prompt.
    record : helpers.data.records.ImageRecord
        The image.

    Returns
    -------
    list of dict
        See `helpers.detect.queries`.
    """
    queries = []
    for one in predictions:
        asked = tuple(item for item in record.objects if item.category == one.prompt)
        queries += as_queries([one], [replace(record, objects=asked)])
    return queries


_LAYER = ("pred_logits", "pred_boxes_cxcywh", "presence_logits")


@torch.no_grad()
def losses_beside_silence(model, dataset, collator):
    """Compute the mean loss of a model and of the same model with all its scores at the bottom.

    Parameters
    ----------
    model : helpers.model.sam3.PromptedSam3 or peft.PeftModel
        Put into eval mode.
    dataset : helpers.data.dataset.PromptDataset
        For example from `helpers.detect.queries.evaluation_dataset`.
    collator : helpers.data.dataset.PromptCollator

    Returns
    -------
    pandas.DataFrame
        Rows ``model`` and ``silent``: boxes and masks are the same, but all query and presence
        logits stand at the model's lower clamps, so that the highest score is below 1e-9. Columns
        ``native`` and ``early``: the mean over the images of the weighted total.
    """
    model.eval()
    device = next(model.parameters()).device
    sums = pd.DataFrame(0.0, index=["model", "silent"], columns=list(WEIGHTS))
    for batch in DataLoader(dataset, collate_fn=collator):
        outputs = model(**model_inputs(batch, device))
        for name, judged in (("model", _parts(outputs)), ("silent", silenced(_parts(outputs)))):
            for variant in WEIGHTS:
                total = sam3_losses(judged, batch["targets"], variant)["total"]
                sums.loc[name, variant] += total.item()
    return sums / len(dataset)


def silenced(outputs):
    """Put all scores of some outputs to the lowest value the model can give.

    Parameters
    ----------
    outputs : dict
        See `helpers.model.losses.sam3_losses`.

    Returns
    -------
    dict
        A copy; boxes, masks and semantic map are shared with the input.
    """
    lowest = {"pred_logits": -SCORE_LOGIT_CLAMP, "presence_logits": -PRESENCE_LOGIT_CLAMP}

    def quiet(layer):
        return layer | {name: torch.full_like(layer[name], value) for name, value in lowest.items()}

    return quiet(outputs) | {"aux": [quiet(layer) for layer in outputs["aux"]]}


def _parts(outputs):
    """Return what the losses read of the model's outputs, in float32."""
    layers = [
        {name: layer[name].float() for name in _LAYER} for layer in (outputs, *outputs["aux"])
    ]
    masks = {name: outputs[name].float() for name in ("pred_masks", "semantic_logits")}
    return layers[0] | masks | {"aux": layers[1:]}
