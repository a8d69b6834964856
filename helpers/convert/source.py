"""A dataset as its reader returns it, and what all readers share: files, texts, splits, polygons."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from helpers.data.coco import SPLIT_FOLDERS
from helpers.data.images import upright_size
from helpers.data.masks import mask_to_rle
from helpers.data.records import Category
from helpers.errors import InputError

HEIC = (".heic", ".heif")
WHOLE = "all"  # name of the one split of a source that has none
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
    files : tuple of pathlib.Path
        The annotation files of this image alone.
    new_name : str, optional
        File name in the new dataset, if another than that of the file.
    """

    path: Path
    width: int
    height: int
    objects: tuple[dict, ...]
    extra: dict = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    new_name: str | None = None

    @property
    def name(self):
        """Return the file name in the new dataset, by default that of the file."""
        return self.new_name or self.path.name


@dataclass(frozen=True)
class Source:
    """A dataset as its reader returns it.

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
    files : tuple of pathlib.Path
        The files that speak of more than one image.
    unused : dict of str to int
        Files below the source that were not read, counted by their ending.
    """

    format: str
    splits: dict[str, list[SourceImage]]
    categories: tuple[Category, ...]
    notes: tuple[str, ...] = ()
    header: dict = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    unused: dict[str, int] = field(default_factory=dict)

    @property
    def images(self):
        """Return the images of all splits."""
        return [image for images in self.splits.values() for image in images]


def is_hidden(name):
    """Return whether a system made the file: ``._a.png`` and ``__MACOSX`` of a Mac, for example."""
    return name.startswith((".", "__MACOSX")) or name.casefold() in ("thumbs.db", "desktop.ini")


def files_below(folder, suffixes=()):
    """List the visible files below a folder in order; links to folders are not followed."""
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        paths += [Path(place, name) for name in sorted(names) if not is_hidden(name)]
    return [path for path in paths if not suffixes or path.suffix.lower() in suffixes]


def files_in(folder, suffixes):
    """List the visible files directly in a folder, in order; none if it is missing."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else ()
    return [
        p for p in paths if p.suffix.lower() in suffixes and not is_hidden(p.name) and p.is_file()
    ]


def refuse_outside(path, root, where=None):
    """Raise InputError if a file, all links followed, does not lie below the source."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise InputError(
            f"'{real}' lies outside the source, and nothing outside is taken",
            where=where or path,
            fix=f"copy it into {root}, or convert a folder that holds both",
        )


def picture_size(path, root):
    """Return the upright (width, height) in pixels of an image file inside the source."""
    refuse_outside(path, root)
    if path.suffix.lower() in HEIC:
        raise InputError("HEIC pictures cannot be read", where=path, fix="save it as JPEG or PNG")
    size, _ = upright_size(path)
    return size


def read_text(path):
    """Read a text in UTF-8, or in UTF-16 with its byte order mark."""
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_decoded(path, error) from error


def not_decoded(path, error):
    """Return the InputError for a text in another encoding."""
    return InputError(
        f"is no text in {error.encoding} (byte 0x{error.object[error.start]:02x} at {error.start})",
        where=path,
        fix="save it as UTF-8",
    )


def split_of_name(name):
    """Return the split that a name such as ``val2017`` or ``instances_train`` speaks of, or None."""
    words = re.findall(r"[a-z]+", name.casefold())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def split_folders(root):
    """Map each split to its folder directly below `root`; ``{WHOLE: root}`` without any."""
    folders = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
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


def folder_named(root, *names):
    """Return the first folder in `root` that has one of the names in any case, or None."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    matches = (
        path for name in names for path in folders if path.name.casefold() == name.casefold()
    )
    return next(matches, None)


def by_stem(paths, folder):
    """Map the path without ending, relative to a folder, to each file; a tie raises InputError."""
    files = {}
    for path in paths:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            raise InputError(
                f"'{files[stem].name}' and '{path.name}' have one stem, so an annotation "
                "file could belong to either",
                where=path.parent,
                fix="rename or remove one of them",
            )
        files[stem] = path
    return files


def examples(names):
    """Return the first three of some names, each once, as text."""
    names = list(dict.fromkeys(map(str, names)))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def numbered(names):
    """Return categories of the names, repeated ones once, numbered from 1."""
    return tuple(
        Category(number, name, None) for number, name in enumerate(dict.fromkeys(names), 1)
    )


MEANINGS = ("auto", "outline", "pixels")
PRECISION = 1e-5  # share of a side by which a coordinate of five decimals may miss what was meant


def settle_polygons(source, meaning="auto"):
    """Turn polygons whose corners are pixels into masks; leave outlines as they are.

    COCO's polygons are outlines: a square of 4 pixels reaches from 2 to 6. A contour that OpenCV
    traced names the outermost pixels, 2 to 5, and whoever reads it as an outline loses half a pixel
    all around: a pothole keeps an IoU of 0.97, a crack 0.77, and a crack of one pixel vanishes.
    With ``auto``, corners are pixels if all are whole numbers, as traced contours are.
    """
    if meaning not in MEANINGS:
        raise InputError(f"polygons are {meaning!r}", fix=f"use one of {', '.join(MEANINGS)}")
    if meaning == "outline" or (meaning == "auto" and not _all_whole(source.images)):
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


def _all_whole(images):
    """Return whether there are polygons and all their corners are whole numbers."""
    has_polygons = False
    for image in images:
        limit = PRECISION * max(image.width, image.height)
        for corners in (corners for item in image.objects for corners in _polygons(item)):
            has_polygons = True
            if (np.abs(corners - np.round(corners)) > limit).any():
                return False
    return has_polygons


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
