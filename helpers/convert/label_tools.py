"""Read what labelling tools write per image: LabelMe's JSON of shapes, VOC's XML of boxes."""

import base64
import io
import math
import os
import re
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from helpers.convert import source
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.masks import mask_to_rle
from helpers.errors import InputError, explain
from helpers.files import read_json

CIRCLE_CORNERS = 64
POLYGONS = ("polygon", "rotation", "quadrilateral")
_ANEW = "export the annotations again"


def is_voc(root):
    """Return whether a folder holds XML files of annotations, in ``Annotations/`` or per split."""
    tag = None
    for folder in source.split_folders(root).values():
        place = source.folder_named(folder, "annotations") or folder
        for path in source.files_below(place, (".xml",)):
            tag = _parse(path).tag
            if tag == "annotation":
                return True
    if tag == "annotations":
        message = "is an export of 'CVAT for images', which is not read"
        raise InputError(message, where=root, fix="export 'COCO 1.0' from CVAT")
    return False


def read_voc(root):
    """Read the boxes of Pascal VOC; neither polygons nor images without an XML file are read."""
    folders, trees, corners = source.split_folders(root), {}, []
    for split, folder in folders.items():
        place = source.folder_named(folder, "annotations") or folder
        files = source.by_stem(place, (".xml",))
        read = {stem: (path, _parse(path)) for stem, path in files.items()}
        trees[split] = {stem: pair for stem, pair in read.items() if pair[1].tag == "annotation"}
        for path, tree in trees[split].values():
            boxes = tree.iterfind("object/bndbox")
            corners += [_number(box, key, path) for box in boxes for key in ("xmin", "ymin")]
    # Pixels count from 1, the last one included, unless a corner is 0: then they count from 0.
    first = 0 if min(corners, default=1) < 1 else 1
    splits, renamed, num_polygons, notes, lists = {}, [], 0, [], []
    for split, folder in folders.items():
        places = [source.folder_named(folder, name) for name in ("jpegimages", "images")]
        images = (source.by_stem(place, IMAGE_SUFFIXES) for place in (*places, folder) if place)
        images = next(filter(None, images), {})
        splits[split] = {}
        for stem, (path, tree) in trees[split].items():
            splits[split][stem] = _voc_image(path, tree, images, stem, first, root, renamed)
            num_polygons += len(tree.findall("object/polygon"))
        if source.folder_named(folder, "segmentationobject", "segmentationclass"):
            notes.append("masks of VOC are not read here but with --format masks --objects values")
    text = "files name an image in <filename> or <path> that is not there and is not used"
    notes += source.note_of(renamed, text)
    if num_polygons:
        notes.append(f"{num_polygons} objects have a <polygon>, of which only the box is read")
    if source.WHOLE in splits:
        splits, lists = _by_image_sets(root, splits, notes)
    splits = {split: [*images.values()] for split, images in splits.items()}
    return _source("voc", splits, notes, lists)


def _source(name, splits, notes, files):
    """Return a source whose categories are those of its objects."""
    images = [image for group in splits.values() for image in group]
    names = sorted({item["category"] for image in images for item in image.objects})
    return source.Source(name, splits, source.numbered(names), notes, files)


def _parse(path):
    """Parse one XML file in the encoding that it declares, which the parser itself may not know."""
    declared = re.match(rb"\s*<\?xml[^>]*?encoding=[\"']([\w.-]+)", path.read_bytes())
    encoding = declared[1].decode().lower() if declared else "utf-8"
    superset = {"utf-8": "utf-8-sig", "gb2312": "gb18030", "gbk": "gb18030"}
    text = source.read_text(path, superset.get(encoding, encoding))
    if "<!ENTITY" in text:  # a few bytes of entities can grow to gigabytes, or read other files
        raise InputError("defines entities", where=path, fix=_ANEW)
    text = re.sub(r"^\s*<\?xml.*?\?>", "", text, count=1, flags=re.DOTALL)
    with explain((ElementTree.ParseError, ValueError), "is no complete XML", where=path, fix=_ANEW):
        return ElementTree.fromstring(text)


def _child(element, key, where):
    """Return the child element of a name, or None; several that differ are refused."""
    children = element.findall(key)
    if len({tuple("".join(child.itertext()).split()) for child in children}) > 1:
        message = f"<{element.tag}> has {len(children)} <{key}> that differ"
        raise InputError(message, where=where, fix="leave the right one")
    return children[0] if children else None


def _text(element, key, where):
    """Return the text of a child element, which must be there."""
    child = _child(element, key, where)
    value = "" if child is None else (child.text or "").strip()
    if not value:
        raise InputError(f"<{element.tag}> has no <{key}>", where=where, fix=_ANEW)
    return value


