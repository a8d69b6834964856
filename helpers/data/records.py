"""Ask for a category by another noun than its name in the files: a synonym, a singular, a word."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.errors import InputError


@dataclass(frozen=True)
class ObjectAnnotation:
    """One annotated object, as it stands in the file, right or wrong.

    Attributes
    ----------
    category : str
        Name of its category.
    box_xyxy : tuple of float
        ``(x0, y0, x1, y1)`` in pixels, converted from the file's ``[x, y, width, height]`` and
        neither clipped nor repaired.
    rle : dict or None
        The mask as COCO compressed run lengths, ``size`` [height, width] and ``counts`` text;
        None without a readable segmentation.
    is_crowd : bool
        True for a region that may hold many objects; it is no target of training.
    annotation_id : int or str
        As in the file.
    has_own_box : bool
        False if the file has no ``bbox`` and the tight box of the mask was taken.
    mask_problem : str or None
        Why a segmentation that is in the file could not be read.
    file_category : str or None
        Its category's name in the file, where it is asked by another noun
        (`helpers.data.records`).
    """

    category: str
    box_xyxy: tuple[float, float, float, float]
    rle: Mapping | None
    is_crowd: bool = False
    annotation_id: int | str = 0
    has_own_box: bool = True
    mask_problem: str | None = None
    file_category: str | None = None


@dataclass(frozen=True)
class ImageRecord:
    """One image and all that is annotated in it.

    Attributes
    ----------
    image_id : str
        File name relative to the folder of images; the same in both layouts.
    path : pathlib.Path
        The image file; it need not exist.
    width, height : int
        Pixels, upright, as the annotation file states them.
    objects : tuple of ObjectAnnotation
        Empty for an image that was looked at and shows none.
    contents : frozenset of str
        Further nouns known to be in the picture, from the optional key ``contents``; none of them
        is ever asked as an absent prompt.
    """

    image_id: str
    path: Path
    width: int
    height: int
    objects: tuple[ObjectAnnotation, ...]
    contents: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Category:
    """An entry of the category table: its number, its name, and its parent's name or None."""

    category_id: int
    name: str
    supercategory: str | None


@dataclass(frozen=True)
class Split:
    """All images of one split.

    Attributes
    ----------
    name : str
        ``train``, ``valid``, ``test`` or another folder's name.
    root : pathlib.Path
        The split's folder.
    layout : str
        ``coco`` (one ``_annotations.coco.json``) or ``per_image`` (one JSON per image).
    categories : tuple of str
        Names to ask about, in the order of the file, each once. A parent without annotations, as
        some exports add, is left out: it would be asked as absent on every image.
    records : tuple of ImageRecord
        In the order of their `image_id`.
    category_table : tuple of Category
        Every entry of the file, parents included.
    unannotated : tuple of pathlib.Path
        Images in the folder that no annotation mentions; they are not used.
    """

    name: str
    root: Path
    layout: str
    categories: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    category_table: tuple[Category, ...] = ()
    unannotated: tuple[Path, ...] = ()

    @property
    def num_objects(self):
        """int: annotated objects in the files, crowd regions included."""
        return sum(len(record.objects) for record in self.records)


def rename_categories(split, prompts_by_category):
    """Give the categories of a split the nouns they are asked by.

    Parameters
    ----------
    split : helpers.data.records.Split
        As read from its files.
    prompts_by_category : dict of str to str
        ``data.prompts_by_category`` of the config: category name to noun, for example
        ``{"cracks": "crack", "0": "pothole"}``. Names that the split lacks make no difference.

    Returns
    -------
    helpers.data.records.Split
        Everything that makes prompts from it asks the nouns. Categories with one noun are one
        category, so that one query gets all their objects. What an object is called in the files
        stays in ``file_category``: that word is in the picture, too, and is never asked as absent.
    """
    if not prompts_by_category:
        return split
    records = tuple(_renamed_record(record, prompts_by_category) for record in split.records)
    categories = (prompts_by_category.get(name, name) for name in split.categories)
    table = {}
    for entry in split.category_table:
        name = prompts_by_category.get(entry.name, entry.name)
        table.setdefault(name, replace(entry, name=name))
    return replace(
        split,
        categories=tuple(dict.fromkeys(categories)),
        records=records,
        category_table=tuple(table.values()),
    )


def _renamed_record(record, prompts_by_category):
    """Rename the objects of an image, and say of what else is in it by which noun it is asked."""
    objects = tuple(_renamed(item, prompts_by_category) for item in record.objects)
    nouns = {prompts_by_category[noun] for noun in record.contents if noun in prompts_by_category}
    return replace(record, objects=objects, contents=record.contents | nouns)


def _renamed(item, prompts_by_category):
    """Rename one object, if its category is to be asked by another noun."""
    noun = prompts_by_category.get(item.category, item.category)
    if noun == item.category:
        return item
    return replace(item, category=noun, file_category=item.category)


def refuse_unknown_categories(prompts_by_category, splits):
    """Make sure that every key of a mapping is a category of the dataset.

    Parameters
    ----------
    prompts_by_category : dict of str to str
        See `rename_categories`.
    splits : sequence of helpers.data.records.Split
        As read, not renamed.

    Raises
    ------
    InputError
        Naming the key and the category it may have meant.
    """
    names = {entry.name for split in splits for entry in split.category_table}
    names |= {name for split in splits for name in split.categories}
    for key in prompts_by_category:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            fix = (
                f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(sorted(names))}"
            )
            raise InputError(
                f"data.prompts_by_category names '{key}', which is no category of the dataset",
                where=splits[0].root.parent if splits else None,
                fix=fix,
            )
