"""Read a split from either of two layouts into the same records; `helpers.checks` judges them.

``coco``: ``{split}/_annotations.coco.json`` with the images beside it or in ``images/``.
``per_image``: ``{split}/images/*.jpg`` with ``{split}/annotations/<stem>.json``.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath

from helpers.data.images import IMAGE_SUFFIXES, MAX_PIXELS, near_files, upright_size
from helpers.data.masks import rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.data.records import Category, ImageRecord, ObjectAnnotation, Split, normalise_noun
from helpers.errors import InputError
from helpers.files import files_below, read_json, resolve

COCO_FILE = "_annotations.coco.json"
SPLIT_FOLDERS = {
    "train": ("train", "training", "trn"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}  # name of each split, and what its folder may be called in any case
SPLIT_WORDS = {word: split for split, words in SPLIT_FOLDERS.items() for word in words}
_ID = int | float | str  # of images and annotations
_EXPORT_AGAIN = "export the annotations again"
_CONTRADICTION = "_contradiction"


def find_splits(data_dir):
    """List the splits of a dataset, a folder with one folder per split; at least one.

    ``train``, ``valid`` (also for folders called ``val`` or ``Validation``) and ``test`` are first,
    then any other folder that holds annotations.
    """
    data_dir = resolve(data_dir)
    if not data_dir.is_dir():
        raise InputError("no such folder", where=data_dir, fix="check the path of the dataset")
    present = {split_name(path.name) for path in data_dir.iterdir() if layouts_of(path)}
    names = [name for name in SPLIT_FOLDERS if name in present]
    names += sorted(present.difference(SPLIT_FOLDERS))
    if names:
        return names
    is_split = split_name(data_dir.name) in SPLIT_FOLDERS and layouts_of(data_dir)
    if is_split or (data_dir / COCO_FILE).is_file():
        fix = f"name the folder above it, {data_dir.parent}"
        raise InputError("is one split and no dataset", where=data_dir, fix=fix)
    fix = f"put {COCO_FILE}, or images/ and annotations/, into {data_dir.name}/train, or convert "
    fix += "the dataset with 'python -m helpers convert'"
    raise InputError("holds no split", where=data_dir, fix=fix)


def read_split(data_dir, split, layout=None):
    """Read all images and objects of one split; image files are not opened.

    Parameters
    ----------
    data_dir : str or os.PathLike
        A folder with one folder per split, see `helpers.files.resolve`.
    split : str
        Name of the split; ``val`` and ``valid`` mean the same.
    layout : {"coco", "per_image"}, optional
        By default the first of the two that is there.

    Returns
    -------
    helpers.data.records.Split
        Both layouts give the same records.
    """
    name, root = split_folder(resolve(data_dir), split)
    layouts = [known for known in layouts_of(root) if layout in (None, known)]
    if not layouts:
        message = f"holds no annotations in the layout {layout or 'coco or per_image'}"
        fix = f"put {COCO_FILE}, or annotations/<image name>.json, into this folder"
        raise InputError(message, where=root, fix=fix)
    layout = layouts[0]
    records, table = [], {}
    for where, image, objects, categories in entries_of(root, layout):
        names = category_names(categories, where, table)
        records.append(image_record(where, image, objects, names, root))
    near = near_files([record.path for record in records if not record.path.is_file()])
    uses = Counter(near.get(record.path, record.path) for record in records)
    near = {path: file for path, file in near.items() if uses[file] == 1}  # else two mean one file
    records = [replace(record, path=near.get(record.path, record.path)) for record in records]
    records.sort(key=lambda record: record.image_id)
    for first, second in zip(records, records[1:], strict=False):
        if first.image_id == second.image_id:
            message = f"image {first.image_id} is listed twice"
            raise InputError(message, where=root, fix="merge the two entries")
    used = {item.category for record in records for item in record.objects}
    parents = {entry.supercategory for entry in table.values() if entry.supercategory != entry.name}
    categories = [
        entry.name
        for entry in table.values()
        if entry.name in used or (entry.name not in parents and normalise_noun(entry.name))
    ]
    read = {record.path for record in records} | {root / COCO_FILE}
    read |= {root / "annotations" / f"{record.path.stem}.json" for record in records}
    others = [path for path in files_below(root) if path not in read]
    return Split(
        name=name,
        root=root,
        layout=layout,
        categories=tuple(dict.fromkeys(categories)),
        records=tuple(records),
        category_table=tuple(table.values()),
        unannotated=tuple(path for path in others if path.suffix.lower() in IMAGE_SUFFIXES),
        unread=tuple(path for path in others if path.suffix.lower() not in IMAGE_SUFFIXES),
    )


def split_name(folder_name):
    """Return the usual name of the split that a folder's name means; another name as it is."""
    return SPLIT_WORDS.get(folder_name.casefold(), folder_name)