def _number(element, key, where):
    """Return the number in a child element, which must be there."""
    text = _text(element, key, where)
    with suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise InputError(f"<{key}> is no number but {text!r}", where=where, fix=_ANEW)


def _voc_image(where, tree, images, stem, first, root, renamed):
    """Read one annotation file; `first` is the number of the first pixel."""
    path = images.get(stem)
    if path is None:
        message = f"there is no image '{stem}' beside it or in JPEGImages/"
        raise InputError(message, where=where, fix="restore the image or remove the file")
    _compare_name(where, tree, path, images, root, renamed)
    size = source.picture_size(path, root)
    stated = _child(tree, "size", where)
    if stated is not None:
        stated = [_number(stated, key, where) for key in ("width", "height")]
        _compare_size(where, tuple(map(round, stated)), size)
    objects = []
    for element in tree.iterfind("object"):
        box = _child(element, "bndbox", where)
        if box is None:
            raise InputError("<object> has no <bndbox>", where=where, fix=_ANEW)
        x0, y0 = (_number(box, key, where) - first for key in ("xmin", "ymin"))
        bbox = [x0, y0, _number(box, "xmax", where) - x0, _number(box, "ymax", where) - y0]
        objects.append({"category": _text(element, "name", where), "bbox": bbox, "iscrowd": 0})
    return source.SourceImage(path, *size, tuple(objects), {}, (where,))


def _compare_name(where, tree, path, images, root, renamed):
    """Compare <filename> with the file's own name, which decides where only one is there."""
    name, full = (PureWindowsPath((tree.findtext(k) or "").strip()) for k in ("filename", "path"))
    aside = Path(os.path.normpath(where.parent / name.as_posix()))
    if len(name.parts) > 1 and aside.is_file():
        source.refuse_outside(aside, root, where)
    names = {name.name: name, full.name: full}  # where <path> lay is of no matter
    for key, name in names.items():
        stem = name.stem if name.suffix.lower() in IMAGE_SUFFIXES else key
        if stem in ("", path.stem):
            continue
        if any(Path(other).name == stem for other in images):
            both = f"names the image '{key}', its own name means '{path.name}', and both are there"
            raise InputError(both, where=where, fix="correct <filename> and <path>")
        renamed.append(f"{where.name} ('{key}')")


def _compare_size(where, stated, size):
    """Refuse another stated size than that of the image; some tools leave zeros."""
    if stated not in ((0, 0), (None, None), size):
        said, upright = f"{stated[0]!r} x {stated[1]!r}", f"{size[0]} x {size[1]}"
        message = f"says {said} pixels, the upright image has {upright}"
        raise InputError(message, where=where, fix="annotate the image as it is, upright")


def _by_image_sets(root, splits, notes):
    """Divide the images by the lists in ``ImageSets/Main``; return the splits and the lists."""
    images, divided, lists = splits[source.WHOLE], {}, []
    for word, split in (("train", "train"), ("val", "valid"), ("test", "test")):
        path, stems = root / "ImageSets" / "Main" / f"{word}.txt", set()
        if not path.is_file():
            continue
        lists.append(path)
        for line in source.read_text(path).splitlines():
            words = [line.strip(), *line.split()[:1]]  # a flag may follow the name
            words += [word.rpartition(".")[0] for word in words]
            stems |= set([word for word in words if word in images][:1] or words[:1])
        divided[split] = {stem: image for stem, image in images.items() if stem in stems}
        missing = sorted(stems.difference(images, [""]))
        notes += source.note_of(missing, f"names in {path.name} have no image with annotations")
    if lists and not any(divided.values()):
        raise InputError("names none of the images", where=lists[0], fix="list the images' names")
    return divided or splits, lists


def is_labelme(root):
    """Return whether a folder holds JSON files with ``shapes`` at any depth."""
    return any(True for folder in source.split_folders(root).values() for _ in _files(folder))


def read_labelme(root):
    """Read LabelMe's shapes with an area, from JSON files and images at any depth or per split."""
    moved = []
    splits = {
        split: [_labelme_image(path, content, root, moved) for path, content in _files(folder)]
        for split, folder in source.split_folders(root).items()
    }
    text = "files name an image elsewhere that is not there; that beside them is taken"
    return _source("labelme", splits, source.note_of(moved, text), [])


