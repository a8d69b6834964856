"""Read Pascal VOC: an XML file of boxes per image, polygons in it, masks beside it.

`supervision.DetectionDataset.from_pascal_voc` is not used. It knows neither ``ImageSets`` nor
``SegmentationObject``, so that masks and splits are lost, decodes every image to learn its size,
moves every box by one pixel even where the files count from 0, and takes an image without an XML
file for one that shows nothing.
"""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from helpers.errors import InputError
from helpers.images import upright_size
from helpers.segmentations import mask_to_rle, rle_box_xyxy
from helpers.source_data import (
    WHOLE,
    Source,
    SourceImage,
    images_in,
    numbered,
    split_folders,
)

VOID = 255  # value of border pixels in SegmentationObject
MIN_FIT = 0.5  # IoU of a mask's tight box with the box of its object


def is_voc(root):
    """Tell whether a folder holds XML files of annotations, in ``Annotations/`` or per split."""
    return root.is_dir() and any(
        any(_xml_folder(folder).glob("*.xml")) for folder in split_folders(root).values()
    )


def read_voc(root):
    """Read Pascal VOC annotations.

    Parameters
    ----------
    root : pathlib.Path
        Holds ``Annotations/*.xml``, ``JPEGImages/`` and optionally ``SegmentationObject/*.png``
        and ``ImageSets/Main/{train,val,test}.txt``; or a folder per split with XML files and
        images side by side, as Roboflow exports them.

    Returns
    -------
    helpers.source_data.Source
        Boxes become ``[x, y, width, height]``. The files count pixels from 1 and include the last
        one, unless a corner is 0: then they count from 0. A mask goes to the object whose box it
        fits best; an object without one keeps its box only. Images without an XML file are left
        out, and ``notes`` count them.

    Raises
    ------
    InputError
        Naming the file and what cannot be read in it.
    """
    folders = split_folders(root)
    trees = {
        split: {
            path.stem: (path, _parse(path)) for path in sorted(_xml_folder(folder).glob("*.xml"))
        }
        for split, folder in folders.items()
    }
    corners = [
        _number(box, key, path)
        for files in trees.values()
        for path, tree in files.values()
        for box in tree.iterfind("object/bndbox")
        for key in ("xmin", "ymin")
    ]
    first = 0 if min(corners, default=1) < 1 else 1
    splits, unused, unlisted = {}, 0, 0
    for split, folder in folders.items():
        images = (
            images_in(folder / "JPEGImages") or images_in(folder / "images") or images_in(folder)
        )
        unused += len(images.keys() - trees[split].keys())
        splits[split] = [
            _image(path, tree, images, folder / "SegmentationObject", first)
            for path, tree in trees[split].values()
        ]
    if folders == {WHOLE: root}:
        total = len(splits[WHOLE])
        splits = _by_image_sets(root, splits[WHOLE])
        unlisted = total - sum(map(len, splits.values()))
    names = [
        item["category"] for images in splits.values() for one in images for item in one.objects
    ]
    notes = [f"{unused} images have no XML file and are left out"] if unused else []
    notes += [f"{unlisted} images are in no list of ImageSets"] if unlisted else []
    return Source("voc", splits, numbered(names), tuple(notes))


def _xml_folder(folder):
    """Return where the XML files of a split lie."""
    nested = folder / "Annotations"
    return nested if nested.is_dir() else folder


def _parse(path):
    """Parse one XML file."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise InputError(
            f"is no complete XML ({error})", where=path, fix="export it again"
        ) from error


def _text(element, key, where):
    """Return the text of a child element, which must be there."""
    value = element.findtext(key)
    if value is None or not value.strip():
        raise InputError(
            f"<{element.tag}> has no <{key}>", where=where, fix="export the annotations again"
        )
    return value.strip()


def _number(element, key, where):
    """Return the number in a child element, which must be there."""
    text = _text(element, key, where)
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"<{key}> is no number but {text!r}", where=where, fix="export the annotations again"
        ) from error


def _image(where, tree, images, mask_folder, first):
    """Read one annotation file; `first` is the number of the first pixel."""
    path = images.get(where.stem)
    if path is None:
        raise InputError(
            f"there is no image '{where.stem}' beside it or in JPEGImages/",
            where=where,
            fix="restore the image or remove the file",
        )
    (width, height), _ = upright_size(path)
    objects = [_object(element, where, first) for element in tree.iterfind("object")]
    mask_file = mask_folder / f"{where.stem}.png"
    if mask_file.is_file():
        _add_masks(objects, mask_file)
    return SourceImage(path, width, height, tuple(objects))


def _object(element, where, first):
    """Read one object: a box, and a polygon if there is one."""
    box = element.find("bndbox")
    if box is None:
        raise InputError("<object> has no <bndbox>", where=where, fix="export the file again")
    corners = [_number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        points = [float(point.text) - first for point in _points(element)]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"its <polygon> is not x1, y1, x2, y2, ... ({error})",
            where=where,
            fix="export the file again",
        ) from error
    x0, y0 = corners[0] - first, corners[1] - first
    entry = {
        "category": _text(element, "name", where),
        "bbox": [x0, y0, corners[2] - x0, corners[3] - y0],
        "iscrowd": 0,
    }
    return entry | ({"segmentation": [points]} if points else {})


def _points(element):
    """Return the elements x1, y1, x2, y2, ... of an object's polygon in that order."""
    polygon = element.find("polygon")
    if polygon is None:
        return []
    return sorted(polygon, key=lambda point: (int(point.tag[1:]), point.tag[0]))


def _add_masks(objects, mask_file):
    """Give each mask of a SegmentationObject picture to the object whose box it fits best."""
    values = np.array(Image.open(mask_file))
    if values.ndim != 2:
        raise InputError(
            "has no palette or grey values", where=mask_file, fix="save it as a palette PNG"
        )
    rles = [mask_to_rle(values == value) for value in np.unique(values) if value not in (0, VOID)]
    boxes_xywh = [entry["bbox"] for entry in objects]
    fits = np.array([[_box_iou(rle_box_xyxy(rle), box) for box in boxes_xywh] for rle in rles])
    matched = linear_sum_assignment(-fits) if fits.size else ([], [])
    given = [
        (row, column) for row, column in zip(*matched, strict=True) if fits[row, column] >= MIN_FIT
    ]
    if len(given) < len(rles):
        raise InputError(
            f"{len(rles) - len(given)} of {len(rles)} masks fit no box of the XML file",
            where=mask_file,
            fix="annotate the object in both files or in neither",
        )
    for row, column in given:
        objects[column]["segmentation"] = rles[row]


def _box_iou(box_xyxy, box_xywh):
    """Compute the IoU of two boxes in pixels."""
    x, y, width, height = box_xywh
    across = min(box_xyxy[2], x + width) - max(box_xyxy[0], x)
    down = min(box_xyxy[3], y + height) - max(box_xyxy[1], y)
    shared = max(across, 0) * max(down, 0)
    area = (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])
    return shared / (area + width * height - shared)


def _by_image_sets(root, images):
    """Divide images as the lists in ``ImageSets`` say; without lists they stay one split."""
    kind = "Segmentation" if (root / "SegmentationObject").is_dir() else "Main"
    splits = {}
    for stem, split in (("train", "train"), ("val", "valid"), ("test", "test")):
        path = root / "ImageSets" / kind / f"{stem}.txt"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            listed = {line.split()[0] for line in lines if line.strip()}
            splits[split] = [image for image in images if image.path.stem in listed]
    return splits or {WHOLE: images}
