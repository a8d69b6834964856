"""Copies of a few training images with one fault each, to see what a data check says to it.

Every copy has the layout that the seed document expects, ``train/images/*.jpg`` beside
``train/annotations/<stem>.json``, whatever the layout of the source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from helpers.errors import InputError
from helpers.files import write_json
from helpers.images import open_upright

NUM_IMAGES = 8
JPEG_QUALITY = 95


class Fault(NamedTuple):
    """One way to spoil a dataset.

    Attributes
    ----------
    what : str
        What was done to the copy.
    codes : tuple of str
        Findings of which it must cause at least one, keys of `helpers.findings.CODES`; empty if no
        check of numbers can see it.
    symptom : str
        What training on such data leads to.
    plant : callable
        Takes the folder of a copy and spoils it.
    """

    what: str
    codes: tuple[str, ...]
    symptom: str
    plant: Callable[[Path], None]


def write_copy(split, folder, num_images=NUM_IMAGES):
    """Write the first images with objects as a dataset of its own, with one split ``train``.

    Parameters
    ----------
    split : helpers.records.Split
        From `helpers.annotations.read_split`.
    folder : os.PathLike
        Replaced if it exists.
    num_images : int
        At most so many.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    InputError
        If no image of the split has an object, or an image cannot be read.
    """
    records = [record for record in split.records if record.objects][:num_images]
    if not records:
        raise InputError(
            "no image has an object", where=split.root, fix="choose a split with annotations"
        )
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "annotations"):
        (folder / "train" / name).mkdir(parents=True)
    ids = {entry.name: entry.category_id for entry in split.category_table}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    annotation_id = 0
    for number, record in enumerate(records, start=1):
        stem = PurePosixPath(record.image_id).with_suffix("").as_posix().replace("/", "_")
        picture = open_upright(record.path)
        picture.save(folder / "train" / "images" / f"{stem}.jpg", quality=JPEG_QUALITY)
        entries = []
        for item in record.objects:
            annotation_id += 1
            entries.append(_entry(item, annotation_id, number, ids[item.category]))
        image = {"id": number, "file_name": f"images/{stem}.jpg"}
        image |= {"width": record.width, "height": record.height}
        image |= {"contents": sorted(record.contents)}
        content = {"images": [image], "categories": categories, "annotations": entries}
        write_json(folder / "train" / "annotations" / f"{stem}.json", content)
    return folder


def write_broken_copy(split, folder, name, num_images=NUM_IMAGES):
    """Write a copy as `write_copy` does and plant one fault in it.

    Parameters
    ----------
    split, folder, num_images
        See `write_copy`.
    name : str
        A key of `FAULTS`.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    InputError
        If there is no fault of that name, or see `write_copy`.
    """
    if name not in FAULTS:
        raise InputError(f"there is no fault {name!r}", fix=f"use one of {', '.join(FAULTS)}")
    folder = write_copy(split, folder, num_images)
    FAULTS[name].plant(folder)
    return folder


def _entry(item, annotation_id, image_id, category_id):
    """Return the COCO entry of an object, its mask as compressed run lengths."""
    x0, y0, x1, y1 = item.box_xyxy
    entry = {"id": annotation_id, "image_id": image_id, "category_id": category_id}
    entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(item.is_crowd)}
    if item.rle is not None:
        entry["segmentation"] = dict(item.rle)
    return entry


def _in_every_file(change):
    """Return a fault that lets ``change(content)`` modify the content of each annotation file."""

    def plant(folder):
        for path in sorted((folder / "train" / "annotations").glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            write_json(path, content)

    return plant


def _in_every_mask(change):
    """Return a fault that lets ``change`` turn each mask, (height, width) uint8, into another."""

    def change_all(content):
        for entry in content["annotations"]:
            if "segmentation" in entry:
                mask = np.asfortranarray(change(coco_mask.decode(entry["segmentation"])))
                counts = coco_mask.encode(mask)["counts"].decode("ascii")
                entry["segmentation"] = {"size": list(mask.shape), "counts": counts}

    return _in_every_file(change_all)


def rename_key(content):
    """Give the list of objects of an annotation file a name that no reader looks for."""
    content["objects"] = content.pop("annotations")


def remove_objects(content):
    """Empty the list of objects of an annotation file."""
    content["annotations"] = []


def mark_as_crowd(content):
    """Mark every object of an annotation file as a crowd region."""
    for entry in content["annotations"]:
        entry["iscrowd"] = 1


def boxes_as_corners(content):
    """Write the boxes of an annotation file as ``[x0, y0, x1, y1]``."""
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]


def boxes_as_fractions(content):
    """Write the boxes of an annotation file as YOLO does: centre and size, parts of the image."""
    sides = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        (x, y, width, height), (across, down) = entry["bbox"], sides[entry["image_id"]]
        centre = [(x + width / 2) / across, (y + height / 2) / down]
        entry["bbox"] = [*centre, width / across, height / down]


def _call_all_object(content):
    for category in content["categories"]:
        category["name"] = "object"


def _two_spellings(content):
    first = content["categories"][0]
    last = max(category["id"] for category in content["categories"])
    content["categories"].append({"id": last + 1, "name": f"{first['name']}s"})
    for entry in content["annotations"]:
        if entry["category_id"] == first["id"] and entry["id"] % 2 == 0:
            entry["category_id"] = last + 1


def _truncate_image(folder):
    path = min((folder / "train" / "images").glob("*.jpg"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _repeat_in_valid(folder):
    shutil.copytree(folder / "train", folder / "valid")


def _mirror(content):
    [image] = content["images"]
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [image["width"] - x - width, y, width, height]


def _mirror_annotations(folder):
    """Flip boxes and masks left-right and leave the images as they are."""
    _in_every_file(_mirror)(folder)
    _in_every_mask(lambda mask: mask[:, ::-1])(folder)


FAULTS = {
    "key": Fault(
        "the list of objects is called 'objects', not 'annotations'",
        ("D03_UNREADABLE",),
        "0 objects for a loader that reads missing keys as empty: scores fall to 0.000",
        _in_every_file(rename_key),
    ),
    "empty": Fault(
        "every list of objects is empty",
        ("D01_NO_OBJECTS",),
        "the same: the loss is smallest for a model that says no to everything",
        _in_every_file(remove_objects),
    ),
    "crowd": Fault(
        "iscrowd is 1 on every object",
        ("D10_ALL_CROWD",),
        "a loader that drops crowds asks for present things as if they were absent",
        _in_every_file(mark_as_crowd),
    ),
    "corners": Fault(
        "boxes are [x0, y0, x1, y1], not [x, y, width, height]",
        ("D22_BOX_OFF_MASK",),
        "the loss looks sane, boxes deviate, AP50 stays low",
        _in_every_file(boxes_as_corners),
    ),
    "fractions": Fault(
        "boxes are fractions of the image, not pixels",
        ("D21_BOX_NORMALISED",),
        "boxes of less than a pixel: nothing can be matched to them",
        _in_every_file(boxes_as_fractions),
    ),
    "transposed": Fault(
        "masks were run-length encoded row by row, not column by column",
        ("D22_BOX_OFF_MASK", "D43_MASK_SIZE"),
        "masks lie mirrored at the diagonal, or have height and width swapped",
        _in_every_mask(lambda mask: mask.T),
    ),
    "half size": Fault(
        "masks were drawn on a copy of half the size",
        ("D43_MASK_SIZE",),
        "no mask fits its image: no outline is learned",
        _in_every_mask(lambda mask: mask[::2, ::2]),
    ),
    "object": Fault(
        "every category is called 'object'",
        ("D32_NO_NOUN",),
        "trained on one word, asked for another: nothing is found",
        _in_every_file(_call_all_object),
    ),
    "spelling": Fault(
        "every second object has the plural of the first category's name",
        ("D31_SIMILAR_NAMES",),
        "one spelling is asked as absent where the other is present",
        _in_every_file(_two_spellings),
    ),
    "truncated": Fault(
        "one image file is cut off in the middle",
        ("D70_BROKEN_IMAGE",),
        "a crash in the middle of an epoch, or an image that is silently left out",
        _truncate_image,
    ),
    "leakage": Fault(
        "the training images are the validation images too",
        ("D80_LEAKAGE",),
        "validation rewards learning by heart",
        _repeat_in_valid,
    ),
    "mirrored": Fault(
        "boxes and masks are flipped left-right, the images are not",
        (),
        "boxes deviate, the loss does not fall far",
        _mirror_annotations,
    ),
}
"""What can be planted. The last one agrees with itself in every number: only eyes find it."""
