"""Turn a dataset of any common format into the layout of this workbook, without loss."""

import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from helpers.checks.boxes_and_masks import check_annotations
from helpers.checks.words import check_categories
from helpers.convert.coco import annotation_files, read_coco
from helpers.convert.division import split_source, tile_images
from helpers.convert.label_tools import is_labelme, is_voc, read_labelme, read_voc
from helpers.convert.mask_pictures import folder_pairs, read_masks
from helpers.convert.source import WHOLE, note_of, refuse_outside, settle_polygons
from helpers.convert.yolo import names_file, read_yolo
from helpers.data.coco import COCO_FILE, find_splits, read_split
from helpers.data.images import IMAGE_SUFFIXES, spelling
from helpers.data.masks import rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.errors import InputError, explain
from helpers.files import files_below, progress_bar, staged_folder

# What finds the files of each format, and what reads them, in the order in which they are tried.
FORMATS = {
    "coco": (annotation_files, read_coco),
    "yolo": (names_file, read_yolo),
    "voc": (is_voc, read_voc),
    "masks": (folder_pairs, read_masks),
    "labelme": (is_labelme, read_labelme),
}
MAX_NAME = 255  # bytes of a file name
_OTHER_PLACE = "make room, choose another folder or a shorter name"
PICTURES = (*IMAGE_SUFFIXES, ".heic", ".heif", ".gif", ".avif")
# Findings of `check` about what the source states twice or cannot mean, told here at once.
NOTED = tuple("D20 D21 D22 D24 D31 D32 D36 D40 D41 D42 D43 D44 D46 D52".split())


def detect_format(root):
    """Recognise the format of a dataset in a folder: a key of `FORMATS`, else an InputError."""
    root, problem = Path(root), None
    if not root.exists():
        raise InputError("no such file or folder", where=root, fix="check the path of the dataset")
    for name, (find, _) in FORMATS.items():
        try:
            if find(root):
                return name
        except InputError as error:  # a damaged file, which is foreign if another format is sound
            problem = problem or error
    fix = f"lay them out as one of {', '.join(FORMATS)}; a YOLO dataset needs its data.yaml"
    raise problem or InputError("holds no annotations of a known format", where=root, fix=fix)


