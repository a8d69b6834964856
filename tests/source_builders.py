"""Masks with known pixels, written as datasets of several formats, and what a reader made of them."""

import numpy as np
import supervision as sv
from builders import mask_of, write_image
from pycocotools import mask as coco_mask

from helpers.data.masks import segmentation_to_rle

NAMES = ("crack", "joint")


def blob(x, y, width, height):
    """Return a mask that is no rectangle: one with a corner bitten off."""
    mask = mask_of(x, y, width, height)
    mask[y : y + height // 2, x : x + width // 2] = 0
    return mask.astype(bool)


TRUTH = {
    "train": {
        "a.png": [("crack", blob(8, 8, 16, 32))],
        "b.png": [("crack", blob(40, 4, 12, 40)), ("joint", blob(60, 0, 8, 64))],
        "empty.png": [],
    },
    "valid": {"c.png": [("joint", blob(5, 20, 80, 6))]},
}


def write_with_supervision(root, kind, truth=None):
    """Let supervision write TRUTH as "yolo", "voc" or "labelme"; returns root."""
    for split, files in (TRUTH if truth is None else truth).items():
        images = {name: write_image(root / "raw" / split / name) for name in files}
        annotations = {}
        for name, objects in files.items():
            masks = np.array([mask for _, mask in objects])
            annotations[str(images[name])] = (
                sv.Detections(
                    xyxy=sv.mask_to_xyxy(masks),
                    mask=masks,
                    class_id=np.array([NAMES.index(category) for category, _ in objects]),
                )
                if objects
                else sv.Detections.empty()
            )
        dataset = sv.DetectionDataset(
            list(NAMES), [str(path) for path in images.values()], annotations
        )
        folder = root / kind / split
        if kind == "yolo":
            dataset.as_yolo(
                str(folder / "images"),
                str(folder / "labels"),
                str(root / kind / "data.yaml"),
                approximation_percentage=0.0,
            )
        elif kind == "voc":
            dataset.as_pascal_voc(str(folder), str(folder), approximation_percentage=0.0)
        else:
            dataset.as_labelme(str(folder), str(folder))
    return root / kind


def masks_in(source):
    """Return split -> file name -> sorted list of (category, mask as bytes) of a source."""
    found = {}
    for split, images in source.splits.items():
        found[split] = {}
        for image in images:
            found[split][image.path.name] = sorted(
                (item["category"], mask_in(item, image).tobytes()) for item in image.objects
            )
    return found


def mask_in(item, image):
    """Return the mask of an entry as a bool array."""
    rle = segmentation_to_rle(item["segmentation"], image.height, image.width)
    return coco_mask.decode(rle).astype(bool)


def masks_of(truth):
    """Return TRUTH in the form of `masks_in`."""
    return {
        split: {
            name: sorted((category, mask.astype(bool).tobytes()) for category, mask in objects)
            for name, objects in files.items()
        }
        for split, files in truth.items()
    }
