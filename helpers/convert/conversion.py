"""Turn a dataset of any common format into the layout of this workbook, without loss."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

from helpers.checks.words import check_categories
from helpers.convert.coco import is_coco, read_coco
from helpers.convert.label_tools import is_labelme, is_voc, read_labelme, read_voc
from helpers.convert.mask_pictures import is_masks, read_masks
from helpers.convert.source import WHOLE, settle_polygons
from helpers.convert.splitting import split_source
from helpers.convert.tiles import tile_images
from helpers.convert.yolo import is_yolo, read_yolo
from helpers.data.coco import COCO_FILE, find_splits, read_split
from helpers.data.masks import rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.errors import InputError
from helpers.files import staged_folder

FORMATS = {
    "coco": (is_coco, read_coco),
    "yolo": (is_yolo, read_yolo),
    "voc": (is_voc, read_voc),
    "masks": (is_masks, read_masks),
    "labelme": (is_labelme, read_labelme),
}
"""Name to how it is recognised and how it is read, in the order in which they are tried."""


def detect_format(root):
    """Recognise the format of a dataset.

    Parameters
    ----------
    root : pathlib.Path

    Returns
    -------
    str
        A key of `FORMATS`.

    Raises
    ------
    InputError
        If there is no such path, or nothing in it is recognised.
    """
    if not root.exists():
        raise InputError("no such file or folder", where=root, fix="check the path of the dataset")
    for name, (is_format, _) in FORMATS.items():
        if is_format(root):
            return name
    raise InputError(
        "holds no annotations of a known format",
        where=root,
        fix=f"lay them out as one of {', '.join(FORMATS)}; a YOLO dataset needs its data.yaml",
    )


def read_source(root, format=None, *, category=None, objects="components", polygons="auto"):
    """Read a dataset of any known format.

    Parameters
    ----------
    root : os.PathLike
        The dataset.
    format : str, optional
        A key of `FORMATS`; by default it is recognised.
    category, objects
        For mask pictures, see `helpers.convert.mask_pictures.read_masks`.
    polygons : {"auto", "outline", "pixels"}
        What corners mean in the formats that do not say it: YOLO, VOC and LabelMe; see
        `helpers.convert.source.settle_polygons`.

    Returns
    -------
    helpers.convert.source.Source

    Raises
    ------
    InputError
        Naming the file and the value that cannot be read.
    """
    root = Path(root).expanduser().absolute()
    if format is not None and format not in FORMATS:
        raise InputError(f"there is no format {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    name = detect_format(root) if format is None else format
    is_format, read = FORMATS[name]
    if not is_format(root):
        raise InputError(
            f"holds nothing in the format {name}", where=root, fix="leave --format out"
        )
    options = {"category": category, "objects": objects} if name == "masks" else {}
    source = read(root, **options)
    if not any(source.splits.values()):
        raise InputError("lists no image", where=root, fix="put images beside the annotations")
    return source if name == "coco" else settle_polygons(source, polygons)


def convert(
    src,
    dst,
    *,
    format=None,
    category=None,
    objects="components",
    polygons="auto",
    split=None,
    seed=42,
    tile=None,
    overlap=0.2,
    copy=False,
):
    """Write a dataset as one ``_annotations.coco.json`` per split with the images beside it.

    Parameters
    ----------
    src : os.PathLike
        The dataset, see `read_source`.
    dst : os.PathLike
        A folder that is missing or empty. It is filled in one step, or stays as it is.
    format, category, objects, polygons
        See `read_source`.
    split : sequence of float, optional
        Shares of train, valid and test, see `helpers.convert.splitting.split_source`; replaces the splits
        of the source. By default those are kept, and a source without any becomes ``train``.
    seed : int
        For the division.
    tile : int, optional
        Cut larger images into tiles of this side in pixels, see `helpers.convert.tiles.tile_images`.
    overlap : float
        Share of a tile's side that it shares with the next one, in [0, 1).
    copy : bool
        True to copy the images. By default they are hard links where the file system allows.

    Returns
    -------
    dict
        ``format``, ``source``, ``output``; ``splits``: by name ``images``, ``empty`` (images
        without objects), ``objects``, ``with_mask``, ``categories`` (objects per name);
        ``notes``: list of str.

    Raises
    ------
    InputError
        If the source cannot be read or the destination is in use.
    """
    src, dst = Path(src).expanduser().absolute(), Path(dst).expanduser().absolute()
    _refuse_used(dst)
    source = read_source(src, format, category=category, objects=objects, polygons=polygons)
    notes = list(source.notes)
    splits = source.splits
    if split is not None:
        splits, more = split_source(splits, split, seed)
        notes += more
    elif WHOLE in splits:
        splits = {"train": splits[WHOLE]}
        notes.append("the source has no splits: all images are in train; see --split")
    with staged_folder(dst) as staging:
        for name, images in splits.items():
            folder = staging / name
            folder.mkdir()
            if tile is not None:
                images = tile_images(images, folder, tile, overlap)
            _write_split(folder, images, source, copy=copy)
    summary = {"format": source.format, "source": str(src), "output": str(dst)}
    written = [read_split(dst, name) for name in find_splits(dst)]
    return summary | {"splits": _counts(written), "notes": notes + _category_notes(written)}


def _refuse_used(dst):
    """Raise if the destination is a file, or a folder that holds anything."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError("exists and is not empty", where=dst, fix="choose another folder")