def read_source(root, format=None, *, category=None, objects="components", polygons="auto"):
    """Read a dataset into a `Source`; for the options see `read_masks` and `settle_polygons`."""
    root = Path(os.path.realpath(Path(root).expanduser()))
    if format is not None and format not in FORMATS:
        raise InputError(f"there is no format {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    with explain(OSError, "cannot be read", where=root, fix=_OTHER_PLACE):
        name = format or detect_format(root)
        find, read = FORMATS[name]
        if format is not None and not find(root):
            raise InputError(f"holds no {name} dataset", where=root, fix="leave --format out")
        source = read(root, category, objects) if name == "masks" else read(root)
        if not any(source.splits.values()):
            raise InputError("lists no image", where=root, fix="put images beside the annotations")
        source = _checked(source, root if root.is_dir() else root.parent)
    return source if name == "coco" else settle_polygons(source, polygons)


def _checked(source, root):
    """Refuse files from outside and images that are listed twice; count the files not read."""
    files, split_of, shared = [*source.files], {}, []
    for split, images in source.splits.items():
        for image in images:
            files += image.files
            real = os.path.realpath(image.path)
            if split_of.get(real) == split:
                message = f"the image '{image.path.relative_to(root)}' is listed twice"
                where = (*image.files, *source.files, root)[0]
                fix = "merge the two entries, or name the image that each means"
                raise InputError(message, where=where, fix=fix)
            shared += [image.path.name] if real in split_of else []
            split_of[real] = split
    for path in files:
        refuse_outside(path, root)
    known = {*map(os.path.realpath, files), *split_of}
    unread = [path for path in files_below(root) if os.path.realpath(path) not in known]
    pictures = [path.relative_to(root) for path in unread if path.suffix.lower() in PICTURES]
    others = [path.relative_to(root) for path in unread if path.suffix.lower() not in PICTURES]
    notes = note_of(shared, "images are in more than one split")
    notes += note_of(pictures, "images have no annotation or no split, and are left out")
    notes += note_of(others, "other files are not read")
    unused = dict(sorted(Counter(path.suffix.lower() for path in unread).items()))
    return replace(source, notes=source.notes + notes, unused=unused)


def convert(src, dst, *, split=None, seed=42, tile=None, overlap=0.2, **reading):
    """Write a dataset as one ``_annotations.coco.json`` per split with copies of its images.

    Parameters
    ----------
    src, dst : os.PathLike
        The dataset, which is never changed; and a folder that is missing or empty, outside `src`.
        It appears complete, in one step, or not at all, also when the process is killed.
    split, seed : sequence of float, optional, and int
        Shares of train, valid and test. By default the splits stay; a source without is ``train``.
    tile, overlap : int, float
        Cut larger images into tiles of this side in pixels, with this share of it in common.
    **reading
        ``format``, ``category``, ``objects``, ``polygons``: see `read_source`.

    Returns
    -------
    dict
        ``format``, ``source``, ``output``, ``notes``, ``unused`` (files not read, by ending), and
        in ``splits`` by name ``images``, ``empty``, ``objects``, ``with_mask``, ``categories``.
    """
    src, dst = Path(src).expanduser().absolute(), Path(dst).expanduser().absolute()
    with explain(OSError, "cannot be written", where=dst, fix=_OTHER_PLACE):
        if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
            raise InputError("exists and is not empty", where=dst, fix="choose another folder")
        if src.is_dir() and Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(src)):
            raise InputError("lies inside the source", where=dst, fix="choose a folder beside it")
    source = read_source(src, **reading)
    notes, splits = source.notes, source.splits
    if split is not None:
        splits, more = split_source(splits, split, seed)
        notes += more
    elif WHOLE in splits:
        splits = {"train": splits[WHOLE]}
        notes.append("the source has no splits: all images are in train; see --split")
    root = Path(os.path.realpath(src))
    root = root if root.is_dir() else root.parent
    real_dst = Path(os.path.realpath(dst))
    writing = explain(OSError, "cannot be written", where=dst, fix=_OTHER_PLACE)
    with writing, staged_folder(real_dst.parent) as place:
        staging = place / real_dst.name
        splits = {name: _with_names(images, root) for name, images in splits.items() if images}
        if tile is not None:  # a fault of the source must be found before it is cut
            for name, images in splits.items():
                _write_annotations(staging / name, images, source)
            notes += finding_notes(_read_back(staging, src))
            shutil.rmtree(staging)
        for name, images in splits.items():
            folder = staging / name
            folder.mkdir(parents=True)
            if tile is not None:
                images = tile_images(images, folder, tile, overlap)
            _write_annotations(folder, images, source)
            with progress_bar(len(images), f"writing {name}") as bar:
                for image in images:
                    bar.update()
                    _place(image.path, folder / image.name)
        written = _read_back(staging, src)
        notes += [] if tile is not None else finding_notes(written)
        if real_dst.exists():
            real_dst.rmdir()  # refused if somebody has filled it meanwhile
    if not any(split.num_objects for split in written):
        notes.append("no image shows an object: nothing can be learned from them")
    summary = {"format": source.format, "source": str(src), "output": str(dst)}
    return summary | {"splits": _counts(written), "unused": source.unused, "notes": notes}


def _with_names(images, root):
    """Name images for one folder: as their files, with all folders before where two are equal."""
    # Names also differ on file systems that ignore case or how accents are composed.
    counts, taken, result = Counter(spelling(image.path.name) for image in images), set(), []
    for image in images:
        name, number = image.path.name, 1
        joined = "_".join(image.path.relative_to(root).parts)
        if counts[spelling(name)] > 1 and len(os.fsencode(joined)) <= MAX_NAME:
            name = joined
        while spelling(name) in taken:  # "a_b.png" and "a/b.png", or folders of very long names
            number += 1
            name = f"{image.path.stem[:50]}_{number}{image.path.suffix}"
        taken.add(spelling(name))
        result.append(replace(image, name=name))
    return result