def split_folder(data_dir, split):
    """Return the usual name of a split and its folder; two folders of one split are refused."""
    name = split_name(split)
    folders = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
    folders = [path for path in folders if path.is_dir() and split_name(path.name) == name]
    annotated = [path for path in folders if layouts_of(path)]
    if len(annotated) > 1:
        listed = " and ".join(f"'{path.name}'" for path in annotated)
        fix = "rename or remove one of them, or join their images and annotations"
        raise InputError(f"{listed} both mean the split '{name}'", where=data_dir, fix=fix)
    if folders:
        return name, (annotated or folders)[0]
    names = ", ".join(find_splits(data_dir))  # raises if the dataset itself is missing
    raise InputError(f"there is no split {split!r}", where=data_dir, fix=f"use one of {names}")


def layouts_of(root):
    """List the layouts whose annotation files a folder holds, the default one first."""
    is_there = {"coco": (root / COCO_FILE).is_file(), "per_image": (root / "annotations").is_dir()}
    return [layout for layout, found in is_there.items() if found]


def entries_of(root, layout):
    """Yield (file, image entry, its annotation entries, all category entries) for each image."""
    return coco_entries(root / COCO_FILE) if layout == "coco" else _per_image_entries(root)


def coco_entries(where):
    """Yield what `entries_of` yields for one COCO file."""
    content = read_json(where, _EXPORT_AGAIN)
    categories, by_image = _list_of(content, "categories", where), {}
    for image in _list_of(content, "images", where):
        if not isinstance(image.get("id"), _ID) or image["id"] in by_image:
            message = f"image id {image.get('id')!r} is missing or given twice"
            raise InputError(message, where=where, fix="give each image entry an id of its own")
        by_image[image["id"]] = (image, [])
    for annotation in _list_of(content, "annotations", where):
        for key, task in (("segments_info", "panoptic segmentation"), ("caption", "captions")):
            if key in annotation and "category_id" not in annotation:
                message = f"is a COCO file for {task}: it has '{key}' and no 'category_id'"
                fix = "export instances, with 'bbox', 'segmentation' and 'category_id'"
                raise InputError(message, where=where, fix=fix)
        image_id = annotation.get("image_id")
        if not isinstance(image_id, _ID) or image_id not in by_image:
            name, same = annotation.get("id"), _same_in_another_type(image_id, by_image)
            message = f"annotation {name!r} belongs to image {image_id!r}, which the file does not "
            message += f"list{same}"
            fix = "add the image entry or remove the annotation"
            raise InputError(message, where=where, fix=fix)
        by_image[image_id][1].append(annotation)
    for image, objects in by_image.values():
        yield where, image, objects, categories


def _same_in_another_type(value, known):
    """Return how the file writes an id that it has as a number here and as text there, or ""."""
    same = next((other for other in known if str(other) == str(value)), None)
    types = {int: "number", float: "number", str: "text"}
    if same is None or type(value) not in types:
        return ""
    return f" as {types[type(value)]}, but as the {types[type(same)]} {same!r}"


