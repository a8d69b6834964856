"""A dataset as its reader returns it, and what all readers share: files, texts, splits, polygons.

`supervision.DetectionDataset` is not used: it rounds polygons to whole pixels, forgets ids and
further keys, and skips circles and painted masks, which would then be asked as absent.
"""

import codecs
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from helpers.data.coco import SPLIT_FOLDERS, SPLIT_WORDS
from helpers.data.images import upright_size
from helpers.data.masks import mask_to_rle
from helpers.data.records import Category
from helpers.errors import InputError, explain
from helpers.files import files_below

WHOLE = "all"  # name of the one split of a source that has none
MEANINGS = ("auto", "outline", "pixels")
PRECISION = 1e-5  # share of a side by which a coordinate of five decimals may miss what was meant


@dataclass(frozen=True)
class SourceImage:
    """One image with its objects."""

    path: Path
    width: int  # pixels, upright
    height: int
    objects: tuple[dict, ...]  # COCO entries in pixels; `category`, a name, in place of the ids
    extra: dict = field(default_factory=dict)  # further keys of the image entry, such as contents
    files: tuple[Path, ...] = ()  # the annotation files of this image alone
    name: str | None = None  # in the new dataset


@dataclass(frozen=True)
class Source:
    """A dataset as its reader returns it."""

    format: str
    splits: dict[str, list[SourceImage]]  # by name; `WHOLE` alone if the source is not split
    categories: list[Category]
    notes: list[str]  # what a person should know about the reading
    files: list[Path]  # those that speak of more than one image
    header: dict = field(default_factory=dict)  # what a COCO file says about the whole
    unused: dict[str, int] = field(default_factory=dict)  # files not read, by ending


def folder_named(root, *names):
    """Return the first folder in `root` that has one of the names in any case, or None."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    folders = {path.name.casefold(): path for path in reversed(folders)}
    return next((folders[name] for name in names if name in folders), None)


def refuse_outside(path, root, where=None):
    """Raise InputError if a file, all links followed, does not lie below the source."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        message = f"'{real}' lies outside the source, and nothing outside is taken"
        fix = f"copy it into {root}, or convert a folder that holds both"
        raise InputError(message, where=where or path, fix=fix)


def picture_size(path, root):
    """Return the upright (width, height) in pixels of an image file inside the source."""
    refuse_outside(path, root)
    return upright_size(path)[0]


def read_text(path, encoding="utf-8-sig"):
    """Read a text; a byte order mark of UTF-16 goes before the encoding."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    message = f"is no text in {encoding.removesuffix('-sig')}"
    with explain((UnicodeDecodeError, LookupError), message, where=path, fix="save it as UTF-8"):
        return content.decode(encoding)


def split_of_name(name):
    """Return the split that a name such as ``val2017`` or ``instances_train`` means, or None."""
    words = re.findall(r"[a-z]+", name.casefold())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def split_folders(root):
    """Map each split to its folder directly below `root`; ``{WHOLE: root}`` without any."""
    folders = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        name = SPLIT_WORDS.get(path.name.casefold()) if path.is_dir() else None
        if name in folders:
            both = f"'{folders[name].name}' and '{path.name}' both mean the split '{name}'"
            raise InputError(both, where=root, fix="rename one of them")
        if name is not None:
            folders[name] = path
    return {name: folders[name] for name in SPLIT_FOLDERS if name in folders} or {WHOLE: root}


def by_stem(folder, suffixes):
    """Map the path below `folder`, without ending, to each file; equal ones raise InputError."""
    files = {}
    for path in files_below(folder, suffixes):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in files:
            both = f"an annotation could belong to '{files[stem].name}' or '{path.name}'"
            raise InputError(both, where=path.parent, fix="rename or remove one of them")
        files[stem] = path
    return files


def note_of(items, text):
    """Return a note on some things in a list, with up to three examples; without any, no note."""
    names = list(dict.fromkeys(map(str, items)))
    examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(items)} {text}: {examples}"] if items else []


def note_of_doubles(names):
    """Return a note on the names that several classes have."""
    doubles = sorted(name for name, count in Counter(names).items() if count > 1)
    return note_of(doubles, "names belong to several classes, which become one")


def numbered(names):
    """Return categories of the names, repeated ones once, numbered from 1."""
    return [Category(number, name, None) for number, name in enumerate(dict.fromkeys(names), 1)]


def settle_polygons(source, meaning="auto"):
    """Turn polygons whose corners are pixels into masks; leave outlines as they are."""
    # COCO's polygons are outlines: a square of 4 pixels reaches from 2 to 6. A contour that OpenCV
    # traced names the outermost pixels, 2 to 5, and whoever reads it as an outline loses half a
    # pixel all around: a pothole keeps an IoU of 0.97, a crack 0.77, a crack of one pixel vanishes.
    if meaning not in MEANINGS:
        raise InputError(f"polygons are {meaning!r}", fix=f"use one of {', '.join(MEANINGS)}")
    images = [image for group in source.splits.values() for image in group]
    items = [(image, item) for image in images for item in image.objects]
    items = [(image, item) for image, item in items if isinstance(item.get("segmentation"), list)]
    # With "auto", corners are pixels if all are whole numbers, as those of traced contours are.
    whole = all(
        np.abs(np.subtract(part, np.round(part))).max()
        <= PRECISION * max(image.width, image.height)
        for image, item in items
        for part in item["segmentation"]
    )
    if not items or meaning == "outline" or (meaning == "auto" and not whole):
        return source
    for image, item in items:
        mask = np.zeros((image.height, image.width), dtype=np.uint8)
        for part in item["segmentation"]:  # one by one: together, overlaps would cancel each other
            cv2.fillPoly(mask, [np.round(part).astype(np.int32).reshape(-1, 1, 2)], 1)
        item["segmentation"] = mask_to_rle(mask)
    note = "corners of polygons are whole pixels, which belong to the object; see --polygons"
    return replace(source, notes=[*source.notes, note])
