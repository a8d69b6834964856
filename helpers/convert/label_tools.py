"""Read what labelling tools write per image: LabelMe's JSON of shapes, Pascal VOC's XML of boxes.

`supervision.DetectionDataset` is used for neither. Its LabelMe reader rounds polygons to whole
pixels, fills their border, and skips circles and painted masks, so that an annotated object would be
asked as absent. Its VOC reader decodes every image, ignores ``<size>`` and ``<filename>``, where a
file contradicts its picture, and knows no encoding but UTF-8.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image, UnidentifiedImageError

from helpers.convert.source import (
    WHOLE,
    Source,
    SourceImage,
    by_stem,
    examples,
    files_below,
    folder_named,
    not_decoded,
    numbered,
    picture_size,
    read_text,
    refuse_outside,
    split_folders,
)
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.masks import mask_to_rle
from helpers.errors import InputError
from helpers.files import read_json

CIRCLE_CORNERS = 64
POLYGONS = ("polygon", "rotation", "quadrilateral")


def is_voc(root):
    """Return whether a folder holds XML files of annotations, in ``Annotations/`` or per split."""
    tags = set()
    for folder in split_folders(root).values() if root.is_dir() else ():
        for path in files_below(_xml_folder(folder), (".xml",)):
            tags.add(_parse(path).tag)
            if "annotation" in tags:
                return True
    if "annotations" in tags:
        raise InputError(
            "is an export of 'CVAT for images', which is not read",
            where=root,
            fix="export 'COCO 1.0' from CVAT",
        )
    return False


def read_voc(root):
    """Read the boxes of Pascal VOC annotations.

    Parameters
    ----------
    root : pathlib.Path
        Holds ``Annotations/*.xml``, ``JPEGImages/`` and optionally
        ``ImageSets/Main/{train,val,test}.txt``; or a folder per split with XML files and images
        side by side, as Roboflow exports them.

    Returns
    -------
    helpers.convert.source.Source
        Boxes become ``[x, y, width, height]``. The files count pixels from 1 and include the last
        one, unless a corner is 0: then they count from 0. Polygons and ``SegmentationObject`` are
        not read; such pictures are the format ``masks``.

    Raises
    ------
    InputError
        Naming the file and what cannot be read in it, or where it contradicts its image.
    """
    trees, corners = {}, []
    for split, folder in split_folders(root).items():
        place = _xml_folder(folder)
        files = by_stem(files_below(place, (".xml",)), place)
        read = {stem: (path, _parse(path)) for stem, path in files.items()}
        trees[split] = {stem: pair for stem, pair in read.items() if pair[1].tag == "annotation"}
        corners += [
            _number(box, key, path)
            for path, tree in trees[split].values()
            for box in tree.iterfind("object/bndbox")
            for key in ("xmin", "ymin")
        ]
    first = 0 if min(corners, default=1) < 1 else 1
    splits, notes, renamed, num_polygons = {}, [], [], 0
    for split, folder in split_folders(root).items():
        images = _voc_images(folder)
        splits[split] = {
            stem: _voc_image(path, tree, images, stem, first, root, renamed)
            for stem, (path, tree) in trees[split].items()
        }
        num_polygons += sum(len(tree.findall(".//polygon")) for _, tree in trees[split].values())
        if folder_named(folder, "SegmentationObject", "SegmentationClass"):
            notes.append("masks of VOC are not read here but with --format masks --objects values")
    if renamed:
        notes.append(
            f"{len(renamed)} files name an image in <filename> that is not there; the one of their "
            f"own name is taken: {examples(renamed)}"
        )
    if num_polygons:
        notes.append(f"{num_polygons} objects have a <polygon>, of which only the box is read")
    lists = []
    if set(splits) == {WHOLE}:
        splits, lists = _by_image_sets(root, splits[WHOLE])
    splits = {split: list(images.values()) for split, images in splits.items()}
    names = [item["category"] for images in splits.values() for i in images for item in i.objects]
    return Source("voc", splits, numbered(names), tuple(notes), {}, tuple(lists))


def _xml_folder(folder):
    """Return where the XML files of a split lie."""
    return folder_named(folder, "Annotations") or folder


def _voc_images(folder):
    """Map the stem of each image of a split to its file."""
    for place in (folder_named(folder, "JPEGImages"), folder_named(folder, "images"), folder):
        images = by_stem(files_below(place, IMAGE_SUFFIXES), place) if place else {}
        if images:
            return images
    return {}


def _parse(path):
    """Parse one XML file in the encoding that it declares, which the parser itself may not know."""
    content = path.read_bytes()
    declared = re.match(rb"\s*<\?xml[^>]*?encoding=[\"']([\w.-]+)", content)
    encoding = declared[1].decode().lower() if declared else "utf-8"
    encoding = {"gb2312": "gb18030", "gbk": "gb18030"}.get(encoding, encoding)  # its superset
    try:
        text = read_text(path) if encoding.startswith("utf") else content.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_decoded(path, error) from error
    except LookupError as error:
        raise InputError(f"has the {error}", where=path, fix="save it as UTF-8") from error
    if "<!ENTITY" in text:  # a few bytes of entities can grow to gigabytes, or read other files
        raise InputError("defines entities", where=path, fix="export it again without them")
    try:
        return ElementTree.fromstring(
            re.sub(r"^\s*<\?xml.*?\?>", "", text, count=1, flags=re.DOTALL)
        )
    except ElementTree.ParseError as error:
        raise InputError(
            f"is no complete XML ({error})", where=path, fix="export it again"
        ) from error


def _text(element, key, where):
    """Return the text of a child element, which must be there."""
    value = element.findtext(key)
    if value is None or not value.strip():
        raise InputError(
            f"<{element.tag}> has no <{key}>", where=where, fix="export the annotations again"
        )
    return value.strip()


def _number(element, key, where):
    """Return the number in a child element, which must be there."""
    text = _text(element, key, where)
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"<{key}> is no number but {text!r}", where=where, fix="export the annotations again"
        ) from error


def _voc_image(where, tree, images, stem, first, root, renamed):
    """Read one annotation file; `first` is the number of the first pixel."""
    path = images.get(stem)
    if path is None:
        raise InputError(
            f"there is no image '{stem}' beside it or in JPEGImages/",
            where=where,
            fix="restore the image or remove the file",
        )
    _compare_name(where, tree, path, images, root, renamed)
    size = picture_size(path, root)
    if tree.find("size") is not None:
        stated = tuple(round(_number(tree.find("size"), key, where)) for key in ("width", "height"))
        if stated not in ((0, 0), size):  # some tools leave zeros
            raise _other_size(where, stated, size)
    objects = tuple(_voc_object(element, where, first) for element in tree.iterfind("object"))
    return SourceImage(path, *size, objects, {}, (where,))


def _compare_name(where, tree, path, images, root, renamed):
    """Compare <filename> with the file's own name, which decides where only one of them is there."""
    name = PureWindowsPath((tree.findtext("filename") or "").strip())
    aside = Path(os.path.normpath(where.parent / name.as_posix()))
    if len(name.parts) > 1 and aside.is_file():
        refuse_outside(aside, root, where)
    stem = name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name
    if not stem or stem == path.stem:
        return
    if any(Path(other).name == stem for other in images):
        raise InputError(
            f"<filename> is '{name.name}', its own name means '{path.name}', and both are there",
            where=where,
            fix="correct <filename>",
        )
    renamed.append(f"{where.name} ('{name.name}')")


def _other_size(where, stated, size):
    """Return the InputError for a file that states another size than its image has."""
    return InputError(
        f"says {stated[0]} x {stated[1]} pixels, the upright image has {size[0]} x {size[1]}",
        where=where,
        fix="annotate the image as it is, upright",
    )


def _voc_object(element, where, first):
    """Read the name and the box of one object."""
    box = element.find("bndbox")
    if box is None:
        raise InputError("<object> has no <bndbox>", where=where, fix="export the file again")
    corners = [_number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0 = corners[0] - first, corners[1] - first
    return {
        "category": _text(element, "name", where),
        "bbox": [x0, y0, corners[2] - x0, corners[3] - y0],
        "iscrowd": 0,
    }


def _by_image_sets(root, images):
    """Divide images by the lists in ``ImageSets/Main``; return the splits and the lists read."""
    splits, lists = {}, []
    for word, split in (("train", "train"), ("val", "valid"), ("test", "test")):
        path = root / "ImageSets" / "Main" / f"{word}.txt"
        if path.is_file():
            lists.append(path)
            stems = {_listed_stem(line, images) for line in read_text(path).splitlines()}
            splits[split] = {stem: images[stem] for stem in images if stem in stems}
    if lists and not any(splits.values()):
        raise InputError("names none of the images", where=lists[0], fix="list the images' names")
    return (splits, lists) if lists else ({WHOLE: images}, lists)


def _listed_stem(line, images):
    """Return the stem that a line of a list means: a name with or without ending, a flag after it."""
    words = [line.strip(), *line.split()[:1]]
    stems = words + [word.rpartition(".")[0] for word in words]
    return next((stem for stem in stems if stem in images), None)


def is_labelme(root):
    """Return whether a folder holds JSON files with ``shapes`` at any depth."""
    folders = split_folders(root).values() if root.is_dir() else ()
    return any(True for folder in folders for _ in _files(folder))


def read_labelme(root):
    """Read LabelMe annotations.

    Parameters
    ----------
    root : pathlib.Path
        Holds JSON files and images at any depth, also in a folder per split.

    Returns
    -------
    helpers.convert.source.Source
        Polygons, turned rectangles, circles and painted masks become objects. Polygons with one
        label and one ``group_id`` are one object. A rectangle has a box only.

    Raises
    ------
    InputError
        Naming the file and what cannot be read in it: also a line or a point, which has no area.
    """
    moved = []
    splits = {
        split: [_labelme_image(path, content, root, moved) for path, content in _files(folder)]
        for split, folder in split_folders(root).items()
    }
    notes = []
    if moved:
        notes.append(
            f"{len(moved)} files name an image elsewhere that is not there; the one of that name "
            f"beside them is taken: {examples(moved)}"
        )
    names = {item["category"] for images in splits.values() for i in images for item in i.objects}
    return Source("labelme", splits, numbered(sorted(names)), tuple(notes))


def _files(folder):
    """Yield path and content of the JSON files below a folder that hold shapes."""
    damage, is_empty = None, True
    for path in files_below(folder, (".json",)):
        try:
            content = read_json(path)
        except InputError as error:
            if _has_image(path):  # else a file of something else
                raise
            damage = damage or error
            continue
        if isinstance(content.get("shapes"), list):
            is_empty = False
            yield path, content
    if damage and is_empty:
        raise damage


def _has_image(path):
    """Return whether an image lies beside an annotation file under the same name."""
    suffixes = [*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)]
    return any(path.with_suffix(suffix).is_file() for suffix in suffixes)


def _labelme_image(where, content, root, moved):
    """Read one file."""
    name = PureWindowsPath(str(content.get("imagePath") or ""))
    path = Path(os.path.normpath(where.parent / name.as_posix()))
    if len(name.parts) > 1 and not path.is_file() and (where.parent / name.name).is_file():
        path = where.parent / name.name
        moved.append(f"{where.name} ('{name}')")
    if not path.is_file():
        raise InputError(
            f"its image '{name.name}' is not beside it",
            where=where,
            fix="put the image there, or correct imagePath",
        )
    refuse_outside(path, root, where)
    if path.stem != where.stem and _has_image(where):
        raise InputError(
            f"names the image '{path.name}', but one of its own name is beside it, too",
            where=where,
            fix="correct imagePath",
        )
    width, height = size = picture_size(path, root)
    stated = (content.get("imageWidth"), content.get("imageHeight"))
    if stated not in ((None, None), size):
        raise _other_size(where, stated, size)
    objects, groups = [], {}
    for index, shape in enumerate(content["shapes"]):
        entry = _labelme_object(shape, height, width, f"{where}, shape {index}")
        group = (entry["category"], repr(shape.get("group_id")))
        first = groups.get(group) if shape.get("group_id") is not None else None
        if first is not None and isinstance(first.get("segmentation"), list):
            first["segmentation"] += _polygons_of(entry, f"{where}, shape {index}")
            continue
        groups[group] = entry
        objects.append(entry)
    return SourceImage(path, width, height, tuple(objects), {}, (where,))


def _polygons_of(entry, where):
    """Return the polygons of an entry that belongs to a group of polygons."""
    if not isinstance(entry.get("segmentation"), list):
        raise InputError(
            "is grouped with a polygon and is none", where=where, fix="remove its group_id"
        )
    return entry["segmentation"]


def _labelme_object(shape, height, width, where):
    """Turn one shape into a COCO entry."""
    if not isinstance(shape, dict):
        raise InputError("is no shape", where=where, fix="draw it again")
    kind, label = shape.get("shape_type", "polygon"), shape.get("label")
    if not isinstance(label, str) or not label.strip():
        raise InputError("has no label", where=where, fix="name it after what the picture shows")
    entry = {"category": label.strip(), "iscrowd": 0}
    points = _labelme_points(shape, where)
    if kind in POLYGONS and len(points) >= 3:
        return entry | {"segmentation": [points.ravel().tolist()]}
    if kind == "rectangle" and len(points) >= 2:
        low, high = points.min(axis=0), points.max(axis=0)
        return entry | {"bbox": [*low.tolist(), *(high - low).tolist()]}
    if kind == "circle" and len(points) == 2:
        angles = np.arange(CIRCLE_CORNERS) * 2 * math.pi / CIRCLE_CORNERS
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        corners = points[0] + ring * np.linalg.norm(points[1] - points[0])
        return entry | {"segmentation": [corners.ravel().tolist()]}
    if kind == "mask" and len(points) >= 1:
        return entry | {"segmentation": _painted(shape, points[0], height, width, where)}
    raise InputError(
        f"is a {kind} of {len(points)} points, which has no area",
        where=where,
        fix="draw a polygon around the object, or remove the shape",
    )


def _labelme_points(shape, where):
    """Return the points of a shape, (n, 2) in pixels."""
    try:
        points = np.array(shape.get("points"), dtype=float).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"its points are not pairs of numbers ({error})", where=where, fix="draw it again"
        ) from error
    if not np.isfinite(points).all():
        raise InputError("a point is not finite", where=where, fix="draw it again")
    return points


def _painted(shape, corner, height, width, where):
    """Put a painted mask, a PNG of its own box in base64, at its place in the image."""
    try:
        png = base64.b64decode(shape.get("mask") or "", validate=True)
        part = np.array(Image.open(io.BytesIO(png)).convert("L")) > 0
    except (
        binascii.Error,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        TypeError,
        OSError,
    ) as error:
        raise InputError(
            f"its mask is no PNG in base64 ({error})", where=where, fix="draw it again"
        ) from error
    x, y = (round(float(number)) for number in corner)
    mask = np.zeros((height, width), dtype=bool)
    room = mask[max(y, 0) : max(y + part.shape[0], 0), max(x, 0) : max(x + part.shape[1], 0)]
    room[:] = part[max(-y, 0) :, max(-x, 0) :][: room.shape[0], : room.shape[1]]
    return mask_to_rle(mask)
