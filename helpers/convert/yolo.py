"""Read YOLO datasets: data.yaml, and a text file per image with polygons or boxes in [0, 1]."""

import os
from pathlib import Path

import numpy as np

from helpers.config import read_yaml
from helpers.convert import source
from helpers.data.images import IMAGE_SUFFIXES
from helpers.errors import InputError, explain

OUTSIDE = 0.01  # share of a side by which rounding and clumsy drawing may leave the image
MIN_ROWS = 3  # different lines from which a pattern that all share is no chance
_KEYS = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}


def read_yolo(root):
    """Read a YOLO dataset of polygons (YOLO-seg), boxes, or both; of poses the boxes."""
    where = names_file(root)
    content, notes, files = read_yaml(where), [], [where]
    names = _names(content, where, notes)
    paths = _image_paths(content, root, where, files, notes)
    labels = {path: _label_file(path, root) for group in paths.values() for path in group}
    rows = {path: _rows(label, names, root) for path, label in labels.items() if label}
    # YOLO trainers, too, take an image without a label file for one that shows nothing.
    empty = [path.relative_to(root) for path, label in labels.items() if label is None]
    notes += source.note_of(empty, "images have no label file and count as empty")
    boxes_only = _check_values(content, [row for group in rows.values() for row in group], where)
    if boxes_only:
        notes.append("a pose dataset (kpt_shape): its boxes are read, its keypoints are not")
    splits = {}
    for split, group in paths.items():
        splits[split] = []
        for path in group:
            size = source.picture_size(path, root)
            objects = tuple(
                _object(names[number], values[: 4 if boxes_only else None], size)
                for _, number, values in rows.get(path, ())
            )
            own_files = (labels[path],) if labels[path] else ()
            splits[split].append(source.SourceImage(path, *size, objects, {}, own_files))
    return source.Source("yolo", splits, source.numbered(names.values()), notes, files)


def names_file(root):
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
        fix = "write names: [crack, joint] or names: {0: crack, 1: joint}"
        raise InputError(f"names is {str(content['names'])[:200]}", where=where, fix=fix)
    if count not in (None, len(texts)):
        notes.append(f"nc is {count}, but names lists {len(texts)}, which is taken")
    notes += source.note_of_doubles(texts.values())
    return {number: texts[number] for number in sorted(texts)}


def _image_paths(content, root, where, files, notes):
    """Map each split to its image files, by the keys of the YAML file or by the usual folders."""
    listed, paths = {}, {}
    for key in (key for key in _KEYS if content.get(key)):
        if listed.setdefault(_KEYS[key], content[key]) != content[key]:
            raise InputError("'val' and 'valid' differ", where=where, fix="remove one of them")
    if not listed:
        folders, images = source.split_folders(root), source.folder_named(root, "images")
        if source.WHOLE in folders and images is not None:
            folders = source.split_folders(images)
        paths = {split: _images_of(folder, root, root, []) for split, folder in folders.items()}
        if not any(paths.values()):
            message = "names no split, and there is no image in images/ or train/images/"
            raise InputError(message, where=where, fix="add 'train: train/images' to the file")
        return paths
    base = root / str(content.get("path") or ".")
    if not base.is_dir():
        notes.append(f"path '{content['path']}' does not exist: {root.name}/ is taken")
        base = root
    for split, entry in listed.items():
        entries = [str(value) for value in (entry if isinstance(entry, list) else [entry])]
        places = {value: _existing(value, base, root, where) for value in entries}
        lost = [value for value in entries if places[value] is None]
        if not lost:
            images = [path for p in places.values() for path in _images_of(p, base, root, files)]
            paths[split] = list(dict.fromkeys(images))
        elif split == "train" or len(listed) == 1:
            message = f"names '{lost[0]}', which does not exist"
            raise InputError(message, where=where, fix="correct the path")
        else:  # an export without such images still names their folder
            notes.append(f"{split}: '{lost[0]}' does not exist, so there is no such split")
    return paths


def _images_of(place, base, root, files):
    """List the images of a folder and of those in it, or of a text file of paths."""
    if place.is_dir():
        place = source.folder_named(place, "images") or place
        return [*source.by_stem(place, IMAGE_SUFFIXES).values()]  # equal stems would share a label
    files.append(place)
    images = []
    for line in filter(None, map(str.strip, source.read_text(place).splitlines())):
        path = _existing(line, place.parent, root, place) or _existing(line, base, root, place)
        if path is None or not path.is_file():
            raise InputError(f"names '{line}', which does not exist", where=place, fix="correct it")
        images.append(path)
    return images


def _existing(value, base, root, where):
    """Return the file or folder that a dataset names, or None; what lies outside is refused."""
    inner = [part for part in Path(value).parts if part != ".."]
    # Roboflow's exports write one '../' too much.
    places = [base / value, base.joinpath(*inner)]
    places += [] if places[0].exists() else [root / value]
    paths = [Path(os.path.normpath(path)) for path in places if path.exists()]
    real_root = os.path.realpath(root)
    inside = [path for path in paths if Path(os.path.realpath(path)).is_relative_to(real_root)]
    if paths and not inside:
        source.refuse_outside(paths[0], root, where)
    return inside[0] if inside else None


