"""Read YOLO datasets: data.yaml, and a text file per image with polygons or boxes in [0, 1].

`supervision.DetectionDataset.from_yolo` is not used. It rounds polygons to whole pixels and fills
their border (hand-drawn potholes keep a mean IoU of 0.97 and a least of 0.85), holds every mask as a
picture, needs the two folders of each split by name, and takes a number too many in a line for a
confidence. Here the polygons stay as they are in the file.
"""

from __future__ import annotations

from pathlib import Path

from helpers.config import read_yaml
from helpers.convert.source import (
    PRECISION,
    WHOLE,
    Source,
    SourceImage,
    images_in,
    numbered,
    split_folders,
)
from helpers.data.images import upright_size
from helpers.errors import InputError

OUTSIDE = 0.01  # share of a side by which rounding and clumsy drawing may leave the image
_KEYS = {"train": "train", "val": "valid", "valid": "valid", "test": "test"}


def is_yolo(root):
    """Tell whether a folder holds a ``data.yaml`` (or any YAML file with ``names``)."""
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
        them.

    Raises
    ------
    InputError
        Naming file, line and value that cannot be read.
    """
    where = _yaml_file(root)
    content = read_yaml(where)
    names = _names(content["names"], where)
    splits, without = {}, 0
    for split, paths in _image_paths(content, where).items():
        images = splits.setdefault(split, [])
        for path in paths:
            label = _label_file(path)
            without += not label.is_file()
            (width, height), _ = upright_size(path)
            images.append(SourceImage(path, width, height, _objects(label, names, width, height)))
    notes = (f"{without} images have no label file and count as empty",) if without else ()
    return Source("yolo", splits, numbered(names.values()), notes)


def _yaml_file(root):
    """Find the YAML file that lists the names, ``data.yaml`` first; None without one."""
    files = [root / "data.yaml", *sorted([*root.glob("*.yaml"), *root.glob("*.yml")])]
    for path in files:
        if path.is_file() and "names" in read_yaml(path):
            return path
    return None


def _names(names, where):
    """Map class numbers to names, whether they are listed or numbered."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    fix = "write names: [crack, joint] or names: {0: crack, 1: joint}"
    if not isinstance(names, dict) or not names:
        raise InputError(f"names is {names!r}", where=where, fix=fix)
    numbers = {int(key): name for key, name in names.items() if str(key).isdigit()}
    if len(numbers) < len(names) or not all(str(name).strip() for name in names.values()):
        raise InputError(f"names is {names!r}", where=where, fix=fix)
    return {number: str(numbers[number]).strip() for number in sorted(numbers)}


def _image_paths(content, where):
    """Map each split to its image files, by the keys of the YAML file or by the usual folders."""
    base = where.parent / str(content.get("path") or ".")
    base = base if base.is_dir() else where.parent
    listed = {_KEYS[key]: content[key] for key in _KEYS if content.get(key)}
    if listed:
        return {split: _listed_images(entry, base, where) for split, entry in listed.items()}
    folders = split_folders(where.parent)
    if folders == {WHOLE: where.parent} and (where.parent / "images").is_dir():
        folders = split_folders(where.parent / "images")
    found = {
        split: list(
            images_in(folder / "images" if (folder / "images").is_dir() else folder).values()
        )
        for split, folder in folders.items()
    }
    if not any(found.values()):
        raise InputError(
            "names no split, and there is no image in images/ or train/images/",
            where=where,
            fix="add 'train: train/images' to the file",
        )
    return found


def _listed_images(entry, base, where):
    """Return the images of a folder, of a list of folders, or of a text file of paths."""
    paths = []
    for value in entry if isinstance(entry, list) else [entry]:
        place = _existing(str(value), base, where)
        if place.is_dir():
            nested = place / "images"
            paths += images_in(nested if nested.is_dir() else place).values()
        else:
            lines = place.read_text(encoding="utf-8").splitlines()
            paths += [
                _existing(line.strip(), place.parent, place) for line in lines if line.strip()
            ]
    return paths


def _existing(value, base, where):
    """Find a file or folder that a dataset names, also where the export wrote '../' too much."""
    parts = [part for part in Path(value).parts if part != ".."]
    for path in (base / value, base / Path(*parts) if parts else base, where.parent / value):
        if path.exists():
            return path
    raise InputError(
        f"names '{value}', which does not exist", where=where, fix="correct the path in the file"
    )


def _label_file(image):
    """Return the text file that belongs to an image, which need not exist."""
    parts = list(image.parts)
    if "images" in parts:
        index = len(parts) - 1 - parts[::-1].index("images")
        parts[index] = "labels"
        return Path(*parts).with_suffix(".txt")
    beside = image.with_suffix(".txt")
    return beside if beside.is_file() else image.parent / "labels" / beside.name


def _objects(label, names, width, height):
    """Read the lines of a label file."""
    if not label.is_file():
        return ()
    lines = label.read_text(encoding="utf-8").splitlines()
    return tuple(
        _object(line.split(), names, width, height, f"{label}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )


def _object(values, names, width, height, where):
    """Turn one line into a COCO entry in pixels."""
    try:
        number, *coordinates = (float(value) for value in values)
    except ValueError as error:
        raise InputError(f"'{' '.join(values)[:60]}' is not all numbers", where=where,
                         fix="write: class x y x y ...") from error  # fmt: skip
    if number not in names:
        raise InputError(
            f"class {values[0]} is not among the names {names}",
            where=where,
            fix="add it to names in the YAML file",
        )
    is_box = len(coordinates) == 4
    if not is_box and (len(coordinates) < 6 or len(coordinates) % 2):
        raise InputError(
            f"a class and {len(coordinates)} numbers are neither a box (4) nor a polygon (6, 8, ...)",
            where=where,
            fix="write: class x y x y x y ... with at least three corners",
        )
    outside = [one for one in coordinates if not -OUTSIDE <= one <= 1 + OUTSIDE]
    if outside:
        raise InputError(
            f"{outside[0]:g} is no share of the image's side",
            where=where,
            fix="divide x by the width and y by the height",
        )
    category = names[int(number)]
    if is_box:
        x, y, w, h = coordinates
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return {"category": category, "bbox": box, "iscrowd": 0}
    sides = (width, height) * (len(coordinates) // 2)
    polygon = [_pixels(one, side) for one, side in zip(coordinates, sides, strict=True)]
    return {"category": category, "segmentation": [polygon], "iscrowd": 0}


def _pixels(share, side):
    """Turn a share of a side into pixels; what five decimals took from a half or whole is undone.

    A corner on the border of two pixels would else fall to either side by chance.
    """
    pixels = share * side
    nearest = round(2 * pixels) / 2
    return nearest if abs(pixels - nearest) <= PRECISION * side else pixels
