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
    examples,
    files_below,
    folder_named,
    numbered,
    picture_size,
    read_text,
    refuse_outside,
    split_folders,
)
from helpers.data.images import IMAGE_SUFFIXES
from helpers.errors import InputError

OUTSIDE = 0.01  # share of a side by which rounding and clumsy drawing may leave the image
MIN_ROWS = 3  # from which a pattern that all rows share is no chance
_KEYS = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}


def is_yolo(root):
    """Return whether a folder holds a ``data.yaml`` (or any YAML file with ``names``)."""
    return root.is_dir() and _yaml_file(root) is not None


def read_yolo(root):
    """Read a YOLO dataset of polygons (YOLO-seg), boxes, or both.

    Parameters
    ----------
    root : pathlib.Path
        Holds a YAML file with ``names`` and optionally ``path``, ``train``, ``val``, ``test``.
        Labels lie where the image's path says ``labels`` in place of ``images``, or beside it.

    Returns
    -------
    helpers.convert.source.Source
        An image without a label file shows nothing, as YOLO trainers take it; ``notes`` count
        them. Of poses (``kpt_shape``) the boxes are read.

    Raises
    ------
    InputError
        Naming file, line and value that cannot be read.
    """
    where = _yaml_file(root)
    content, notes = read_yaml(where), []
    names = _names(content, where, notes)
    files, rows = [where], {}
    paths_of = _image_paths(content, root, where, files, notes)
    labels = {path: _label_file(path, root) for paths in paths_of.values() for path in paths}
    for path, label in labels.items():
        if label is not None:
            refuse_outside(label, root)
            rows[path] = _rows(label, names)
    missing = [path.relative_to(root) for path, label in labels.items() if label is None]
    if missing:
        notes.append(
            f"{len(missing)} images have no label file and count as empty: {examples(missing)}"
        )
    keypoints = _keypoint_numbers(content, rows, where, notes)
    splits = {}
    for split, paths in paths_of.items():
        splits[split] = []
        for path in paths:
            width, height = picture_size(path, root)
            objects = tuple(
                _object(names[number], values[: 4 if keypoints else None], width, height)
                for _, number, values in rows.get(path, ())
            )
            own_files = () if labels[path] is None else (labels[path],)
            splits[split].append(SourceImage(path, width, height, objects, {}, own_files))
    return Source("yolo", splits, numbered(names.values()), tuple(notes), {}, tuple(files))


def _yaml_file(root):
    """Find the YAML file that lists the names, ``data.yaml`` first; None without one."""
    files = [path for path in sorted(root.iterdir()) if path.suffix.lower() in (".yaml", ".yml")]
    files = [path for path in files if path.is_file() and not path.name.startswith(".")]
    for path in sorted(files, key=lambda path: path.name != "data.yaml"):
        if "names" in read_yaml(path):
            return path
    return None


def _names(content, where, notes):
    """Map class numbers to names, whether they are listed or numbered."""
    names, count = content["names"], content.get("nc")
    if isinstance(names, list):
        names = dict(enumerate(names))
    problem = InputError(
        f"names is {str(names)[:200]}",
        where=where,
        fix="write names: [crack, joint] or names: {0: crack, 1: joint}",
    )
    if not isinstance(names, dict) or not names:
        raise problem
    by_number = {int(key): name for key, name in names.items() if str(key).isdecimal()}
    texts = [str(name).strip() for name in names.values() if isinstance(name, str | int | float)]
    if len(by_number) < len(names) or len(texts) < len(names) or not all(texts):
        raise problem
    if count is not None and count != len(names):
        notes.append(f"nc is {count}, but names lists {len(names)}, which is taken")
    if len(set(texts)) < len(texts):
        notes.append(f"{len(texts) - len(set(texts))} classes bear the name of another: joined")
    return {number: str(by_number[number]).strip() for number in sorted(by_number)}


def _image_paths(content, root, where, files, notes):
    """Map each split to its image files, by the keys of the YAML file or by the usual folders."""
    base = root / str(content.get("path") or ".")
    base = base if base.is_dir() else root
    listed = {}
    for key, split in _KEYS.items():
        if content.get(key):
            if listed.get(split, content[key]) != content[key]:
                raise InputError(
                    "'val' and 'valid' name different images", where=where, fix="remove one of them"
                )
            listed[split] = content[key]
    if not listed:
        return _images_by_folder(root, where)
    paths = {}
    for split, entry in listed.items():
        entries = [str(value) for value in (entry if isinstance(entry, list) else [entry])]
        places = [_existing(value, base, root, where) for value in entries]
        if None not in places:
            images = [path for place in places for path in _images_of(place, base, root, files)]
            paths[split] = list(dict.fromkeys(images))
        elif split == "train" or len(listed) == 1:
            raise _missing(entries[places.index(None)], where)
        else:  # an export without such images still names their folder
            notes.append(f"{split}: '{entries[places.index(None)]}' does not exist and is left out")
    return paths


def _images_by_folder(root, where):
    """Map each split to the images of the usual folders, for a file that names none."""
    folders = split_folders(root)
    images = folder_named(root, "images")
    if folders == {WHOLE: root} and images is not None:
        folders = split_folders(images)
    paths = {
        split: files_below(folder_named(folder, "images") or folder, IMAGE_SUFFIXES)
        for split, folder in folders.items()
    }
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
    """Return the file or folder that a dataset names, or None; what lies outside is refused.

    Roboflow's exports write one '../' too much.
    """
    parts = [part for part in Path(value).parts if part != ".."]
    candidates = [base / value, *([base / Path(*parts)] if parts and ".." in value else ())]
    if not candidates[0].exists():
        candidates.append(root / value)
    candidates = [Path(os.path.normpath(path)) for path in candidates if path.exists()]
    real_root = os.path.realpath(root)
    for path in candidates:
        if Path(os.path.realpath(path)).is_relative_to(real_root):
            return path
    if candidates:
        refuse_outside(candidates[0], root, where)
    return None


