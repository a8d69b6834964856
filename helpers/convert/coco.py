"""Read COCO files wherever they lie, and the layouts that `helpers.data.coco` reads.

`supervision.DetectionDataset.from_coco` is not used: it forgets the ids, the further keys of the
entries and the table of categories, and turns every mask into a picture. The entries here stay as
they are in the file.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from helpers.convert.source import (
    SPLIT_WORDS,
    WHOLE,
    Source,
    SourceImage,
    examples,
    files_below,
    files_in,
    picture_size,
    refuse_outside,
    split_of_name,
)
from helpers.data.coco import (
    COCO_FILE,
    category_names,
    coco_entries,
    entries_of,
    layouts_of,
)
from helpers.data.records import Category
from helpers.errors import InputError
from helpers.files import read_json

_KEYS = {"images", "annotations", "categories"}
_OWN_KEYS = {"file_name", "width", "height"}


def is_coco(root):
    """Return whether a path is a COCO file or a folder that holds some."""
    return bool(_split_layouts(root) or _coco_files(root))


def read_coco(root):
    """Read COCO annotations, with polygons and run lengths as they are.

    Parameters
    ----------
    root : pathlib.Path
        A COCO file; a folder with one per split, or with ``annotations/instances_train.json`` and
        the like; a Roboflow export; or per-image JSON files. Images may lie anywhere below the
        folder, as long as their path ends as ``file_name`` says.

    Returns
    -------
    helpers.convert.source.Source
        Ids, crowd flags and further keys as in the file; the format is ``coco`` or ``per_image``.

    Raises
    ------
    InputError
        If a file is incomplete, two files are one split, or an image is missing.
    """
    base = root if root.is_dir() else root.parent
    layouts = _split_layouts(root)
    if layouts:
        kind = "per_image" if "per_image" in [layout for _, layout in layouts.values()] else "coco"
        read = {split: entries_of(*place) for split, place in layouts.items()}
        files = [folder / COCO_FILE for folder, layout in layouts.values() if layout == "coco"]
    else:
        kind, by_split = "coco", _coco_files(root)
        read = {split: coco_entries(path) for split, path in by_split.items()}
        files = list(by_split.values())
    whole = None if layouts else ImageFinder(base)
    splits, tables, resized, respelt = {}, {}, [], []
    for split, entries in read.items():
        splits[split] = []
        finder = whole or ImageFinder(layouts[split][0])  # `train` never means a file of `valid`
        for where, image, own, categories in entries:
            names = category_names(categories, where, tables)
            path = finder.find(image, where, split, respelt)
            size = picture_size(path, base)
            stated = (image.get("width"), image.get("height"))
            if stated not in ((None, None), size):
                sizes = f"{size[0]} x {size[1]}, stated {stated[0]} x {stated[1]}"
                resized.append(f"{path.name} ({sizes})")
            width, height = size if stated == (None, None) else stated
            extra = {key: image[key] for key in image if key not in _OWN_KEYS}
            objects = tuple(_object(entry, names, where) for entry in own)
            own_files = () if where in files else (where,)
            splits[split].append(SourceImage(path, width, height, objects, extra, own_files))
    notes = []
    if respelt:
        notes.append(f"{len(respelt)} images are spelt otherwise on the disk: {examples(respelt)}")
    if resized:
        notes.append(f"{len(resized)} images have another size than stated: {examples(resized)}")
    header = _header(files[0]) if kind == "coco" else {}
    return Source(kind, splits, _merge_tables(tables.values()), tuple(notes), header, tuple(files))


def _split_layouts(root):
    """Map each split to the folder and layout that training would read, under any word for it."""
    layouts = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not folder.is_dir() or not layouts_of(folder):
            continue
        if not (folder / COCO_FILE).is_file() and not files_in(folder / "annotations", (".json",)):
            continue
        split = SPLIT_WORDS.get(folder.name.casefold(), folder.name)
        if split in layouts:
            raise InputError(
                f"'{layouts[split][0].name}' and '{folder.name}' both mean the split '{split}'",
                where=root,
                fix="rename one of them",
            )
        layouts[split] = (folder, layouts_of(folder)[0])
    order = {split: layouts[split] for split in ("train", "valid", "test") if split in layouts}
    return order | layouts


def _coco_files(root):
    """Map each split to its COCO file, for files under other names than the usual one."""
    if root.is_file():
        candidates = [root] if root.suffix.lower() == ".json" else []
    else:
        candidates = [*files_in(root, (".json",)), *files_in(root / "annotations", (".json",))]
    files, damage = [], None
    for path in candidates:
        try:
            content = read_json(path)
        except (
            InputError
        ) as error:  # foreign, unless it bears the name of a split or nothing else is there
            if path == root or split_of_name(path.stem) or path.stem.startswith("instances"):
                raise
            damage = damage or error
            continue
        if content.keys() >= _KEYS:
            files.append(path)
    if damage and not files:
        raise damage
    instances = [path for path in files if path.stem.startswith("instances")]
    by_split = {}
    for path in instances or files:
        split = split_of_name(path.stem) or WHOLE
        if split in by_split:
            raise InputError(
                f"'{by_split[split].name}' and '{path.name}' are both files of one split",
                where=path.parent,
                fix="convert one of them by its own path, or name the split in the file's name",
            )
        by_split[split] = path
    return by_split


def _header(path):
    """Return what a COCO file says beside its entries."""
    return {key: value for key, value in read_json(path).items() if key not in _KEYS}


class ImageFinder:
    """Finds the file below a folder that ``file_name`` means, never one that its path contradicts."""

    def __init__(self, root):
        """List the files below `root` once."""
        self.root = root
        self.files = {}
        for path in files_below(root):
            self.files.setdefault(_spelling(path.name), []).append(path)

    def find(self, image, where, split, respelt):
        """Return the image file of an entry in the file `where`; other spellings go to `respelt`."""
        file_name = image.get("file_name")
        if not isinstance(file_name, str) or not file_name.strip("\0 "):
            raise InputError(
                "an image entry has no file_name", where=where, fix="add the file's name"
            )
        name = file_name.replace("\0", "?").replace("\\", "/")
        own = where.parent.parent if where.parent.name == "annotations" else where.parent
        leads_up = ".." in PurePosixPath(name).parts
        folders = [where.parent, *(() if leads_up else (own, own / "images", self.root))]
        paths = {Path(os.path.normpath(folder / name)) for folder in folders}
        paths = sorted(path for path in paths if path.is_file())
        for path in paths:
            refuse_outside(path, self.root, where)
        if not paths and not leads_up and not PureWindowsPath(name).anchor:
            paths = self._below(name, split) or self._below(unquote(name), split)
            if len(paths) == 1 and not paths[0].match(name):
                respelt.append(f"'{file_name}' is '{paths[0].name}'")
        if len(paths) != 1:
            raise self._not_one(file_name, paths, where)
        return paths[0]

    def _below(self, name, split):
        """List the files whose path ends as a name does, in any spelling; those of the split first."""
        parts = _spelling(name).split("/")
        paths = [
            path
            for path in self.files.get(parts[-1], ())
            if _spelling(path.relative_to(self.root).as_posix()).split("/")[-len(parts) :] == parts
        ]
        same = [path for path in paths if path.match(name)]
        splits = {path: split_of_name(path.parent.name) for path in same or paths}
        own = [path for path in splits if splits[path] == split]
        return own or [path for path in splits if splits[path] is None or split == WHOLE]

    def _not_one(self, file_name, paths, where):
        """Return the InputError for an image that is not there, or there several times."""
        stem = _spelling(PurePosixPath(file_name.replace("\\", "/")).stem)
        near = paths or [
            path
            for name, files in self.files.items()
            for path in files
            if PurePosixPath(name).stem == stem
        ]
        hint = f" ({examples(path.relative_to(self.root) for path in near)})" if near else ""
        problem = f"is there {len(paths)} times" if paths else "is not there"
        if near and not paths:
            problem += ", only others of that name"
        return InputError(
            f"the image '{file_name}' {problem}{hint}",
            where=where,
            fix="put each image once where file_name says, from the folder of the annotations, or "
            "remove its entry",
        )


def _spelling(name):
    """Return a name without what systems change on the way: case, and how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def _object(entry, names, where):
    """Return an annotation entry with the name of its category."""
    category_id = entry.get("category_id")
    if "segments_info" in entry:
        raise InputError(
            "is a panoptic file: its entries have segments_info",
            where=where,
            fix="export the objects as COCO instances, one entry per object",
        )
    if not isinstance(category_id, int | str) or category_id not in names:
        raise InputError(
            f"annotation {entry.get('id')!r} has category_id {category_id!r}, "
            "which has no name in 'categories'",
            where=where,
            fix="add the category with its name; numbers and texts are different ids",
        )
    rest = {key: entry[key] for key in entry if key not in ("image_id", "category_id")}
    return {"category": names[category_id], **rest}


def _merge_tables(entries):
    """Join the category tables of all files by name; ids stay unless two names share one."""
    table = {}
    for entry in entries:
        table.setdefault(entry.name, entry)
    if len({entry.category_id for entry in table.values()}) == len(table):
        return tuple(table.values())
    return tuple(
        Category(number, entry.name, entry.supercategory)
        for number, entry in enumerate(table.values(), 1)
    )
