"""Read a split from either of two layouts into the same records.

``coco``: ``{split}/_annotations.coco.json`` with the images beside it or in ``images/``.
``per_image``: ``{split}/images/*.jpg`` with ``{split}/annotations/<stem>.json``.

What makes reading impossible raises `InputError`. What can be read but is wrong is read as it is:
`helpers.data_checks` finds it.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from helpers.data.images import IMAGE_SUFFIXES, upright_size
from helpers.data.masks import rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.data.records import Category, ImageRecord, ObjectAnnotation, Split
from helpers.errors import InputError
from helpers.files import resolve


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


COCO_FILE = "_annotations.coco.json"
LAYOUTS = ("coco", "per_image")
SPLIT_FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


def find_splits(data_dir):
    """List the splits of a dataset.

    Parameters
    ----------
    data_dir : str or os.PathLike
        A folder with one folder per split, see `helpers.files.resolve`.

    Returns
    -------
    list of str
        ``train``, ``valid`` (also for a folder called ``val``) and ``test`` first, then any other
        folder that holds annotations.

    Raises
    ------
    InputError
        If the folder is missing or no folder in it holds annotations.
    """
    data_dir = resolve(data_dir)
    if not data_dir.is_dir():
        raise InputError("no such folder", where=data_dir, fix="check the path of the dataset")
    folders = {path.name for path in data_dir.iterdir() if path.is_dir() and layouts_of(path)}
    names = [name for name, known in SPLIT_FOLDERS.items() if folders.intersection(known)]
    known = {folder for group in SPLIT_FOLDERS.values() for folder in group}
    names += sorted(folders - known)
    if not names:
        raise InputError(
            "holds no split",
            where=data_dir,
            fix=f"put {COCO_FILE}, or images/ and annotations/, into {data_dir.name}/train",
        )
    return names


def read_split(data_dir, split, layout=None):
    """Read all images and objects of one split; image files are not opened.

    Parameters
    ----------
    data_dir : str or os.PathLike
        A folder with one folder per split, see `helpers.files.resolve`.
    split : str
        Name of the split; ``val`` and ``valid`` mean the same.
    layout : {"coco", "per_image"}, optional
        Which annotations to read if both are there; by default ``coco``.

    Returns
    -------
    Split
        Both layouts give the same records for the same annotations.

    Raises
    ------
    InputError
        If folder, file or layout is missing, the JSON is truncated or lacks the keys that hold the
        objects, a category has no name, or an entry cannot be understood.
    """
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"there is no layout {layout!r}", fix=f"use one of {', '.join(LAYOUTS)}")
    name, root = split_folder(resolve(data_dir), split)
    present = layouts_of(root)
    if not present or (layout is not None and layout not in present):
        raise InputError(
            f"holds no annotations in the layout {layout or ' or '.join(LAYOUTS)}",
            where=root,
            fix=f"put {COCO_FILE}, or annotations/<image name>.json, into this folder",
        )
    layout = layout or present[0]
    entries = entries_of(root, layout)
    records, table = [], {}
    for where, image, objects, categories in entries:
        names = category_names(categories, where, table)
        records.append(image_record(where, image, objects, names, root))
    return _assemble(name, root, layout, records, list(table.values()))


def split_folder(data_dir, split):
    """Find the folder of a split.

    Parameters
    ----------
    data_dir : pathlib.Path
        The dataset.
    split : str
        ``val`` and ``valid`` mean the same.

    Returns
    -------
    name : str
        Its usual name.
    folder : pathlib.Path

    Raises
    ------
    InputError
        If there is no such folder.
    """
    name = next((name for name, folders in SPLIT_FOLDERS.items() if split in folders), split)
    for folder in SPLIT_FOLDERS.get(name, (split,)):
        if (data_dir / folder).is_dir():
            return name, data_dir / folder
    found = ", ".join(find_splits(data_dir))  # raises if the dataset itself is missing
    raise InputError(f"there is no split {split!r}", where=data_dir, fix=f"use one of {found}")


def layouts_of(root):
    """List the layouts whose annotation files a folder holds.

    Parameters
    ----------
    root : pathlib.Path
        Folder of a split.

    Returns
    -------
    list of {"coco", "per_image"}
        The default one first.
    """
    layouts = ["coco"] if (root / COCO_FILE).is_file() else []
    if (root / "annotations").is_dir():
        layouts.append("per_image")
    return layouts


def read_json_object(path):
    """Read a JSON file whose top level is an object.

    Parameters
    ----------
    path : pathlib.Path
        UTF-8, with or without a byte order mark.

    Returns
    -------
    dict

    Raises
    ------
    InputError
        If it is incomplete or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_parse_int)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"is no complete JSON ({error})", where=path, fix="export the annotations again"
        ) from error
    if not isinstance(content, dict):
        raise InputError("is a JSON without keys", where=path, fix="write a COCO object")
    return content


