"""What was annotated: objects, images and splits, independent of the files they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


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
        (`helpers.category_prompts`).
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
