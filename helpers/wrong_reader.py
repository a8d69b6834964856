"""The reader of the failing script, kept so that what it did can be reproduced and measured.

Nothing that a user would call depends on this file: a notebook, the experiment and the faults of
`helpers.faults_data` put it in the place of the right reader on purpose.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import PurePosixPath

from helpers.annotations import COCO_FILE, read_split
from helpers.records import ObjectAnnotation
from helpers.segmentations import segmentation_to_rle

WRONG_BOX_KEY = "bboxes"
WRONG_MASK_KEY = "masks"


def read_split_wrong_keys(data_dir, split):
    """Read a split as the failing script did: objects under JSON keys that nobody writes.

    Every annotation file is opened, and a missing key passes for an empty list. Images, sizes,
    names of categories and ``contents`` are read as they should be, so that the objects are the
    only difference to `helpers.annotations.read_split`.

    Parameters
    ----------
    data_dir : str or os.PathLike
        A folder with one folder per split, see `helpers.paths.resolve`.
    split : str
        Name of the split. Its per-image files are read if there are any, else its one COCO file.

    Returns
    -------
    helpers.records.Split
        Its records have the objects of ``bboxes`` ([x, y, width, height] in pixels) and ``masks``
        (COCO segmentations), in pairs: none at all for a dataset that keeps to COCO's keys.

    Raises
    ------
    InputError
        If the files cannot be read, see `helpers.annotations.read_split`.

    Notes
    -----
    Cause: row 1, "no ground truth reaches the loss". The dataset class of Sompote/SAM3_LoRA looked
    for ``bboxes`` and ``masks`` where the files have ``annotations`` with ``bbox`` and
    ``segmentation``, until commit d1a8518.

    Signature: no error and no warning; with the loss ``early`` a training loss of exactly
    ``2 mean(softplus(query logit))`` that falls towards zero, all query logits far below zero and
    a highest score of 0.000 for every prompt; with the loss ``native`` the presence logit falls.

    Cure: `helpers.annotations.read_split`, which refuses a file without the key ``annotations``;
    `helpers.datasets.count_objects` before any training, which `helpers.training.train` does.
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
    """Bring a file name to the form of `helpers.records.ImageRecord.image_id`."""
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
