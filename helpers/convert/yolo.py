"""Read YOLO datasets: data.yaml, and a text file per image with polygons or boxes in [0, 1].

`supervision.DetectionDataset.from_yolo` is not used. It rounds polygons to whole pixels and fills
their border (hand-drawn potholes keep a mean IoU of 0.97 and a least of 0.85), holds every mask as a
picture, needs the two folders of each split by name, and takes a number too many in a line for a
confidence. Here the polygons stay as they are in the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from helpers.config import read_yaml
from helpers.convert.source import (
    PRECISION,
    WHOLE,
    Source,
    SourceImage,
    by_stem,
    files_below,
    folder_named,
    note_of,
    numbered,
    picture_size,
    read_text,
    refuse_outside,
    split_folders,
)
from helpers.data.images import IMAGE_SUFFIXES
from helpers.errors import InputError

OUTSIDE = 0.01  # share of a side by which rounding and clumsy drawing may leave the image
MIN_ROWS = 3  # different lines from which a pattern that all share is no chance
_KEYS = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}


def is_yolo(root):
    """Return whether a folder holds a ``data.yaml`` (or any YAML file with ``names``)."""
    return root.is_dir() and _yaml_file(root) is not None


def read_yolo(root):
    """Read a YOLO dataset of polygons (YOLO-seg), boxes, or both; of poses the boxes.

    `root` holds a YAML file with ``names`` and optionally ``path``, ``train``, ``val``, ``test``.
    Labels lie where the image's path says ``labels`` in place of ``images``, or beside the image.
    An image without a label file shows nothing, as YOLO trainers take it.
    """
    where = _yaml_file(root)
    content, notes, files = read_yaml(where), [], [where]
    names = _names(content, where, notes)
    paths = _image_paths(content, root, where, files, notes)
    labels = {path: _label_file(path, root) for group in paths.values() for path in group}
    rows = {path: _rows(label, names, root) for path, label in labels.items() if label}
    empty = [path.relative_to(root) for path, label in labels.items() if label is None]
    notes += note_of(empty, "images have no label file and count as empty")
    boxes_only = _check_values(content, [row for group in rows.values() for row in group], where)
    if boxes_only:
        notes.append("a pose dataset (kpt_shape): its boxes are read, its keypoints are not")
    splits = {}
    for split, group in paths.items():
        splits[split] = []
        for path in group:
            width, height = picture_size(path, root)
            objects = tuple(
                _object(names[number], values[: 4 if boxes_only else None], width, height)
                for _, number, values in rows.get(path, ())
            )
            own_files = tuple(filter(None, [labels[path]]))
            splits[split].append(SourceImage(path, width, height, objects, {}, own_files))
    return Source("yolo", splits, numbered(names.values()), tuple(notes), tuple(files))


def _yaml_file(root):
    """Find the YAML file that lists the names, ``data.yaml`` first; None without one."""
    paths = [path for path in root.glob("[!.]*") if path.suffix.lower() in (".yaml", ".yml")]
    for path in sorted(paths, key=lambda path: (path.name != "data.yaml", path)):
        if path.is_file() and "names" in read_yaml(path):
            return path
    return None


def _names(content, where, notes):
    """Map class numbers to names, whether they are listed or numbered."""
    names, count = content["names"], content.get("nc")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    texts = {}
    for key, name in names.items() if isinstance(names, dict) else ():
        if str(key).isdecimal() and isinstance(name, str | int | float) and str(name).strip():
            texts[int(key)] = str(name).strip()
    if not texts or len(texts) < len(names):
        raise InputError(
            f"names is {str(content['names'])[:200]}",
            where=where,
            fix="write names: [crack, joint] or names: {0: crack, 1: joint}",
        )
    if count not in (None, len(texts)):
        notes.append(f"nc is {count}, but names lists {len(texts)}, which is taken")
    doubles = [name for name in set(texts.values()) if list(texts.values()).count(name) > 1]
    notes += note_of(sorted(doubles), "names belong to several classes, which become one")
    return {number: texts[number] for number in sorted(texts)}


def _image_paths(content, root, where, files, notes):
    """Map each split to its image files, by the keys of the YAML file or by the usual folders."""
    listed = {}
    for key in (key for key in _KEYS if content.get(key)):
        if listed.setdefault(_KEYS[key], content[key]) != content[key]:
            raise InputError("'val' and 'valid' differ", where=where, fix="remove one of them")
    if not listed:
        return _images_by_folder(root, where)
    base = root / str(content.get("path") or ".")
    base = base if base.is_dir() else root
    paths = {}
    for split, entry in listed.items():
        entries = [str(value) for value in (entry if isinstance(entry, list) else [entry])]
        places = {value: _existing(value, base, root, where) for value in entries}
        lost = [value for value in entries if places[value] is None]
        if not lost:
            images = [path for p in places.values() for path in _images_of(p, base, root, files)]
            paths[split] = list(dict.fromkeys(images))
        elif split == "train" or len(listed) == 1:
            raise _missing(lost[0], where)
        else:  # an export without such images still names their folder
            notes.append(f"{split}: '{lost[0]}' does not exist, so there is no such split")
    return paths


def _images_by_folder(root, where):
    """Map each split to the images of the usual folders, for a file that names none."""
    folders, images = split_folders(root), folder_named(root, "images")
    if WHOLE in folders and images is not None:
        folders = split_folders(images)
    paths = {split: _images_of(folder, root, root, []) for split, folder in folders.items()}
    if not any(paths.values()):
        raise InputError(
            "names no split, and there is no image in images/ or train/images/",
            where=where,
            fix="add 'train: train/images' to the file",
        )
    return paths


def _images_of(place, base, root, files):
    """List the images of a folder and of those in it, or of a text file of paths."""
    if place.is_dir():
        images = files_below(folder_named(place, "images") or place, IMAGE_SUFFIXES)
        by_stem(images, root)  # two of one stem would share a label file
        return images
    files.append(place)
    images = []
    for line in filter(None, map(str.strip, read_text(place).splitlines())):
        path = _existing(line, place.parent, root, place) or _existing(line, base, root, place)
        if path is None or not path.is_file():
            raise _missing(line, place)
        images.append(path)
    return images


def _existing(value, base, root, where):
    """Return the file or folder that a dataset names, or None; what lies outside is refused."""
    inner = [part for part in Path(value).parts if part != ".."]
    candidates = [base / value]
    if inner != list(Path(value).parts):  # Roboflow's exports write one '../' too much
        candidates.append(base.joinpath(*inner))
    if not candidates[0].exists():
        candidates.append(root / value)
    candidates = [Path(os.path.normpath(path)) for path in candidates if path.exists()]
    real_root = os.path.realpath(root)
    inside = [path for path in candidates if Path(os.path.realpath(path)).is_relative_to(real_root)]
    if candidates and not inside:
        refuse_outside(candidates[0], root, where)
    return inside[0] if inside else None


def _missing(value, where):
    """Return the InputError for a path that leads nowhere."""
    return InputError(f"names '{value}', which does not exist", where=where, fix="correct the path")


def _label_file(image, root):
    """Return the text file that belongs to an image, or None."""
    parts = image.relative_to(root).parts
    candidates = [image, image.parent / "labels" / image.name]
    places = [index for index, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    for word in ("labels", "Labels") if places else ():
        mirror = root.joinpath(*parts[: places[-1]], word, *parts[places[-1] + 1 :])
        candidates.insert(0, mirror)
    texts = (path.with_suffix(".txt") for path in candidates)
    return next((path for path in texts if path.is_file()), None)


def _rows(label, names, root):
    """Return the (place, class, numbers after it) of each line of a label file."""
    refuse_outside(label, root)
    rows = []
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        where = f"{label}, line {number}"
        try:
            values = [float(value) for value in line.split()]
        except ValueError as error:
            raise InputError(
                f"'{line.strip()[:60]}' is not all numbers", where=where, fix="write: class x y ..."
            ) from error
        if values and values[0] not in names:
            raise InputError(
                f"class {line.split()[0]} is not among the names {str(names)[:200]}",
                where=where,
                fix="add it to names in the YAML file",
            )
        if values:
            rows.append((where, int(values[0]), values[1:]))
    return rows


def _check_values(content, rows, where):
    """Refuse lines that are neither boxes nor polygons; return whether keypoints follow the boxes."""
    shape = content.get("kpt_shape")
    if shape is None:
        meaning = _other_meaning({tuple(values) for _, _, values in rows})
        if meaning:
            raise InputError(
                f"each line is a box followed by {meaning}, not a polygon",
                where=rows[0][0],
                fix=f"name kpt_shape in {where.name}, or leave four numbers after the class",
            )
        counts = None
    elif isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape):
        counts = (4, 4 + shape[0] * shape[1])
    else:
        raise InputError(f"kpt_shape is {shape!r}", where=where, fix="write [points, 2 or 3]")
    for place, _, values in rows:
        count = len(values)
        if count not in counts if counts else count != 4 and (count < 6 or count % 2):
            meant = f"a box with keypoints ({counts[1]})" if counts else "a polygon (6, 8, ...)"
            raise InputError(
                f"a class and {count} numbers are neither a box (4) nor {meant}",
                where=place,
                fix="write: class x y x y x y ... with at least three corners",
            )
        for value in values[: 4 if counts else None]:
            if not -OUTSIDE <= value <= 1 + OUTSIDE:
                raise InputError(
                    f"{value:g} is no share of the image's side",
                    where=place,
                    fix="divide x by the width and y by the height",
                )
    return counts is not None


def _other_meaning(rows):
    """Say what follows a box in rows of one length; None where they are boxes or polygons.

    The first two corners of a polygon, taken as centre and size, are hardly ever a box that lies in
    the image and holds all other corners.
    """
    lengths = {len(values) for values in rows}
    if len(rows) < MIN_ROWS or len(lengths) > 1 or min(lengths) < 6:
        return None
    if not all(-OUTSIDE <= edge <= 1 + OUTSIDE for values in rows for edge in _edges(values)):
        return None
    if lengths == {6} and all(values[5].is_integer() for values in rows):
        return "a confidence and a track number"
    count, num_sharing = min(lengths) - 4, sum(map(_shares_coordinates, rows))
    for size in (2, 3):
        # Corners of rectangles and traced outlines share coordinates; joints of a body hardly do.
        is_traced = size == 2 and num_sharing > len(rows) / 2
        if count % size == 0 and not is_traced and all(_holds_points(v, size) for v in rows):
            return f"{count // size} keypoints"
    return None


def _shares_coordinates(values):
    """Return whether two corners of a polygon have the same x, or the same y."""
    axes = [[value for value in values[axis::2] if value] for axis in (0, 1)]
    return any(len(set(axis)) < len(axis) for axis in axes)


def _holds_points(values, size):
    """Return whether a box is followed by points in it, each x, y and for size 3 a visibility."""
    x0, y0, x1, y1 = _edges(values)
    x_slack, y_slack = 0.1 * (x1 - x0), 0.1 * (y1 - y0)
    for x, y, *visibility in zip(*(values[4 + axis :: size] for axis in range(size)), strict=True):
        is_inside = x0 - x_slack <= x <= x1 + x_slack and y0 - y_slack <= y <= y1 + y_slack
        if not (is_inside or x == y == 0) or visibility not in ([], [0], [1], [2]):
            return False
    return True


def _edges(values):
    """Return (x0, y0, x1, y1) of a box given by its centre and size."""
    x, y, width, height = values[:4]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _object(category, values, width, height):
    """Turn the numbers of a line into a COCO entry in pixels."""
    if len(values) == 4:
        x0, y0, _, _ = _edges(values)
        box = [x0 * width, y0 * height, values[2] * width, values[3] * height]
        return {"category": category, "bbox": box, "iscrowd": 0}
    sides = (width, height) * (len(values) // 2)
    polygon = [_pixels(value, side) for value, side in zip(values, sides, strict=True)]
    return {"category": category, "segmentation": [polygon], "iscrowd": 0}


def _pixels(share, side):
    """Turn a share of a side into pixels; what five decimals took from a half or whole is undone.

    A corner on the border of two pixels would else fall to either side by chance.
    """
    pixels = share * side
    nearest = round(2 * pixels) / 2
    return nearest if abs(pixels - nearest) <= PRECISION * side else pixels