def _read_back(staging, src):
    """Read the splits that were written; a fault of them is one of the source."""
    try:
        return [read_split(staging, name) for name in find_splits(staging)]
    except InputError as error:
        where = (error.where or "").replace(f"{staging}{os.sep}", f"{src}, ")
        raise InputError(error.message, where=where, fix=error.fix) from error


def _write_annotations(folder, images, source):
    """Write the annotation file of one split."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {entry.name: entry.category_id for entry in source.categories}
    image_ids = _ids([image.extra.get("id") for image in images])
    own_ids = _ids([item.get("id") for image in images for item in image.objects])
    entries, annotations = [], []
    for image, image_id in zip(images, image_ids, strict=True):
        stated = {"file_name": image.name, "width": image.width, "height": image.height}
        entries.append({**image.extra, "id": image_id, **stated})
        for item in image.objects:
            entry = _complete(item, image)
            entry |= {"id": own_ids[len(annotations)], "image_id": image_id}
            annotations.append(entry | {"category_id": by_name[item["category"]]})
    table = [
        {"id": entry.category_id, "name": entry.name}
        | ({"supercategory": entry.supercategory} if entry.supercategory else {})
        for entry in source.categories
    ]
    content = {**source.header, "images": entries, "annotations": annotations, "categories": table}
    (folder / COCO_FILE).write_text(json.dumps(content), encoding="utf-8")


def _ids(values):
    """Keep ids if they are whole numbers and differ, else number from 1."""
    is_sound = all(type(value) is int for value in values) and len(set(values)) == len(values)
    return values if is_sound else list(range(1, len(values) + 1))


def _place(path, target):
    """Copy an image file to a new name, unless it is a tile that was written there."""
    if path != target:
        if target.exists():
            raise InputError("a tile has the name of this image", where=path, fix="rename it")
        # No link: whoever edits a linked picture in place changes the original, too.
        with path.open("rb") as original, target.open("xb") as copy:  # "x": never what is there
            shutil.copyfileobj(original, copy, 1 << 20)


def _complete(item, image):
    """Add box and area to an entry that lacks them; what else the file says is not touched."""
    entry, rle = {key: item[key] for key in item if key != "category"}, None
    segmentation, bbox = entry.get("segmentation"), entry.get("bbox") or None
    if segmentation and (bbox is None or "area" not in entry):
        with suppress(ValueError):  # a fault of the file, which the data check names
            rle = segmentation_to_rle(segmentation, image.height, image.width)
    if bbox is None and rle is not None and rle_area(rle):
        x0, y0, x1, y1 = rle_box_xyxy(rle)
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    elif bbox is None and rle is not None and isinstance(segmentation, list):
        corners = np.concatenate(segmentation).reshape(-1, 2)  # of a polygon that holds no pixel
        entry["bbox"] = [*corners.min(axis=0).tolist(), *np.ptp(corners, axis=0).tolist()]
    if "area" not in entry and rle is not None:
        entry["area"] = rle_area(rle)
    elif "area" not in entry and isinstance(bbox, list) and len(bbox) == 4:
        with suppress(TypeError):  # no numbers, which reading the result names
            entry["area"] = bbox[2] * bbox[3]
    return entry


def _counts(splits):
    """Count what was written, as it is read back."""
    counts = {}
    for split in splits:
        objects = [item for record in split.records for item in record.objects]
        counts[split.name] = {
            "images": len(split.records),
            "empty": sum(not record.objects for record in split.records),
            "objects": len(objects),
            "with_mask": sum(item.rle is not None for item in objects),
            "categories": dict.fromkeys((entry.name for entry in split.category_table), 0)
            | Counter(item.category for item in objects),
        }
    return counts


def finding_notes(splits):
    """Say what `check` will say about the annotations that a reader of the source should know."""
    notes = []
    for split in splits:
        differing = [record.contradiction for record in split.records if record.contradiction]
        notes += note_of(differing, "images are described by two statements that differ (D77)")
        findings = check_annotations(split, mask_size=1, num_queries=10**6)
        for finding in check_categories(split) + findings:
            noun = "data.prompts_by_category can ask for another noun"
            fix = noun if finding.code.startswith("D3") else finding.fix
            if finding.code.startswith(NOTED):
                notes.append(f"{finding.message} ({finding.code}); {fix}")
    return list(dict.fromkeys(notes))
