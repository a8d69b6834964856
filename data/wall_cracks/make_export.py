"""The drawn walls as somebody else's tool would hand them over: the example of lesson 07."""

import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import ImageEnhance
from pycocotools import mask as coco_mask

from helpers.data.coco import find_splits, read_split
from helpers.data.images import open_upright
from helpers.files import WALL_CRACKS, resolve, staged_folder

EXAMPLE_NOUNS = {"0": "crack"}  # the category of the example, and what its objects are
TWICE = 12  # every 12th picture of the example is added a second time, brighter


def source_of(source, data_dir, folder):
    """Return `source`, else `data_dir` of one's own, else an example in `folder`; and known nouns."""
    if source:
        return resolve(source), {}
    if data_dir.resolve() != WALL_CRACKS.resolve():
        return data_dir, {}
    return write_export(folder), EXAMPLE_NOUNS


def write_export(folder):
    """Write a dataset of one category as a YOLO export: one folder, a number for a name, no holes."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    records = []
    for name in find_splits(WALL_CRACKS):
        records += read_split(WALL_CRACKS, name).records
    order = np.random.default_rng(0).permutation(len(records))
    shots = [(records[index], False) for index in order]
    shots += [(records[index], True) for index in order[::TWICE]]
    with staged_folder(folder) as staging:
        for name in ("images", "labels"):
            (staging / name).mkdir()
        (staging / "data.yaml").write_text("names: ['0']\n", encoding="utf-8")
        for number, (record, is_second) in enumerate(shots):
            name = f"photo_{number:03d}"
            lines = [_yolo_line(item.rle) for item in record.objects]
            (staging / "labels" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
            target = staging / "images" / f"{name}{record.path.suffix}"
            if is_second:
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
