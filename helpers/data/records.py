"""What annotation files say, and which prompts are asked about it: present ones, and absent ones drawn."""

import difflib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from helpers.data.masks import box_to_rle, clip_box, rle_area
from helpers.errors import InputError

REPLAYED_PER_IMAGE = 2  # words in an epoch; each costs as much as a prompt of one's own


@dataclass(frozen=True)
class ObjectAnnotation:
    """One annotated object, as it stands in the file, right or wrong."""

    category: str  # its name, or the noun it is asked by
    box_xyxy: tuple[float, float, float, float]  # pixels, neither clipped nor repaired
    rle: Mapping | None  # "size" [height, width] and "counts" text; None if there is none to read
    is_crowd: bool = False  # a region that may hold many objects is no target
    annotation_id: int | str = 0
    has_own_box: bool = True  # False: there is no bbox, and the tight box of the mask was taken
    mask_problem: str | None = None  # why a segmentation that is in the file could not be read
    file_category: str | None = None  # the name in the file, where another noun is asked
    area_px: float | None = None  # as the file states it


@dataclass(frozen=True)
class ImageRecord:
    """One image and all that is annotated in it."""

    image_id: str  # file name relative to the folder of images; the same in both layouts
    path: Path  # need not exist
    width: int  # pixels, upright, as the annotation file states them
    height: int
    objects: tuple[ObjectAnnotation, ...]  # empty if the image was looked at and shows none
    contents: frozenset[str] = frozenset()  # further nouns in it, never asked as absent
    contradiction: str | None = None  # two statements about the image that differ


@dataclass(frozen=True)
class Category:
    """An entry of the category table."""

    category_id: int
    name: str
    supercategory: str | None


@dataclass(frozen=True)
class Split:
    """All images of one split, in the order of their `image_id`."""

    name: str  # train, valid, test or another folder's name
    root: Path
    layout: str  # "coco" or "per_image"
    categories: tuple[str, ...]  # to ask about; a parent without annotations is left out
    records: tuple[ImageRecord, ...]
    category_table: tuple[Category, ...] = ()  # every entry of the file, parents included
    unannotated: tuple[Path, ...] = ()  # images below the folder that no annotation mentions
    unread: tuple[Path, ...] = ()  # any other files below the folder

    @property
    def num_objects(self):
        """int: annotated objects in the files, crowd regions included."""
        return sum(len(record.objects) for record in self.records)

    @property
    def used_categories(self):
        """Those of the categories that objects have, a list of str."""
        used = {item.category for record in self.records for item in record.objects}
        return [name for name in self.categories if name in used]


def true_objects(record):
    """List the objects of an image but for crowd regions and boxes without area inside it."""
    return [
        item
        for item in record.objects
        if not item.is_crowd and clip_box(item.box_xyxy, record.width, record.height) is not None
    ]


def mask_fits_image(record, item):
    """Return whether an object has a readable mask of the size of its image."""
    return item.rle is not None and list(item.rle["size"]) == [record.height, record.width]


def has_mask(record, item):
    """Return whether an object has a mask of its image's size with a pixel in it."""
    return mask_fits_image(record, item) and rle_area(item.rle) > 0


def true_rle(record, item):
    """Return the mask of an object from `true_objects`; without one, its filled box."""
    if has_mask(record, item):
        return dict(item.rle)
    box_xyxy = clip_box(item.box_xyxy, record.width, record.height)
    return box_to_rle(box_xyxy, record.width, record.height)


def rename_categories(split, prompts_by_category):
    """Give the categories of a split the nouns they are asked by.

    Parameters
    ----------
    split : Split
    prompts_by_category : dict of str to str
        Category to noun: ``{"0": "pothole"}``. Names that the split lacks make no difference.

    Returns
    -------
    Split
        Categories with the same noun become one. What an object is called in the files stays in
        ``file_category`` and is never asked as absent.
    """
    if not prompts_by_category:
        return split
    nouns = {name: noun for name, noun in prompts_by_category.items() if noun != name}
    records = []
    for record in split.records:
        objects = [
            replace(item, category=nouns[item.category], file_category=item.category)
            if item.category in nouns
            else item
            for item in record.objects
        ]
        contents = record.contents | {nouns[noun] for noun in record.contents if noun in nouns}
        records.append(replace(record, objects=tuple(objects), contents=contents))
    table = {}
    for entry in split.category_table:
        name = nouns.get(entry.name, entry.name)
        table.setdefault(name, replace(entry, name=name))
    return replace(
        split,
        categories=tuple(dict.fromkeys(nouns.get(name, name) for name in split.categories)),
        records=tuple(records),
        category_table=tuple(table.values()),
    )


