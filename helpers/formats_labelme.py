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

import numpy as np
from PIL import Image, UnidentifiedImageError

from helpers.annotations import read_json_object
from helpers.errors import InputError
from helpers.images import upright_size
from helpers.segmentations import mask_to_rle
from helpers.source_data import Source, SourceImage, numbered, split_folders

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
    helpers.source_data.Source
        Polygons, rectangles, circles and painted masks become objects. Polygons with one label
        and one ``group_id`` are one object. A rectangle has a box only.

    Raises
    ------
    InputError
        Naming the file and what cannot be read in it: also a line or a point, which has no area.
    """
    splits = {
        split: [_image(path, content) for path, content in _files(folder)]
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


def _image(where, content):
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
        entry = _object(shape, height, width, f"{where}, shape {index}")
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


def _object(shape, height, width, where):
    """Turn one shape into a COCO entry."""
    kind, label = shape.get("shape_type", "polygon"), shape.get("label")
    if not isinstance(label, str) or not label.strip():
        raise InputError("has no label", where=where, fix="name it after what the picture shows")
    entry = {"category": label.strip(), "iscrowd": 0}
    points = _points(shape, where)
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


def _points(shape, where):
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