def _write_split(folder, images, source, *, copy):
    """Write the images and the annotation file of one split."""
    by_name = {entry.name: entry.category_id for entry in source.categories}
    names = _file_names(images)
    image_ids = _ids([image.extra.get("id") for image in images])
    entries, annotations = [], []
    own_ids = _ids([item.get("id") for image in images for item in image.objects])
    for image, file_name, image_id in zip(images, names, image_ids, strict=True):
        _place(image.path, folder / file_name, copy=copy)
        entries.append(
            {**image.extra, "id": image_id, "file_name": file_name}
            | {"width": image.width, "height": image.height}
        )
        for item in image.objects:
            entry = _complete(item, image.height, image.width)
            category_id = by_name[entry.pop("category")]
            entry |= {"id": own_ids[len(annotations)], "image_id": image_id}
            annotations.append(entry | {"category_id": category_id})
    table = [
        {"id": entry.category_id, "name": entry.name}
        | ({"supercategory": entry.supercategory} if entry.supercategory else {})
        for entry in source.categories
    ]
    content = {**source.header, "images": entries, "annotations": annotations, "categories": table}
    (folder / COCO_FILE).write_text(json.dumps(content), encoding="utf-8")


def _file_names(images):
    """Name the images in one folder: as they are called, longer where two would be the same."""
    counts = Counter(image.path.name for image in images)
    return [
        image.path.name if counts[image.path.name] == 1 else "_".join(image.path.parts[-3:])
        for image in images
    ]


def _ids(given):
    """Keep ids if they are whole numbers and differ, else number from 1."""
    sound = all(type(one) is int for one in given) and len(set(given)) == len(given)
    return given if sound else list(range(1, len(given) + 1))


def _place(path, target, *, copy):
    """Put an image file into its place, unless a tile was written there already."""
    if path == target:
        return
    if not copy:
        try:
            os.link(path.resolve(), target)
        except OSError:  # another file system, or one without links
            copy = True
    if copy:
        shutil.copy2(path, target)


def _complete(item, height, width):
    """Add box and area to an entry that lacks them; what the file says is not touched."""
    entry = dict(item)
    rle = None
    if entry.get("segmentation") and ("bbox" not in entry or "area" not in entry):
        try:
            rle = segmentation_to_rle(entry["segmentation"], height, width)
        except ValueError:  # a fault of the file, which the data check names
            rle = None
    if "bbox" not in entry and rle is not None and rle_area(rle):
        x0, y0, x1, y1 = rle_box_xyxy(rle)
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    if "area" not in entry and (rle is not None or "bbox" in entry):
        entry["area"] = rle_area(rle) if rle is not None else entry["bbox"][2] * entry["bbox"][3]
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


def _category_notes(splits):
    """Say which names make bad prompts, once for all splits."""
    notes = [
        f"{finding.message} ({finding.code}); data.prompts_by_category can ask for another noun"
        for split in splits
        for finding in check_categories(split)
        if finding.code in ("D31_SIMILAR_NAMES", "D32_NO_NOUN")
    ]
    return list(dict.fromkeys(notes))


def summary_text(summary):
    """Describe a conversion as a table.

    Parameters
    ----------
    summary : dict
        From `convert`.

    Returns
    -------
    str
    """
    lines = [f"{summary['source']} ({summary['format']}) -> {summary['output']}"]
    lines.append(f"  {'split':<8}{'images':>8}{'empty':>8}{'objects':>9}{'masks':>8}  categories")
    for name, row in summary["splits"].items():
        categories = ", ".join(f"{key} {count}" for key, count in row["categories"].items())
        lines.append(
            f"  {name:<8}{row['images']:>8}{row['empty']:>8}{row['objects']:>9}"
            f"{row['with_mask']:>8}  {categories}"
        )
    return "\n".join(lines + [f"  note: {note}" for note in summary["notes"]])
