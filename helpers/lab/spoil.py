"""Faults in the files of a dataset, and the failing script's reader."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from helpers.data.coco import entries_of, image_record, read_split
from helpers.data.images import IMAGE_SUFFIXES, open_upright
from helpers.data.masks import mask_to_rle, segmentation_to_rle
from helpers.files import files_below, read_json, write_json

JPEG_QUALITY = 95
SHRINK = 32  # a picture seen from afar is so many times smaller
KEEP_EVERY = 30  # of the images with objects, one in so many stays where hardly any is to show one


def in_every_file(change, splits=("train", "valid", "test")):
    """Make a ``spoil_data`` of ``change(content)``, called for each annotation file of both layouts."""

    def spoil(folder):
        for split in splits:
            for path in sorted((Path(folder) / split).rglob("*.json")):
                content = read_json(path)
                change(content)
                write_json(path, content)

    return spoil


def in_every_object(change):
    """Make a ``spoil_data`` of ``change(annotation, image)``, called for each object."""

    def change_all(content):
        images = {image["id"]: image for image in content["images"]}
        for entry in content["annotations"]:
            change(entry, images[entry["image_id"]])

    return in_every_file(change_all)


def in_every_box(change):
    """Make a ``spoil_data`` of ``change(x, y, width, height, image's width, height)``, the new box."""

    def change_box(entry, image):
        entry["bbox"] = list(change(*entry["bbox"], image["width"], image["height"]))

    return in_every_object(change_box)


def in_every_mask(change):
    """Make a ``spoil_data`` that turns each mask, (height, width) uint8, into ``change(mask)``."""

    def change_mask(entry, image):
        if "segmentation" in entry:
            size = image["height"], image["width"]
            mask = coco_mask.decode(segmentation_to_rle(entry["segmentation"], *size))
            entry["segmentation"] = mask_to_rle(change(mask))

    return in_every_object(change_mask)


def in_every_image(change):
    """Make a ``spoil_data`` that saves each upright picture as ``change(picture)``; annotations stay."""

    def spoil(folder):
        for path in files_below(folder, IMAGE_SUFFIXES):
            change(open_upright(path)).save(path, quality=JPEG_QUALITY)

    return spoil


def _fractions(x, y, w, h, across, down):
    """Return a box as YOLO writes it: centre and size, as parts of the image."""
    return (x + w / 2) / across, (y + h / 2) / down, w / across, h / down


def _mirror(folder):
    """Flip boxes and masks left-right and leave the images as they are."""
    in_every_box(lambda x, y, w, h, across, _: (across - x - w, y, w, h))(folder)
    in_every_mask(lambda mask: mask[:, ::-1])(folder)


def _remove_half(content):
    content["annotations"] = [item for item in content["annotations"] if item["id"] % 2 == 0]


def _call_all_object(content):
    for category in content["categories"]:
        category["name"] = "object"


def _divide(content, name):
    first = content["categories"][0]
    last = max(category["id"] for category in content["categories"])
    content["categories"].append({"id": last + 1, "name": name.format(first["name"])})
    for entry in content["annotations"]:
        if entry["category_id"] == first["id"] and entry["id"] % 2 == 0:
            entry["category_id"] = last + 1


def _leave_most_out(folder):
    """Keep all training images without objects and few with; of the layouts, one remains."""

    def change(content):
        with_objects = sorted({entry["image_id"] for entry in content["annotations"]})
        left_out = {*with_objects} - {*with_objects[::KEEP_EVERY]}
        for key, name in (("images", "id"), ("annotations", "image_id")):
            content[key] = [item for item in content[key] if item[name] not in left_out]

    shutil.rmtree(folder / "train" / "annotations", ignore_errors=True)
    in_every_file(change, ("train",))(folder)


def _far_away(pixels):
    """Shrink an image or a mask onto the middle of a plain one of the same size."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (width // SHRINK, height // SHRINK), interpolation=cv2.INTER_AREA)
    far = np.empty_like(pixels)
    far[:] = pixels.mean(axis=(0, 1)) if pixels.ndim == 3 else 0
    top, left = (height - len(small)) // 2, (width - small.shape[1]) // 2
    far[top : top + len(small), left : left + small.shape[1]] = small
    return far


def _shrink_all(folder):
    """Make every picture and all its objects smaller, in the middle of a plain wall."""
    in_every_image(lambda image: Image.fromarray(_far_away(np.asarray(image))))(folder)
    in_every_mask(lambda mask: (_far_away(255 * mask) > 0).astype(np.uint8))(folder)
    in_every_object(
        lambda entry, _: entry.update(bbox=coco_mask.toBbox(entry["segmentation"]).tolist())
    )(folder)


def _ignore_orientation(folder):
    """Give every image an EXIF orientation that the annotations do not know of."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in files_below(folder, IMAGE_SUFFIXES):
        open_upright(path).save(path, quality=JPEG_QUALITY, exif=exif)


def _rename_images(folder):
    for path in files_below(folder, IMAGE_SUFFIXES):
        path.rename(path.with_stem(f"{path.stem}_{path.suffix[1:]}.rf.0"))


def _cut_image_off(folder):
    path = files_below(folder / "train", IMAGE_SUFFIXES)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOIL_DATA = {
    "key": in_every_file(lambda content: content.update(objects=content.pop("annotations"))),
    "empty": in_every_file(lambda content: content.update(annotations=[])),
    "crowd": in_every_object(lambda entry, image: entry.update(iscrowd=1)),
    "corners": in_every_box(lambda x, y, w, h, *_: (x, y, x + w, y + h)),
    "fractions": in_every_box(_fractions),
    "transposed": in_every_mask(lambda mask: mask.T),
    "half size": in_every_mask(lambda mask: mask[::2, ::2]),
    "object": in_every_file(_call_all_object),
    "spelling": in_every_file(partial(_divide, name="{}s")),
    "categories joined": in_every_file(partial(_divide, name="dent")),  # there is one by itself
    "truncated": _cut_image_off,
    "leakage": lambda folder: shutil.copytree(folder / "train", folder / "valid"),
    "mirrored": _mirror,
    "images turned": in_every_image(lambda image: image.transpose(Image.Transpose.ROTATE_90)),
    "orientation ignored": _ignore_orientation,
    "thin boxes": in_every_box(lambda x, y, w, h, *_: (x, y, 0.2, h)),
    "images renamed": _rename_images,
    "ids from zero": in_every_object(
        lambda entry, _: entry.update(category_id=entry["category_id"] - 1)
    ),
    "half the labels": in_every_file(_remove_half),
    "seen from afar": _shrink_all,
    "hardly any object": _leave_most_out,
}
"""Faults of ``data/faults.csv`` that lie in the files of a dataset: what changes its folder."""


WRONG_BOX_KEY, WRONG_MASK_KEY = "bboxes", "masks"
_read_right = partial(read_split)  # stays right where this reader is planted in its place


def read_split_wrong_keys(data_dir, split):
    """Read a split as the failing script did: objects under JSON keys that nobody writes.

    Every annotation file is opened, and a missing key passes for an empty list; there is no error and
    no warning. The dataset class of Sompote/SAM3_LoRA did so until commit d1a8518.

    Takes and returns what `helpers.data.coco.read_split` does, but prefers files per image, and the
    objects are those of ``bboxes`` ([x, y, width, height] in pixels) and ``masks``: none.
    """
    right = _read_right(data_dir, split)
    if (right.root / "annotations").is_dir():
        right = _read_right(data_dir, split, layout="per_image")
    names, objects = {1: right.categories[0]}, {}  # the script knew a single category
    for path, entry, _, _ in entries_of(right.root, right.layout):
        content = entry if right.layout == "coco" else read_json(path)
        pairs = zip(content.get(WRONG_BOX_KEY, []), content.get(WRONG_MASK_KEY, []), strict=True)
        wrong = [{"bbox": box, "segmentation": mask, "category_id": 1} for box, mask in pairs]
        record = image_record(path, entry, wrong, names, right.root)
        objects[record.image_id] = record.objects
    records = (replace(record, objects=objects[record.image_id]) for record in right.records)
    return replace(right, records=tuple(records))