def _files(folder):
    """Yield path and content of the JSON files below a folder that hold shapes."""
    problem, is_empty = None, True
    for path in source.files_below(folder, (".json",)):
        try:
            content = read_json(path)
        except InputError as error:
            if _has_image(path):  # else a file of something else
                raise
            problem = problem or error
            continue
        if isinstance(content.get("shapes"), list):
            is_empty = False
            yield path, content
    if problem and is_empty:
        raise problem


def _has_image(path):
    """Return whether an image lies beside an annotation file under the same name."""
    suffixes = [*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)]
    return any(path.with_suffix(suffix).is_file() for suffix in suffixes)


def _labelme_image(where, content, root, moved):
    """Read one file; polygons of one label and ``group_id`` are one object."""
    name = PureWindowsPath(str(content.get("imagePath") or ""))
    path = Path(os.path.normpath(where.parent / name.as_posix()))
    if len(name.parts) > 1 and not path.is_file() and (where.parent / name.name).is_file():
        path = where.parent / name.name
        moved.append(f"{where.name} ('{name}')")
    if not path.is_file():
        message = f"its image '{name.name}' is not beside it"
        raise InputError(message, where=where, fix="put the image there, or correct imagePath")
    source.refuse_outside(path, root, where)
    if path.stem != where.stem and _has_image(where):
        message = f"names the image '{path.name}', but one of its own name is beside it, too"
        raise InputError(message, where=where, fix="correct imagePath")
    size = source.picture_size(path, root)
    _compare_size(where, (content.get("imageWidth"), content.get("imageHeight")), size)
    objects, groups = [], {}
    for index, shape in enumerate(content["shapes"]):
        place = f"{where}, shape {index}"
        if not isinstance(shape, dict):
            raise InputError("is no shape", where=place, fix="draw it again")
        entry = _labelme_object(shape, *size, place)
        group = (entry["category"], repr(shape.get("group_id")))
        first = groups.setdefault(group, entry) if shape.get("group_id") is not None else entry
        if first is entry or not isinstance(first.get("segmentation"), list):
            objects.append(entry)
        elif isinstance(entry.get("segmentation"), list):
            first["segmentation"] += entry["segmentation"]
        else:
            message = "is grouped with a polygon and is none"
            raise InputError(message, where=place, fix="remove its group_id")
    return source.SourceImage(path, *size, tuple(objects), {}, (where,))


def _labelme_object(shape, width, height, where):
    """Turn one shape into a COCO entry; a rectangle has a box only."""
    kind, label = shape.get("shape_type", "polygon"), shape.get("label")
    if not isinstance(label, str) or not label.strip():
        raise InputError("has no label", where=where, fix="name it after what the picture shows")
    entry = {"category": label.strip(), "iscrowd": 0}
    errors = (TypeError, ValueError)
    with explain(errors, "its points are not pairs of numbers", where=where, fix="draw it again"):
        points = np.array(shape.get("points"), dtype=float)
        points = points.reshape(len(points), 2)
    if not (np.abs(points) <= 100 * max(width, height)).all():
        raise InputError("a point is far outside", where=where, fix="draw it again")
    if kind == "rectangle" and len(points) >= 2:
        low, high = points.min(axis=0), points.max(axis=0)
        return entry | {"bbox": [*low.tolist(), *(high - low).tolist()]}
    if kind == "mask" and len(points) >= 1:
        return entry | {"segmentation": _painted(shape, points, width, height, where)}
    if kind == "circle" and len(points) == 2:
        angles = np.arange(CIRCLE_CORNERS) * 2 * math.pi / CIRCLE_CORNERS
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points = points[0] + ring * np.linalg.norm(points[1] - points[0])
    elif kind not in POLYGONS or len(points) < 3:
        message = f"is a {kind} of {len(points)} points, which has no area"
        raise InputError(message, where=where, fix="draw a polygon, or remove the shape")
    return entry | {"segmentation": [points.ravel().tolist()]}


def _painted(shape, points, width, height, where):
    """Put a painted mask, a PNG of its own box in base64, at its place in the image."""
    canvas = Image.new("L", (width, height))
    # Pillow raises another type for each way a file can be broken.
    with explain(Exception, "its mask is no PNG in base64", where=where, fix="draw it again"):
        png = base64.b64decode(shape.get("mask") or "", validate=True)
        mask = Image.open(io.BytesIO(png)).convert("L")
        canvas.paste(mask, tuple(map(round, points[0].tolist())))
    sides = np.abs(points[-1] - points[0])
    if len(points) == 2 and np.abs(mask.size - sides).max() > 2:
        message = f"has a mask of {mask.size} pixels in a box of {sides.tolist()}"
        raise InputError(message, where=where, fix="draw it again")
    return mask_to_rle(np.array(canvas) > 0)