def _label_file(image, root):
    """Return the text file in ``labels/`` in place of ``images/``, or beside the image, or None."""
    parts = image.relative_to(root).parts
    places = [index for index, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    candidates = [image, image.parent / "labels" / image.name]
    for word in ("labels", "Labels") if places else ():
        mirror = root.joinpath(*parts[: places[-1]], word, *parts[places[-1] + 1 :])
        candidates.insert(0, mirror)
    texts = (path.with_suffix(".txt") for path in candidates)
    return next((path for path in texts if path.is_file()), None)


def _rows(label, names, root):
    """Return the (place, class, numbers after it) of each line of a label file."""
    source.refuse_outside(label, root)
    rows = []
    for number, line in enumerate(source.read_text(label).splitlines(), start=1):
        where = f"{label}, line {number}"
        message = f"'{line.strip()[:60]}' is not all numbers"
        with explain(ValueError, message, where=where, fix="write: class x y ..."):
            values = [float(value) for value in line.split()]
        if values and values[0] not in names:
            message = f"class {line.split()[0]} is not among the names {str(names)[:200]}"
            raise InputError(message, where=where, fix="add it to names in the YAML file")
        if values:
            rows.append((where, int(values[0]), values[1:]))
    return rows


def _check_values(content, rows, where):
    """Refuse lines that are neither boxes nor polygons; return whether keypoints follow boxes."""
    shape = content.get("kpt_shape")
    is_pose = shape is not None
    if is_pose and not (isinstance(shape, list) and list(map(type, shape)) == [int, int]):
        raise InputError(f"kpt_shape is {shape!r}", where=where, fix="write [points, 2 or 3]")
    meaning = None if is_pose else _other_meaning({tuple(values) for _, _, values in rows})
    if meaning:
        message = f"each line is a box followed by {meaning}, not a polygon"
        fix = f"name kpt_shape in {where.name}, or leave four numbers after the class"
        raise InputError(message, where=rows[0][0], fix=fix)
    with_points = 4 + shape[0] * shape[1] if is_pose else 0
    other = f"a box with keypoints ({with_points})" if is_pose else "a polygon (6, 8, ...)"
    for place, _, values in rows:
        count = len(values)
        is_other = count == with_points if is_pose else count >= 6 and count % 2 == 0
        if count != 4 and not is_other:
            message = f"a class and {count} numbers are neither a box (4) nor {other}"
            fix = "write: class x y x y x y ... with at least three corners"
            raise InputError(message, where=place, fix=fix)
        for value in values[: 4 if is_pose else None]:
            if not -OUTSIDE <= value <= 1 + OUTSIDE:
                message = f"{value:g} is no share of the image's side"
                raise InputError(message, where=place, fix="divide x by the width, y by the height")
    return is_pose


def _other_meaning(rows):
    """Say what follows a box in rows of one length; None where they are boxes or polygons."""
    # The first two corners of a polygon, taken as centre and size, are hardly ever a box that lies
    # in the image and holds all other corners.
    lengths = {len(values) for values in rows}
    if len(rows) < MIN_ROWS or len(lengths) > 1 or min(lengths) < 6:
        return None
    values = np.array(sorted(rows))
    centre, size, rest = values[:, None, :2], values[:, None, 2:4], values[:, 4:]
    low, high = centre - size / 2, centre + size / 2
    if not ((low >= -OUTSIDE) & (high <= 1 + OUTSIDE)).all():
        return None
    if lengths == {6} and (values[:, 5] == np.floor(values[:, 5])).all():
        return "a confidence and a track number"
    for length in (length for length in (2, 3) if rest.shape[1] % length == 0):
        points = rest.reshape(len(rows), -1, length)
        x_y, visibility = points[..., :2], points[..., 2:]
        is_inside = (x_y >= low - 0.1 * size) & (x_y <= high + 0.1 * size)
        is_point = is_inside.all(axis=2) | (x_y == 0).all(axis=2)
        if length == 2:
            # Corners of rectangles and traced outlines share an x or y; joints of a body hardly do.
            axes = np.sort(values.reshape(len(rows), -1, 2), axis=1)
            is_same = (axes[:, 1:] == axes[:, :-1]) & (axes[:, 1:] != 0)
            is_point &= is_same.any(axis=(1, 2)).mean() <= 0.5
        if is_point.all() and np.isin(visibility, (0, 1, 2)).all():
            return f"{points.shape[1]} keypoints"
    return None


def _object(category, values, size):
    """Turn the numbers of a line into a COCO entry in pixels."""
    shares = np.reshape(values, (-1, 2))
    if len(values) == 4:
        corner, sides = (shares[0] - shares[1] / 2) * size, shares[1] * size
        return {"category": category, "bbox": [*corner.tolist(), *sides.tolist()], "iscrowd": 0}
    # What five decimals took from a half or whole pixel is undone: a corner on the border of two
    # pixels would else fall to either side by chance.
    corners, nearest = shares * size, np.round(2 * shares * size) / 2
    is_near = np.abs(corners - nearest) <= source.PRECISION * np.array(size)
    polygon = np.where(is_near, nearest, corners).ravel().tolist()
    return {"category": category, "segmentation": [polygon], "iscrowd": 0}
