"""Read COCO files wherever they lie, and the layouts that `helpers.annotations` reads.

`supervision.DetectionDataset.from_coco` is not used: it forgets the ids, the further keys of the
entries and the table of categories, and turns every mask into a picture. The entries here stay as
they are in the file.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from helpers.convert.source import WHOLE, Source, SourceImage, split_of_name
from helpers.data.coco import (
    COCO_FILE,
    category_names,
    coco_entries,
    entries_of,
    find_splits,
    layouts_of,
    read_json_object,
    split_folder,
)
from helpers.data.images import IMAGE_SUFFIXES, upright_size
from helpers.data.records import Category
from helpers.errors import InputError

_KEYS = {"images", "annotations", "categories"}
_OWN_KEYS = {"file_name", "width", "height"}


def is_coco(root):
    """Tell whether a path is a COCO file or a folder that holds some."""
    return bool(_layouts(root) or _coco_files(root))


def read_coco(root):
    """Read COCO annotations, with polygons and run lengths as they are.

    Parameters
    ----------
    root : pathlib.Path
        A COCO file; a folder with one per split, or with ``annotations/instances_train.json`` and
        the like; a Roboflow export; or per-image JSON files. Images may lie anywhere below the
        folder.

    Returns
    -------
    helpers.convert.source.Source
        Ids, crowd flags and further keys kept; the format is ``coco`` or ``per_image``.

    Raises
    ------
    InputError
        If a file is incomplete, two files are one split, or an image is missing.
    """
    layouts = _layouts(root)
    if layouts:
        roots = {split: split_folder(root, split)[1] for split in layouts}
        read = {split: entries_of(roots[split], layouts[split]) for split in layouts}
        places = {split: (folder / "images", folder) for split, folder in roots.items()}
        files = {split: folder / COCO_FILE for split, folder in roots.items()}
    else:
        files = _coco_files(root)
        read = {split: coco_entries(path) for split, path in files.items()}
        places = dict.fromkeys(files, ())
    index = {} if layouts else _images_by_name(root if root.is_dir() else root.parent)
    splits, tables = {}, {}
    for split, entries in read.items():
        splits[split] = []
        for where, image, own, categories in entries:
            names = category_names(categories, where, tables)
            path = _image_path(image, where, places[split], index, split)
            splits[split].append(_source_image(path, image, own, names, where))
    kind = "per_image" if "per_image" in layouts.values() else "coco"
    header = {} if kind == "per_image" else _header(next(iter(files.values())))
    return Source(kind, splits, _merge_tables(tables.values()), header=header)


def _layouts(root):
    """Map each split to its layout, if the folder is one that `read_split` reads."""
    try:
        folders = {name: split_folder(root, name)[1] for name in find_splits(root)}
    except InputError:
        return {}
    return {
        name: layouts_of(folder)[0]
        for name, folder in folders.items()
        if (folder / COCO_FILE).is_file() or any((folder / "annotations").glob("*.json"))
    }


def _coco_files(root):
    """Map each split to its COCO file, for files under other names than the usual one."""
    if root.is_file():
        candidates = [root] if root.suffix == ".json" else []
    else:
        candidates = [*sorted(root.glob("*.json")), *sorted((root / "annotations").glob("*.json"))]
    files = [path for path in candidates if read_json_object(path).keys() >= _KEYS]
    instances = [path for path in files if path.stem.startswith("instances")]
    found = {}
    for path in instances or files:
        split = split_of_name(path.stem) or WHOLE
        if split in found:
            raise InputError(
                f"'{found[split].name}' and '{path.name}' are both files of one split",
                where=path.parent,
                fix="convert one of them by its own path, or name the split in the file's name",
            )
        found[split] = path
    return found


def _header(path):
    """Return what a COCO file says beside its entries."""
    return {key: value for key, value in read_json_object(path).items() if key not in _KEYS}


def _images_by_name(folder):
    """Map each file name to the image files below a folder that have it."""
    index = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            index.setdefault(path.name, []).append(path)
    return index


def _image_path(image, where, folders, index, split):
    """Find the file of an image entry."""
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip():
        raise InputError("an image entry has no file_name", where=where, fix="add the file's name")
    relative = PurePosixPath(file_name.replace("\\", "/"))
    for folder in folders:
        name = relative.as_posix().removeprefix("images/")
        if (folder / name).is_file():
            return folder / name
    found = [path for path in index.get(relative.name, ()) if path.match(relative.as_posix())]
    found = found or index.get(relative.name, [])
    of_split = [path for path in found if split_of_name(path.parent.name) == split]
    found = of_split if len(found) > 1 and of_split else found
    if len(found) != 1:
        problem = f"is there {len(found)} times" if found else "is not there"
        raise InputError(
            f"the image '{file_name}' {problem}",
            where=where,
            fix="put each image once below the folder of the annotations, or remove its entry",
        )
    return found[0]


def _source_image(path, image, annotations, names, where):
    """Build one image from its entries."""
    width, height = image.get("width"), image.get("height")
    if width is None and height is None:
        (width, height), _ = upright_size(path)
    objects = []
    for entry in annotations:
        if entry.get("category_id") not in names:
            raise InputError(
                f"annotation {entry.get('id')!r} has category_id {entry.get('category_id')!r}, "
                "which has no name in 'categories'",
                where=where,
                fix="add the category with its name",
            )
        kept = {key: entry[key] for key in entry if key not in ("image_id", "category_id")}
        objects.append({"category": names[entry["category_id"]], **kept})
    extra = {key: image[key] for key in image if key not in _OWN_KEYS}
    return SourceImage(path, width, height, tuple(objects), extra)


def _merge_tables(entries):
    """Join the category tables of all files by name; ids are kept unless two names share one."""
    table = {}
    for entry in entries:
        table.setdefault(entry.name, entry)
    if len({entry.category_id for entry in table.values()}) == len(table):
        return tuple(table.values())
    return tuple(
        Category(number, entry.name, entry.supercategory)
        for number, entry in enumerate(table.values(), 1)
    )
