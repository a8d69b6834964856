"""What a reader of any format returns: images, objects as COCO entries, and names, by split."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from helpers.annotations import SPLIT_FOLDERS
from helpers.errors import InputError
from helpers.images import IMAGE_SUFFIXES
from helpers.records import Category

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
    categories : tuple of helpers.records.Category
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
    tuple of helpers.records.Category
    """
    return tuple(
        Category(number, name, None) for number, name in enumerate(dict.fromkeys(names), 1)
    )
