"""The reader of the failing script, kept so that what it did can be reproduced and measured.

Nothing that a user would call depends on this file: a notebook, the experiment and the faults of
`helpers.faults_data` put it in the place of the right reader on purpose.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from helpers.data.coco import COCO_FILE, read_split
from helpers.data.images import IMAGE_SUFFIXES, open_upright
from helpers.data.masks import mask_to_rle, rle_box_xyxy, segmentation_to_rle
from helpers.data.records import ObjectAnnotation
from helpers.errors import InputError
from helpers.files import write_json

SHRINK = 32
"""Factor by which a picture shrinks to stand in the middle of a wall seen from afar."""
KEEP_EVERY = 30
"""One in so many images with objects stays where hardly any is to show one."""


def in_every_file(change, splits=("train", "valid", "test")):
    """Make a fault of annotation files.

    Parameters
    ----------
    change : callable
        Takes the content of a COCO file, of a whole split or of one image, and modifies it.
    splits : sequence of str
        Folders to change.

    Returns
    -------
    callable
        Takes the folder of a dataset and changes both of its layouts alike.
    """

    def spoil(folder):
        for split in splits:
            for path in sorted((Path(folder) / split).rglob("*.json")):
                content = json.loads(path.read_text(encoding="utf-8"))
                change(content)
                write_json(path, content)

    return spoil


def _images(folder):
    """List the image files of a dataset."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _change_masks(content, change):
    """Replace each mask, (height, width) uint8, by ``change(mask)``, as run lengths."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for entry in content["annotations"]:
        rle = segmentation_to_rle(entry["segmentation"], *sizes[entry["image_id"]])
        entry["segmentation"] = mask_to_rle(change(coco_mask.decode(rle)))


def halve_masks(content):
    """Draw the masks on a copy of half the size."""
    _change_masks(content, lambda mask: mask[::2, ::2])


def remove_half(content):
    """Remove every second object."""
    content["annotations"] = [one for one in content["annotations"] if one["id"] % 2 == 0]


def number_from_zero(content):
    """Let the categories of the objects count from 0, and leave the table at 1."""
    for entry in content["annotations"]:
        entry["category_id"] -= 1


def thin_boxes(content):
    """Make every box a fifth of a pixel wide."""
    for entry in content["annotations"]:
        entry["bbox"][2] = 0.2


def _keep_few_objects(content):
    shown = sorted({entry["image_id"] for entry in content["annotations"]})
    dropped = set(shown) - set(shown[::KEEP_EVERY])
    for key, name in (("images", "id"), ("annotations", "image_id")):
        content[key] = [one for one in content[key] if one[name] not in dropped]


def leave_most_out(folder):
    """Keep all training images without objects and few with; one layout is enough for that."""
    shutil.rmtree(folder / "train" / "annotations", ignore_errors=True)
    in_every_file(_keep_few_objects, splits=("train",))(folder)


def _seen_from_afar(pixels):
    """Shrink an image, or a mask, onto the middle of a plain one of the same size."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (width // SHRINK, height // SHRINK), interpolation=cv2.INTER_AREA)
    far = np.empty_like(pixels)
    far[:] = pixels.mean(axis=(0, 1)) if pixels.ndim == 3 else 0
    top, left = (height - len(small)) // 2, (width - small.shape[1]) // 2
    far[top : top + len(small), left : left + small.shape[1]] = small
    return far


def _shrink_annotations(content):
    _change_masks(content, lambda mask: (_seen_from_afar(255 * mask) > 0).astype(np.uint8))
    for entry in content["annotations"]:
        x0, y0, x1, y1 = rle_box_xyxy(entry["segmentation"])
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]


def shrink_all(folder):
    """Make every picture and all its objects smaller, in the middle of a plain wall."""
    for path in _images(folder):
        far = _seen_from_afar(np.asarray(open_upright(path)))
        Image.fromarray(far).save(path, quality=JPEG_QUALITY)
    in_every_file(_shrink_annotations)(folder)


def turn_images(folder):
    """Turn every image by 90 degrees and leave the annotations as they are."""
    for path in _images(folder):
        image = open_upright(path).transpose(Image.Transpose.ROTATE_90)
        image.save(path, quality=JPEG_QUALITY)