def _missing(value, where):
    """Return the InputError for a path that leads nowhere."""
    return InputError(
        f"names '{value}', which does not exist", where=where, fix="correct the path in the file"
    )


def _label_file(image, root):
    """Return the text file that belongs to an image, or None."""
    parts = list(image.relative_to(root).parts)
    places = [i for i, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    candidates = [image.with_suffix(".txt"), image.parent / "labels" / f"{image.stem}.txt"]
    if places:
        head, tail = parts[: places[-1]], parts[places[-1] + 1 :]
        mirrors = [root.joinpath(*head, word, *tail) for word in ("labels", "Labels")]
        candidates = [path.with_suffix(".txt") for path in mirrors] + candidates
    return next((path for path in candidates if path.is_file()), None)


def _rows(label, names):
    """Return the (place, class, numbers after it) of each line of a label file."""
    rows = []
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        values, where = line.split(), f"{label}, line {number}"
        try:
            numbers = [float(value) for value in values]
        except ValueError as error:
            raise InputError(
                f"'{line.strip()[:60]}' is not all numbers",
                where=where,
                fix="write: class x y x y ...",
            ) from error
        if numbers and numbers[0] not in names:
            raise InputError(
                f"class {values[0]} is not among the names {str(names)[:200]}",
                where=where,
                fix="add it to names in the YAML file",
            )
        if numbers:
            rows.append((where, int(numbers[0]), numbers[1:]))
    return rows


def _keypoint_numbers(content, rows, where, notes):
    """Return how many numbers of keypoints follow each box, and refuse rows of other meanings."""
    rows = [row for group in rows.values() for row in group]
    shape = content.get("kpt_shape")
    if shape is not None:
        sound = isinstance(shape, list) and len(shape) == 2 and {*map(type, shape)} == {int}
        count = shape[0] * shape[1] if sound and min(shape) > 0 else 0
        if not count:
            raise InputError(f"kpt_shape is {shape!r}", where=where, fix="write [points, 2 or 3]")
        for place, _, values in rows:
            if len(values) not in (4, 4 + count):
                raise InputError(
                    f"a class and {len(values)} numbers are no box (4) with {count} of keypoints",
                    where=place,
                    fix=f"correct the line, or kpt_shape in {where.name}",
                )
            _refuse_values(values[:4], place)
        notes.append("a pose dataset (kpt_shape): its boxes are read, its keypoints are not")
        return count
    meaning = _other_meaning([values for _, _, values in rows])
    if meaning:
        raise InputError(
            f"each line is a box followed by {meaning}, not a polygon",
            where=rows[0][0],
            fix=f"name kpt_shape in {where.name}, or leave four numbers after the class",
        )
    for place, _, values in rows:
        _refuse_values(values, place)
    return 0


def _other_meaning(rows):
    """Say what follows a box in rows of one length; None where they are boxes or polygons.

    A polygon's first corner and second corner, taken as centre and size, are hardly ever a box that
    lies in the image and holds all other corners.
    """
    rows, lengths = {tuple(values) for values in rows}, {len(values) for values in rows}
    if len(rows) < MIN_ROWS or len(lengths) > 1 or min(lengths) < 6:
        return None
    boxes = [_corners(values) for values in rows]
    if min(map(min, boxes)) < -OUTSIDE or max(map(max, boxes)) > 1 + OUTSIDE:
        return None
    if lengths == {6} and all(values[5].is_integer() for values in rows):
        return "a confidence and a track number"
    for size in (2, 3):
        if (min(lengths) - 4) % size == 0 and all(_holds_points(values, size) for values in rows):
            return f"{(min(lengths) - 4) // size} keypoints of {size} numbers"
    return None


def _holds_points(values, size):
    """Return whether a box is followed by points in it, each x, y and for size 3 a visibility."""
    x0, y0, x1, y1 = _corners(values)
    x_slack, y_slack = 0.1 * (x1 - x0), 0.1 * (y1 - y0)
    points = [values[start : start + size] for start in range(4, len(values), size)]
    for x, y, *visibility in points:
        if visibility and visibility[0] not in (0, 1, 2):
            return False
        inside = x0 - x_slack <= x <= x1 + x_slack and y0 - y_slack <= y <= y1 + y_slack
        if not inside and (x or y):
            return False
    # Corners of a rectangle, or of a traced outline, share coordinates; a person's joints do not.
    return size == 3 or all(_differ(values[axis::2]) for axis in (0, 1))


def _differ(values):
    """Return whether no two of the values but zeros are equal."""
    values = [value for value in values if value]
    return len(set(values)) == len(values)


def _corners(values):
    """Return (x0, y0, x1, y1) of a box given by its centre and size."""
    x, y, width, height = values[:4]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _refuse_values(values, where):
    """Raise InputError unless the numbers of a line are a box or a polygon in [0, 1]."""
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"a class and {len(values)} numbers are neither a box (4) nor a polygon (6, 8, ...)",
            where=where,
            fix="write: class x y x y x y ... with at least three corners",
        )
    outside = [value for value in values if not -OUTSIDE <= value <= 1 + OUTSIDE]
    if outside:
        raise InputError(
            f"{outside[0]:g} is no share of the image's side",
            where=where,
            fix="divide x by the width and y by the height",
        )


def _object(category, values, width, height):
    """Turn the numbers of a line into a COCO entry in pixels."""
    if len(values) == 4:
        x0, y0, _, _ = _corners(values)
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