def _parse_int(digits):
    """Read a whole number; one beyond 64 bits becomes a float, which no check mistakes for a pixel."""
    return int(digits) if len(digits) < 19 else float(digits)


def _list_of(content, key, where):
    """Return ``content[key]``, which must be a list of objects; a missing key is no empty list."""
    if key not in content:
        raise InputError(
            f"has no key '{key}' but only {', '.join(sorted(content)) or 'nothing'}",
            where=where,
            fix=f"write the COCO key '{key}'; a missing key must not pass for an empty picture",
        )
    values = content[key]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"'{key}' is no list of objects", where=where, fix="write it as COCO does")
    return values


def entries_of(root, layout):
    """Walk through the annotations of a split as they stand in the files.

    Parameters
    ----------
    root : pathlib.Path
        Folder of the split.
    layout : {"coco", "per_image"}

    Yields
    ------
    tuple
        For each image: the file, the image entry, its annotation entries, all category entries.

    Raises
    ------
    InputError
        If a file is incomplete or its entries do not fit together.
    """
    return coco_entries(root / COCO_FILE) if layout == "coco" else _per_image_entries(root)


def coco_entries(where):
    """Walk through one COCO file.

    Parameters
    ----------
    where : pathlib.Path
        The file.

    Yields
    ------
    tuple
        As `entries_of`.

    Raises
    ------
    InputError
        As `entries_of`.
    """
    content = read_json_object(where)
    categories = _list_of(content, "categories", where)
    by_image = {}
    for image in _list_of(content, "images", where):
        if not is_id(image.get("id")) or image["id"] in by_image:
            raise InputError(
                f"image id {image.get('id')!r} is missing or given twice",
                where=where,
                fix="give each image entry an id of its own",
            )
        by_image[image["id"]] = (image, [])
    for annotation in _list_of(content, "annotations", where):
        if not is_id(annotation.get("image_id")) or annotation["image_id"] not in by_image:
            raise InputError(
                f"annotation {annotation.get('id')!r} belongs to image "
                f"{annotation.get('image_id')!r}, which the file does not list",
                where=where,
                fix="add the image entry or remove the annotation",
            )
        by_image[annotation["image_id"]][1].append(annotation)
    for image, objects in by_image.values():
        yield where, image, objects, categories


def _per_image_entries(root):
    """Yield (place, image entry, annotation entries, category entries) for each per-image file."""
    images = {path.stem: path for path in _image_files(root / "images")}
    for where in sorted((root / "annotations").glob("*.json")):
        content = read_json_object(where)
        listed = content.get("images", [{}])
        if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
            raise InputError(
                "'images' must list exactly one image", where=where, fix="write one file per image"
            )
        top = {key: content[key] for key in ("width", "height", "contents") if key in content}
        image = {**top, **listed[0]}
        if where.stem in images:
            image["file_name"] = images[where.stem].name
        image.setdefault("file_name", f"{where.stem}.jpg")
        objects = _list_of(content, "annotations", where)
        yield where, image, objects, _list_of(content, "categories", where)


def _assemble(name, root, layout, records, table):
    """Put a split together: order the images, leave out empty parents, list unused files."""
    records = sorted(records, key=lambda record: record.image_id)
    for first, second in zip(records, records[1:], strict=False):
        if first.image_id == second.image_id:
            raise InputError(
                f"image {first.image_id} is listed twice", where=root, fix="merge the two entries"
            )
    used = {item.category for record in records for item in record.objects}
    parents = {entry.supercategory for entry in table if entry.supercategory != entry.name}
    asked = [entry.name for entry in table if entry.name in used or entry.name not in parents]
    annotated = {record.path for record in records}
    unannotated = [
        path
        for folder in (root, root / "images")
        for path in _image_files(folder)
        if path not in annotated
    ]
    return Split(
        name,
        root,
        layout,
        tuple(dict.fromkeys(asked)),
        tuple(records),
        tuple(table),
        tuple(unannotated),
    )


def _image_files(folder):
    """List the image files directly in a folder, in order of name; none if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