def refuse_unknown_categories(prompts_by_category, splits):
    """Raise InputError for a key of the mapping that no split, as read, has as a category."""
    names = {entry.name for split in splits for entry in split.category_table}
    for key in prompts_by_category:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            fix = f"did you mean '{close[0]}'?" if close else f"use one of {sorted(names)}"
            message = f"data.prompts_by_category names '{key}', which is no category of the dataset"
            raise InputError(message, where=splits[0].root.parent if splits else None, fix=fix)


@lru_cache(maxsize=10_000)
def normalise_noun(noun):
    """Reduce a noun to lower case singular words: ``"Concrete_cracks "`` to ``"concrete crack"``."""
    return " ".join(_singular(word) for word in re.split(r"[\W_]+", noun.casefold()) if word)


def _singular(word):
    """Take a regular English plural ending off a word, leaving words like ``moss`` alone."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def plain_prompt(prompt):
    """Bring a prompt to lower case with single spaces, which is all the same to the tokenizer."""
    return " ".join(prompt.casefold().split())


def nouns_overlap(first, second):
    """Return whether one noun may be true wherever the other is, like "bricks" and "brick wall"."""
    words, others = set(normalise_noun(first).split()), set(normalise_noun(second).split())
    if not words or not others:  # a name like "-" overlaps with itself only
        return first.strip() == second.strip()
    return words <= others or others <= words


def present_prompts(record, categories, prompt=None):
    """Map the categories, or the one prompt in their place, to the objects of an image, if any."""
    # One that loses all its objects, as crowd regions or outside the image, is not asked at all: as
    # absent, it would teach the opposite.
    objects = true_objects(record)
    groups = {name: [item for item in objects if item.category == name] for name in categories}
    groups = groups if prompt is None else {prompt: objects}
    return {name: items for name, items in groups.items() if items}


def absent_candidates(record, nouns):
    """List those of some nouns that overlap with nothing known to be in a picture.

    Known are the ``contents`` of its `ImageRecord` and the names of its objects, of crowds too.
    """
    in_picture = {item.category for item in record.objects} | record.contents
    in_picture |= {item.file_category for item in record.objects if item.file_category}
    return [noun for noun in nouns if not any(nouns_overlap(noun, known) for known in in_picture)]


def absent_prompts(record, own_names, other_nouns, count, *, seed, epoch):
    """Draw ``count`` distinct absent prompts of an image, or as many as there are."""
    # An image without any object is asked for at least one of the dataset's own names, even at 0.
    own = absent_candidates(record, own_names)
    others = [noun for noun in absent_candidates(record, other_nouns) if noun not in own]
    generator = _generator(record, seed, epoch)
    first = []
    if not record.objects and own:
        first = [own.pop(int(generator.integers(len(own))))]
    pool = own + others
    drawn = generator.permutation(len(pool))[: max(count - len(first), 0)]
    return first + [pool[index] for index in drawn]


def replayed_prompts(record, answers, *, seed, epoch):
    """Draw at most `REPLAYED_PER_IMAGE` of the words in ``answers``, which maps them to objects."""
    words = [word for word, objects in answers.items() if objects]
    drawn = _generator(record, seed, epoch).permutation(len(words))[:REPLAYED_PER_IMAGE]
    return {words[index]: answers[words[index]] for index in sorted(drawn)}


def _generator(record, seed, epoch):
    """Return the generator of an image in an epoch."""
    name = zlib.crc32(record.image_id.encode("utf-8", "surrogatepass"))
    return np.random.default_rng([seed, epoch, name])
