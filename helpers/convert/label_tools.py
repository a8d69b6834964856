"""Read LabelMe: a JSON file of shapes per image.

`supervision.DetectionDataset.from_labelme` is not used. It rounds polygons to whole pixels and
fills their border, holds every mask as a picture, and skips circles and painted masks with a
warning, so that an annotated object would be asked as absent.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import PureWindowsPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.optimize import linear_sum_assignment

from helpers.convert.source import (
    WHOLE,
    Source,
    SourceImage,
    images_in,
    numbered,
    split_folders,
)
from helpers.data.coco import read_json_object
from helpers.data.images import upright_size
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.errors import InputError

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
    helpers.convert.source.Source
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
            _voc_image(path, tree, images, folder / "SegmentationObject", first)
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


def _voc_image(where, tree, images, mask_folder, first):
    """Read one annotation file; `first` is the number of the first pixel."""
    path = images.get(where.stem)
    if path is None:
        raise InputError(
            f"there is no image '{where.stem}' beside it or in JPEGImages/",
            where=where,
            fix="restore the image or remove the file",
        )
    (width, height), _ = upright_size(path)
    objects = [_voc_object(element, where, first) for element in tree.iterfind("object")]
    mask_file = mask_folder / f"{where.stem}.png"
    if mask_file.is_file():
        _add_masks(objects, mask_file)
    return SourceImage(path, width, height, tuple(objects))


def _voc_object(element, where, first):
    """Read one object: a box, and a polygon if there is one."""
    box = element.find("bndbox")
    if box is None:
        raise InputError("<object> has no <bndbox>", where=where, fix="export the file again")
    corners = [_number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        points = [float(point.text) - first for point in _voc_points(element)]
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


def _voc_points(element):
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


CIRCLE_CORNERS = 64


def is_labelme(root):
    """Tell whether a folder holds JSON files with ``shapes``, directly or per split."""
    return root.is_dir() and any(_files(folder) for folder in split_folders(root).values())


def read_labelme(root):
    """Read LabelMe annotations.

    Parameters
    ----------
    root : pathlib.Path
        Holds JSON files and images, directly or in a folder per split.

    Returns
    -------
    helpers.convert.source.Source
        Polygons, rectangles, circles and painted masks become objects. Polygons with one label
        and one ``group_id`` are one object. A rectangle has a box only.

    Raises
    ------
    InputError
        Naming the file and what cannot be read in it: also a line or a point, which has no area.
    """
    splits = {
        split: [_labelme_image(path, content) for path, content in _files(folder)]
        for split, folder in split_folders(root).items()
    }
    names = [
        item["category"] for images in splits.values() for one in images for item in one.objects
    ]
    return Source("labelme", splits, numbered(sorted(set(names))))


def _files(folder):
    """Return path and content of the JSON files that hold shapes."""
    read = [(path, read_json_object(path)) for path in sorted(folder.glob("*.json"))]
    return [(path, content) for path, content in read if "shapes" in content]


def _labelme_image(where, content):
    """Read one file."""
    name = PureWindowsPath(str(content.get("imagePath") or "")).name
    path = where.parent / name
    if not name or not path.is_file():
        raise InputError(
            f"its image '{name}' is not beside it",
            where=where,
            fix="put the image there, or correct imagePath",
        )
    (width, height), _ = upright_size(path)
    stated = (content.get("imageWidth"), content.get("imageHeight"))
    if stated != (None, None) and stated != (width, height):
        raise InputError(
            f"says {stated[0]} x {stated[1]} pixels, the upright image has {width} x {height}",
            where=where,
            fix="annotate the image as it is, upright",
        )
    objects, groups = [], {}
    for index, shape in enumerate(content["shapes"]):
        entry = _labelme_object(shape, height, width, f"{where}, shape {index}")
        group = (entry["category"], shape.get("group_id"))
        first = groups.get(group) if shape.get("group_id") is not None else None
        if first is not None and isinstance(first.get("segmentation"), list):
            first["segmentation"] += _polygons_of(entry, f"{where}, shape {index}")
            continue
        groups[group] = entry
        objects.append(entry)
    return SourceImage(path, width, height, tuple(objects))


def _polygons_of(entry, where):
    """Return the polygons of an entry that belongs to a group of polygons."""
    if not isinstance(entry.get("segmentation"), list):
        raise InputError(
            "is grouped with a polygon and is none", where=where, fix="remove its group_id"
        )
    return entry["segmentation"]


def _labelme_object(shape, height, width, where):
    """Turn one shape into a COCO entry."""
    kind, label = shape.get("shape_type", "polygon"), shape.get("label")
    if not isinstance(label, str) or not label.strip():
        raise InputError("has no label", where=where, fix="name it after what the picture shows")
    entry = {"category": label.strip(), "iscrowd": 0}
    points = _labelme_points(shape, where)
    if kind == "polygon" and len(points) >= 3:
        return entry | {"segmentation": [points.ravel().tolist()]}
    if kind == "rectangle" and len(points) >= 2:
        low, high = points.min(axis=0), points.max(axis=0)
        return entry | {"bbox": [*low.tolist(), *(high - low).tolist()]}
    if kind == "circle" and len(points) == 2:
        angles = np.arange(CIRCLE_CORNERS) * 2 * math.pi / CIRCLE_CORNERS
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        corners = points[0] + ring * np.linalg.norm(points[1] - points[0])
        return entry | {"segmentation": [corners.ravel().tolist()]}
    if kind == "mask" and len(points) >= 1:
        return entry | {"segmentation": _painted(shape, points[0], height, width, where)}
    raise InputError(
        f"is a {kind} of {len(points)} points, which has no area",
        where=where,
        fix="draw a polygon around the object, or remove the shape",
    )


def _labelme_points(shape, where):
    """Return the points of a shape, (n, 2) in pixels."""
    try:
        points = np.array(shape.get("points"), dtype=float).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"its points are not pairs of numbers ({error})", where=where, fix="draw it again"
        ) from error
    if not np.isfinite(points).all():
        raise InputError("a point is not finite", where=where, fix="draw it again")
    return points


def _painted(shape, corner, height, width, where):
    """Put a painted mask, a PNG of its own box in base64, at its place in the image."""
    try:
        png = base64.b64decode(shape.get("mask") or "", validate=True)
        part = np.array(Image.open(io.BytesIO(png)).convert("L")) > 0
    except (binascii.Error, UnidentifiedImageError, TypeError, OSError) as error:
        raise InputError(
            f"its mask is no PNG in base64 ({error})", where=where, fix="draw it again"
        ) from error
    x, y = (round(float(number)) for number in corner)
    mask = np.zeros((height, width), dtype=bool)
    room = mask[max(y, 0) : y + part.shape[0], max(x, 0) : x + part.shape[1]]
    room[:] = part[max(-y, 0) :, max(-x, 0) :][: room.shape[0], : room.shape[1]]
    return mask_to_rle(mask)
