"""Read COCO files wherever they lie, and the layouts that `helpers.data.coco` reads."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from helpers.convert import source
from helpers.data import coco
from helpers.data.images import spelling
from helpers.errors import InputError
from helpers.files import read_json

_KEYS = {"images", "annotations", "categories"}
_ID_KEYS = {"image_id", "category_id"}
_OWN_KEYS = {"file_name", "width", "height"}


def read_coco(root):
    """Read COCO annotations as they are, of images anywhere below whose path ends as stated."""
    parts, base = annotation_files(root), root if root.is_dir() else root.parent
    splits, table, resized, respelt = {}, {}, [], []
    for split, (folder, file) in parts.items():
        splits[split], index = [], {}
        for path in source.files_below(folder):
            index.setdefault(spelling(path.name), []).append(path)
        entries = coco.coco_entries(file) if file else coco.entries_of(folder, "per_image")
        for where, image, items, categories in entries:
            names = coco.category_names(categories, where, table)
            path = _image_path(image, where, folder, index, split, respelt)
            size = source.picture_size(path, base)
            stated = (image.get("width"), image.get("height"))
            stated = size if stated == (None, None) else stated
            if not all(type(side) is int and side > 0 for side in stated):
                message = f"the size of '{path.name}' is {stated[0]!r} x {stated[1]!r}"
                raise InputError(message, where=where, fix="write whole numbers of pixels")
            if stated != size:
                sizes = f"{size[0]} x {size[1]}, stated {stated[0]} x {stated[1]}"
                resized.append(f"{path.name} ({sizes})")
            objects, own_files = [], () if file else (where,)
            for entry in items:
                category_id = entry.get("category_id")
                if type(category_id) is not int or category_id not in names:
                    message = f"annotation {entry.get('id')!r} has category_id {category_id!r}"
                    message += ", which has no name in 'categories'"
                    fix = "add the category with its name; text is another id than a number"
                    raise InputError(message, where=where, fix=fix)
                kept = {key: entry[key] for key in entry if key not in _ID_KEYS}
                objects.append(kept | {"category": names[category_id]})
            extra = {key: image[key] for key in image if key not in _OWN_KEYS}
            record = source.SourceImage(path, *stated, tuple(objects), extra, own_files)
            splits[split].append(record)
    notes = source.note_of_doubles(entry.name for entry in table.values())
    notes += source.note_of(respelt, "images are spelt otherwise on the disk")
    notes += source.note_of(resized, "images have another size than stated")
    files = [file for _, file in parts.values() if file]
    content = read_json(files[0]) if files else {}
    header = {key: content[key] for key in content if key not in _KEYS}
    kind = "coco" if files else "per_image"
    return source.Source(kind, splits, _merged(table.values()), notes, files, header)


def annotation_files(root):
    """Map each split to its folder and its COCO file, None where each image has its own file."""
    names, parts = (), {}
    with suppress(InputError):  # not a layout that training could read as it is
        names = coco.find_splits(root)
    for name in names:
        folder = coco.split_folder(root, name)[1]
        file = folder / coco.COCO_FILE
        if file.is_file() or source.files_below(folder / "annotations", (".json",)):
            parts[name] = (folder, file if file.is_file() else None)
    base = root if root.is_dir() else root.parent
    return parts or {split: (base, file) for split, file in _coco_files(root).items()}


def _coco_files(root):
    """Map each split to its COCO file, for files under other names than the usual one."""
    paths, problem = [], None
    places = sorted([*root.glob("[!.]*.json"), *root.glob("annotations/[!.]*.json")])
    for path in [root] if root.suffix == ".json" and root.is_file() else places:
        try:
            if read_json(path).keys() >= _KEYS:
                paths.append(path)
        except InputError as error:
            if source.split_of_name(path.stem) or path.stem.startswith("instances"):
                raise
            problem = problem or error  # a foreign file, unless there is no other
    if problem and not paths:
        raise problem
    files = {}
    for path in [path for path in paths if path.stem.startswith("instances")] or paths:
        split = source.split_of_name(path.stem) or source.WHOLE
        if split in files:
            message = f"'{files[split].name}' and '{path.name}' are both files of one split"
            fix = "convert one of them by its own path, or name the split in the file's name"
            raise InputError(message, where=root, fix=fix)
        files[split] = path
    return files


def _image_path(image, where, root, index, split, respelt):
    """Return the file that an image entry means, never one that its path contradicts."""
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name.strip("\0 "):
        raise InputError("an image entry has no file_name", where=where, fix="add the file's name")
    name = file_name.replace("\0", "?").replace("\\", "/")
    own = where.parent.parent if where.parent.name == "annotations" else where.parent
    leads_up = ".." in PurePosixPath(name).parts
    folders = [where.parent, *(() if leads_up else (own, own / "images", root))]
    paths = {Path(os.path.normpath(folder / name)) for folder in folders}
    paths = sorted(path for path in paths if path.is_file())
    for path in paths:
        source.refuse_outside(path, root, where)
    if not paths and not leads_up and not PureWindowsPath(name).anchor:
        ends = (_ending_with(text, root, index, split) for text in (name, unquote(name)))
        paths = next(filter(None, ends), [])
        if len(paths) == 1 and not paths[0].match(name):
            respelt.append(f"'{file_name}' is '{paths[0].name}'")
    if len(paths) != 1:
        near = paths or index.get(spelling(PurePosixPath(name).name), ())
        near = "".join(f" ({text})" for text in source.note_of(near, "of that name"))
        found = f"there {len(paths)} times" if paths else "not there"
        fix = "put each image once where file_name says, from the folder of the annotations"
        raise InputError(f"the image '{file_name}' is {found}{near}", where=where, fix=fix)
    return paths[0]


def _ending_with(name, root, index, split):
    """List the files whose path ends as a name does; those of the split and so spelt first."""
    end = "/" + spelling(name)
    paths = index.get(end.rpartition("/")[2], ())
    paths = [p for p in paths if spelling(f"/{p.relative_to(root).as_posix()}").endswith(end)]
    paths = [path for path in paths if path.match(name)] or paths
    splits = {path: source.split_of_name(path.parent.name) for path in paths}
    own = [path for path in paths if splits[path] == split]
    return own or [path for path in paths if splits[path] is None or split == source.WHOLE]


def _merged(entries):
    """Join the category tables of all files by name; ids stay unless two names share one."""
    table = {}
    for entry in entries:
        table.setdefault(entry.name, entry)
    if len({entry.category_id for entry in table.values()}) < len(table):
        return [replace(entry, category_id=n) for n, entry in enumerate(table.values(), 1)]
    return list(table.values())
