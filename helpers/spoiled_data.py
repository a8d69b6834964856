"""Ways to spoil a copy of a dataset on disk, in both layouts and all splits alike.

What takes ``content`` changes the parsed JSON of an annotation file, see `in_every_file`; what
takes a folder changes the whole dataset.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from helpers.broken_copies import JPEG_QUALITY
from helpers.files import write_json
from helpers.images import IMAGE_SUFFIXES, open_upright
from helpers.segmentations import rle_box_xyxy, segmentation_to_rle

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
        mask = np.asfortranarray(change(coco_mask.decode(rle)))
        counts = coco_mask.encode(mask)["counts"].decode("ascii")
        entry["segmentation"] = {"size": list(mask.shape), "counts": counts}


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
