"""What the corners of a polygon mean: points on the outline, or pixels that belong to the object.

COCO's polygons are outlines: a square of 4 pixels reaches from 2 to 6. A contour that OpenCV traced
names the outermost pixels, 2 to 5, and whoever reads it as an outline loses half a pixel all around:
a pothole keeps an IoU of 0.97, a crack 0.77, and a crack of one pixel vanishes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from helpers.data.coco import SPLIT_FOLDERS
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.masks import mask_to_rle
from helpers.data.records import Category
from helpers.errors import InputError

WHOLE = "all"
"""Name of the one split of a source that has none."""
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class SourceImage:
    """One image with its objects.

    Attributes
    ----------
    path : pathlib.Path
        The image file.
    width, height : int
        Pixels, upright.
    objects : tuple of dict
        COCO annotation entries without ids of image and category: ``category`` (its name),
        ``segmentation`` (polygons or run lengths as in the file, absent without a mask), ``bbox``
        ``[x, y, width, height]`` in pixels (absent if the mask says it), ``iscrowd``, and whatever
        else the file says.
    extra : dict
        Further keys of the image entry, such as ``contents``.
    """

    path: Path
    width: int
    height: int
    objects: tuple[dict, ...]
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A dataset as its reader found it.

    Attributes
    ----------
    format : str
        For example ``yolo``.
    splits : dict of str to list of SourceImage
        By name; `WHOLE` alone if the source is not split.
    categories : tuple of helpers.data.records.Category
        In the order of the files, each name once.
    notes : tuple of str
        What a person should know about the reading.
    header : dict
        What a COCO file says about the whole, such as ``info`` and ``licenses``.
    """

    format: str
    splits: dict[str, list[SourceImage]]
    categories: tuple[Category, ...]
    notes: tuple[str, ...] = ()
    header: dict = field(default_factory=dict)


def split_of_name(name):
    """Find the split that a folder or file name speaks of.

    Parameters
    ----------
    name : str
        For example ``"val2017"`` or ``"instances_train"``.

    Returns
    -------
    str or None
        ``train``, ``valid``, ``test``, or None.
    """
    words = re.findall(r"[a-z]+", name.casefold())
    found = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    return found[0] if found else None


def split_folders(root):
    """Find the folders of the splits directly in a folder.

    Parameters
    ----------
    root : pathlib.Path

    Returns
    -------
    dict of str to pathlib.Path
        By name of the split; ``{WHOLE: root}`` if there is no such folder.
    """
    folders = {}
    for path in sorted(root.iterdir()):
        name = SPLIT_WORDS.get(path.name.casefold()) if path.is_dir() else None
        if name is not None and name in folders:
            raise InputError(
                f"'{folders[name].name}' and '{path.name}' both mean the split '{name}'",
                where=root,
                fix="rename one of them",
            )
        if name is not None:
            folders[name] = path
    order = {name: folders[name] for name in SPLIT_FOLDERS if name in folders}
    return order or {WHOLE: root}


def images_in(folder):
    """List the images directly in a folder by their stem.

    Parameters
    ----------
    folder : pathlib.Path
        None are in a folder that does not exist.

    Returns
    -------
    dict of str to pathlib.Path
        In the order of the names.

    Raises
    ------
    InputError
        If two images have one stem, so that an annotation file could mean either.
    """
    images = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in images:
                raise InputError(
                    f"'{images[path.stem].name}' and '{path.name}' have one stem, so an annotation "
                    "file could belong to either",
                    where=folder,
                    fix="rename or remove one of them",
                )
            images[path.stem] = path
    return images


def numbered(names):
    """Make categories of names, numbered from 1.

    Parameters
    ----------
    names : iterable of str
        Repeated names count once.

    Returns
    -------
    tuple of helpers.data.records.Category
    """
    return tuple(
        Category(number, name, None) for number, name in enumerate(dict.fromkeys(names), 1)
    )


MEANINGS = ("auto", "outline", "pixels")
PRECISION = 1e-5
"""Share of the image's side by which a coordinate of five decimals may miss what was meant."""


def settle_polygons(source, meaning="auto"):
    """Turn polygons whose corners are pixels into masks; leave outlines as they are.

    Parameters
    ----------
    source : helpers.convert.source.Source
    meaning : {"auto", "outline", "pixels"}
        With ``auto``, corners are pixels if all of them are whole numbers, as traced contours
        are; hand-drawn polygons of today's tools are not.

    Returns
    -------
    helpers.convert.source.Source
        With a note if polygons were taken for pixels.

    Raises
    ------
    InputError
        For another meaning.
    """
    if meaning not in MEANINGS:
        raise InputError(f"polygons are {meaning!r}", fix=f"use one of {', '.join(MEANINGS)}")
    if meaning == "outline" or (meaning == "auto" and not _all_whole(source)):
        return source
    splits = {
        name: [
            replace(image, objects=tuple(_filled(item, image) for item in image.objects))
            for image in images
        ]
        for name, images in source.splits.items()
    }
    note = "corners of polygons are whole pixels, which belong to the object; see --polygons"
    return replace(source, splits=splits, notes=(*source.notes, note))


def _all_whole(source):
    """Tell whether there are polygons and all their corners are whole numbers."""
    seen = False
    for images in source.splits.values():
        for image in images:
            limit = PRECISION * max(image.width, image.height)
            for item in image.objects:
                for corners in _polygons(item):
                    seen = True
                    if (np.abs(corners - np.round(corners)) > limit).any():
                        return False
    return seen


def _polygons(item):
    """Return the polygons of an entry as arrays; none where it has run lengths or a box."""
    segmentation = item.get("segmentation")
    return [np.asarray(part) for part in segmentation] if isinstance(segmentation, list) else []


def _filled(item, image):
    """Fill the polygons of an entry, their border pixels included."""
    polygons = _polygons(item)
    if not polygons:
        return item
    mask = np.zeros((image.height, image.width), dtype=np.uint8)
    for corners in polygons:  # one by one: together, overlapping parts would cancel each other
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32).reshape(-1, 1, 2)], 1)
    return {**item, "segmentation": mask_to_rle(mask)}