def _per_image_entries(root):
    """Yield what `entries_of` yields for the files of single images."""
    images = {}
    for path in sorted((root / "images").glob("[!.]*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(path.stem, []).append(path.name)
    for where in sorted((root / "annotations").glob("[!.]*.json")):
        content = read_json(where, _EXPORT_AGAIN)
        listed = content.get("images", [{}])
        if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
            fix = "write one file per image"
            raise InputError("'images' must list exactly one image", where=where, fix=fix)
        top = {key: content[key] for key in ("width", "height", "contents") if key in content}
        image = {**top, **listed[0]}
        pairs = ((key, top[key], image[key]) for key in top if top[key] != image[key])
        differing = [f"'{key}' is {first!r} and {second!r}" for key, first, second in pairs]
        stated, names = image.get("file_name"), images.get(where.stem, [f"{where.stem}.jpg"])
        name = PureWindowsPath(stated).name if isinstance(stated, str) else None
        if where.stem in images or stated is None:
            image["file_name"] = name if name in names else names[0]
            if name is not None and PureWindowsPath(name).stem != where.stem:
                differing.append(f"'file_name' is {stated!r} in {where.name}")
            if name not in names and len(names) > 1:
                differing.append(f"{where.name} may mean {' or '.join(names)}")
        objects = _list_of(content, "annotations", where)
        for image_id in {str(item.get("image_id", image.get("id"))) for item in objects}:
            if "id" in image and image_id != str(image["id"]):
                differing.append(f"'id' is {image['id']!r} and 'image_id' {image_id}")
        if differing:
            image[_CONTRADICTION] = "; ".join(differing)
        yield where, image, objects, _list_of(content, "categories", where)


def _list_of(content, key, where):
    """Return ``content[key]``, which must be a list of objects; a missing key is no empty list."""
    if key not in content:
        message = f"has no key '{key}' but only {', '.join(sorted(content)) or 'nothing'}"
        fix = f"write the COCO key '{key}'; a missing key must not pass for an empty picture"
        raise InputError(message, where=where, fix=fix)
    values = content[key]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"'{key}' is no list of objects", where=where, fix="write it as COCO does")
    return values


def category_names(entries, where, table):
    """Map the category ids of one file to names; fill `table` with a `Category` per (id, name)."""
    names = {}
    for entry in entries:
        category_id, name, parent = entry.get("id"), entry.get("name"), entry.get("supercategory")
        if type(category_id) is not int:
            fix = "number the categories with whole numbers"
            raise InputError(f"a category has the id {category_id!r}", where=where, fix=fix)
        if not isinstance(name, str) or not name.strip():
            message = f"category {category_id} has no name, so there is nothing to ask for"
            raise InputError(message, where=where, fix="give it the noun that a person would use")
        name = name.strip()
        if names.setdefault(category_id, name) != name:
            message = f"category id {category_id} means both {names[category_id]!r} and {name!r}"
            raise InputError(message, where=where, fix="give each category an id of its own")
        parent = parent.strip() if isinstance(parent, str) and parent.strip() else None
        table.setdefault((category_id, name), Category(category_id, name, parent))
    return names


def image_record(where, image, annotations, names, root):
    """Build the `ImageRecord` of an image entry; without its size the file's header is read."""
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        raise InputError("an image entry has no file_name", where=where, fix="add the file's name")
    image_id = PurePosixPath(file_name.replace("\\", "/")).as_posix().removeprefix("images/")
    below, beside = root / "images" / image_id, root / image_id
    path = below if below.is_file() or (not beside.is_file() and below.parent.is_dir()) else beside
    place = f"{where}: image {image_id}"
    width, height = image.get("width"), image.get("height")
    if width is None and height is None:
        (width, height), _ = upright_size(path)
    message = f"the size is {width!r} x {height!r}"
    if not all(type(side) is int and side > 0 for side in (width, height)):
        raise InputError(message, where=place, fix="write whole numbers of pixels")
    if width * height > MAX_PIXELS:
        message += f", more than {MAX_PIXELS / 1e6:.0f} megapixels"
        raise InputError(message, where=place, fix="correct them, or cut the image into several")
    contents = image.get("contents", [])
    if not isinstance(contents, list) or not all(isinstance(noun, str) for noun in contents):
        raise InputError("'contents' is no list of nouns", where=place, fix='write ["joint"]')
    size = (width, height)
    objects = tuple(_object(place, *entry, names, *size) for entry in enumerate(annotations))
    contradiction = image.get(_CONTRADICTION)
    return ImageRecord(image_id, path, width, height, objects, frozenset(contents), contradiction)


def _object(where, index, annotation, names, width, height):
    """Build one object from its annotation entry."""
    annotation_id, category_id = annotation.get("id", index), annotation.get("category_id")
    where = f"{where}, annotation {annotation_id}"
    if not isinstance(category_id, _ID) or category_id not in names:
        same = _same_in_another_type(category_id, names)
        message = f"category_id {category_id!r} has no name in 'categories'{same}"
        fix = f"use one of {sorted(names)} or add the category with its name"
        raise InputError(message, where=where, fix=fix)
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise InputError(f"iscrowd is {annotation['iscrowd']!r}", where=where, fix="write 0 or 1")
    rle, mask_problem = None, None
    if annotation.get("segmentation") not in (None, [], {}):
        try:
            rle = segmentation_to_rle(annotation["segmentation"], height, width)
        except ValueError as error:
            mask_problem = str(error)
    box, area = annotation.get("bbox"), annotation.get("area")
    has_own_box = box not in (None, [])
    if has_own_box:
        are_numbers = isinstance(box, list) and all(type(n) in (int, float) for n in box)
        if not are_numbers or len(box) != 4:
            message = f"bbox is {box!r}, not [x, y, width, height]"
            raise InputError(message, where=where, fix="write four numbers in pixels")
        x, y, box_width, box_height = map(float, box)  # NaN is kept for the data checks to name
        box_xyxy = (x, y, x + box_width, y + box_height)
    elif rle is None or rle_area(rle) == 0:
        fix = "add 'bbox': [x, y, width, height] in pixels or remove the annotation"
        raise InputError("the annotation has neither a box nor a mask", where=where, fix=fix)
    else:
        box_xyxy = rle_box_xyxy(rle)
    return ObjectAnnotation(
        category=names[category_id],
        box_xyxy=box_xyxy,
        rle=rle,
        is_crowd=bool(annotation.get("iscrowd", 0)),
        annotation_id=annotation_id,
        has_own_box=has_own_box,
        mask_problem=mask_problem,
        area_px=area if area is None or type(area) in (int, float) else math.nan,
    )