def orient_images(folder):
    """Give every image an EXIF orientation that the annotations do not know of."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in _images(folder):
        open_upright(path).save(path, quality=JPEG_QUALITY, exif=exif)


def rename_images(folder):
    """Rename every image and leave the annotations as they are."""
    for path in _images(folder):
        path.rename(path.with_stem(f"{path.stem}_{path.suffix[1:]}.rf.0"))


def cut_image_off(folder):
    """Cut one training image off in the middle of the file."""
    path = _images(folder / "train")[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NUM_IMAGES = 8
JPEG_QUALITY = 95


class Fault(NamedTuple):
    """One way to spoil a dataset.

    Attributes
    ----------
    what : str
        What was done to the copy.
    codes : tuple of str
        Findings of which it must cause at least one, keys of `helpers.checks.findings.CODES`; empty if no
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
    split : helpers.data.records.Split
        From `helpers.data.coco.read_split`.
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
                mask = change(coco_mask.decode(entry["segmentation"]))
                entry["segmentation"] = mask_to_rle(mask)

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


WRONG_BOX_KEY = "bboxes"
WRONG_MASK_KEY = "masks"


def read_split_wrong_keys(data_dir, split):
    """Read a split as the failing script did: objects under JSON keys that nobody writes.

    Every annotation file is opened, and a missing key passes for an empty list. Images, sizes,
    names of categories and ``contents`` are read as they should be, so that the objects are the
    only difference to `helpers.data.coco.read_split`.

    Parameters
    ----------
    data_dir : str or os.PathLike
        A folder with one folder per split, see `helpers.files.resolve`.
    split : str
        Name of the split. Its per-image files are read if there are any, else its one COCO file.

    Returns
    -------
    helpers.data.records.Split
        Its records have the objects of ``bboxes`` ([x, y, width, height] in pixels) and ``masks``
        (COCO segmentations), in pairs: none at all for a dataset that keeps to COCO's keys.

    Raises
    ------
    InputError
        If the files cannot be read, see `helpers.data.coco.read_split`.

    Notes
    -----
    Cause: row 1, "no ground truth reaches the loss". The dataset class of Sompote/SAM3_LoRA looked
    for ``bboxes`` and ``masks`` where the files have ``annotations`` with ``bbox`` and
    ``segmentation``, until commit d1a8518.

    Signature: no error and no warning; with the loss ``early`` a training loss of exactly
    ``2 mean(softplus(query logit))`` that falls towards zero, all query logits far below zero and
    a highest score of 0.000 for every prompt; with the loss ``native`` the presence logit falls.

    Cure: `helpers.data.coco.read_split`, which refuses a file without the key ``annotations``;
    `helpers.data.dataset.count_objects` before any training, which `helpers.train.training.train` does.
    """
    right = read_split(data_dir, split)
    if (right.root / "annotations").is_dir():
        right = read_split(data_dir, split, layout="per_image")
    contents = _coco_contents(right) if right.layout == "coco" else _per_image_contents(right)
    records = [
        replace(record, objects=_objects(contents[record.image_id], record, right.categories))
        for record in right.records
    ]
    return replace(right, records=tuple(records))


def _per_image_contents(split):
    """Map each image to the whole content of its own annotation file."""
    folder = split.root / "annotations"
    return {record.image_id: _load(folder / f"{record.path.stem}.json") for record in split.records}


def _coco_contents(split):
    """Map each image to its entry in the one COCO file."""
    entries = _load(split.root / COCO_FILE)["images"]
    return {_image_id(entry["file_name"]): entry for entry in entries}


def _image_id(file_name):
    """Bring a file name to the form of `helpers.data.records.ImageRecord.image_id`."""
    return PurePosixPath(file_name.replace("\\", "/")).as_posix().removeprefix("images/")


def _load(path):
    """Parse a file that `read_split` has read before, so that it is known to be sound."""
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _objects(content, record, categories):
    """Look the objects of an image up under the wrong keys; the script knew a single category."""
    boxes, masks = content.get(WRONG_BOX_KEY, []), content.get(WRONG_MASK_KEY, [])
    return tuple(
        ObjectAnnotation(
            category=categories[0],
            box_xyxy=(x, y, x + width, y + height),
            rle=segmentation_to_rle(mask, record.height, record.width),
            annotation_id=number,
        )
        for number, ((x, y, width, height), mask) in enumerate(zip(boxes, masks, strict=True))
    )
