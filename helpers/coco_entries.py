"""Turn single entries of a COCO file into records, naming the entry in every error."""

from __future__ import annotations

from pathlib import PurePosixPath

from helpers.errors import InputError
from helpers.images import upright_size
from helpers.records import Category, ImageRecord, ObjectAnnotation
from helpers.segmentations import rle_area, rle_box_xyxy, segmentation_to_rle


def is_id(value):
    """Tell whether a JSON value can be an id: a number or a string."""
    return isinstance(value, int | float | str)


def category_names(entries, where, table):
    """Map the category ids of one file to names.

    Parameters
    ----------
    entries : list of dict
        The value of ``categories``.
    where : os.PathLike
        The file, for errors.
    table : dict
        Filled with a `Category` for each new (id, name).

    Returns
    -------
    dict of int to str
        Names without surrounding space.

    Raises
    ------
    InputError
        If an id is no whole number or has two names, or a name is missing or blank.
    """
    names = {}
    for entry in entries:
        category_id, name, parent = entry.get("id"), entry.get("name"), entry.get("supercategory")
        if type(category_id) is not int:
            raise InputError(
                f"a category has the id {category_id!r}",
                where=where,
                fix="number the categories with whole numbers",
            )
        if not isinstance(name, str) or not name.strip():
            raise InputError(
                f"category {category_id} has no name, so there is nothing to ask for",
                where=where,
                fix="give it the noun that a person would use",
            )
        name = name.strip()
        if names.setdefault(category_id, name) != name:
            raise InputError(
                f"category id {category_id} means both {names[category_id]!r} and {name!r}",
                where=where,
                fix="give each category an id of its own",
            )
        parent = parent.strip() if isinstance(parent, str) and parent.strip() else None
        table.setdefault((category_id, name), Category(category_id, name, parent))
    return names


def image_record(where, image, annotations, names, root):
    """Build the record of one image.

    Parameters
    ----------
    where : os.PathLike
        The annotation file, for errors.
    image : dict
        The image entry: ``file_name``, ``width``, ``height``, and optionally ``contents``. Without
        width and height the header of the image file is read.
    annotations : list of dict
        Its annotation entries.
    names : dict of int to str
        From `category_names`.
    root : pathlib.Path
        Folder of the split; the image lies in it or in its ``images/``.

    Returns
    -------
    ImageRecord
        Boxes and masks as annotated, unchecked.

    Raises
    ------
    InputError
        If an entry cannot be understood.
    """
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        raise InputError("an image entry has no file_name", where=where, fix="add the file's name")
    image_id = PurePosixPath(file_name.replace("\\", "/")).as_posix().removeprefix("images/")
    candidates = (root / "images" / image_id, root / image_id)
    path = next((path for path in candidates if path.is_file()), candidates[0])
    place = f"{where}: image {image_id}"
    width, height = image.get("width"), image.get("height")
    if width is None and height is None:
        (width, height), _ = upright_size(path)
    if not all(type(side) is int and side > 0 for side in (width, height)):
        raise InputError(
            f"the size is {width!r} x {height!r}",
            where=place,
            fix="write width and height in pixels as whole numbers",
        )
    contents = image.get("contents", [])
    if not isinstance(contents, list) or not all(isinstance(noun, str) for noun in contents):
        raise InputError(
            "'contents' is no list of nouns", where=place, fix='write "contents": ["joint"]'
        )
    objects = tuple(
        _object(place, annotation, index, names, width, height)
        for index, annotation in enumerate(annotations)
    )
    return ImageRecord(image_id, path, width, height, objects, frozenset(contents))


def _object(where, annotation, index, names, width, height):
    """Build one object from its annotation entry."""
    annotation_id, category_id = annotation.get("id", index), annotation.get("category_id")
    where = f"{where}, annotation {annotation_id}"
    if not is_id(category_id) or category_id not in names:
        raise InputError(
            f"category_id {category_id!r} has no name in 'categories'",
            where=where,
            fix=f"use one of {sorted(names)} or add the category with its name",
        )
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise InputError(
            f"iscrowd is {annotation['iscrowd']!r}", where=where, fix="write 0 for an object"
        )
    rle, mask_problem = None, None
    if annotation.get("segmentation") not in (None, [], {}):
        try:
            rle = segmentation_to_rle(annotation["segmentation"], height, width)
        except ValueError as error:
            mask_problem = str(error)
    box = annotation.get("bbox")
    has_own_box = box not in (None, [])
    return ObjectAnnotation(
        category=names[category_id],
        box_xyxy=_box_xyxy(box, where) if has_own_box else _box_of_mask(rle, where),
        rle=rle,
        is_crowd=bool(annotation.get("iscrowd", 0)),
        annotation_id=annotation_id,
        has_own_box=has_own_box,
        mask_problem=mask_problem,
    )


def _box_xyxy(box, where):
    """Convert COCO's [x, y, width, height] in pixels; NaN is kept for the data checks to name."""
    if not (isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) for n in box)):
        raise InputError(
            f"bbox is {box!r}, not [x, y, width, height]",
            where=where,
            fix="write four numbers in pixels",
        )
    x, y, width, height = (float(number) for number in box)
    return (x, y, x + width, y + height)


def _box_of_mask(rle, where):
    """Take the tight box of the mask of an annotation without a box."""
    if rle is None or rle_area(rle) == 0:
        raise InputError(
            "the annotation has neither a box nor a mask",
            where=where,
            fix="add 'bbox': [x, y, width, height] in pixels or remove the annotation",
        )
    return rle_box_xyxy(rle)
