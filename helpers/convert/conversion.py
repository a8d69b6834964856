"""Turn a dataset of any common format into the layout of this workbook, without loss.

The images are copied, never linked: whoever edits, turns or shrinks a picture in the new dataset
would change the original through a hard link, and nothing would say so. Where the file system can
share the blocks of two files (Btrfs, XFS) a copy costs no room.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import unicodedata
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from helpers.checks.words import check_categories
from helpers.convert.coco import is_coco, read_coco
from helpers.convert.label_tools import is_labelme, is_voc, read_labelme, read_voc
from helpers.convert.mask_pictures import is_masks, read_masks
from helpers.convert.source import (
    HEIC,
    WHOLE,
    examples,
    files_below,
    refuse_outside,
    settle_polygons,
)
from helpers.convert.splitting import split_source
from helpers.convert.tiles import tile_images
from helpers.convert.yolo import is_yolo, read_yolo
from helpers.data.coco import COCO_FILE, find_splits, read_split
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.masks import rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.errors import InputError, printable

if sys.platform == "linux":
    import fcntl

FORMATS = {
    "coco": (is_coco, read_coco),
    "yolo": (is_yolo, read_yolo),
    "voc": (is_voc, read_voc),
    "masks": (is_masks, read_masks),
    "labelme": (is_labelme, read_labelme),
}
"""Name to how it is recognised and how it is read, in the order in which they are tried."""

FICLONE = 0x40049409  # ioctl of Linux: let a file share the blocks of another until one is written
PICTURES = (*IMAGE_SUFFIXES, *HEIC, ".gif", ".avif")
MAX_NAME = 255  # bytes of a file name
AREA_SLACK = (20, 0.2)  # pixels, and share of a mask, by which a stated area may differ
BOX_SLACK = (2, 0.1)  # pixels, and share of a side, by which a box may miss that of its mask
MOST = 0.5  # share of its pictures above which a category may be the background
NEARLY_ALL = 0.95  # the same in one picture


def detect_format(root):
    """Recognise the format of a dataset.

    Parameters
    ----------
    root : os.PathLike

    Returns
    -------
    str
        A key of `FORMATS`.

    Raises
    ------
    InputError
        If there is no such path, or nothing in it is recognised.
    """
    root, problem = Path(root), None
    if not root.exists():
        raise InputError("no such file or folder", where=root, fix="check the path of the dataset")
    for name, (is_format, _) in FORMATS.items():
        try:
            if is_format(root):
                return name
        except InputError as error:  # a damaged file, which is foreign if another format is sound
            problem = problem or error
    raise problem or InputError(
        "holds no annotations of a known format",
        where=root,
        fix=f"lay them out as one of {', '.join(FORMATS)}; a YOLO dataset needs its data.yaml",
    )


def read_source(root, format=None, *, category=None, objects="components", polygons="auto"):
    """Read a dataset of any known format.

    Parameters
    ----------
    root : os.PathLike
        The dataset: a folder, or a COCO file. Nothing outside the folder, or the folder of the
        file, is read.
    format : str, optional
        A key of `FORMATS`; by default it is recognised.
    category, objects
        For mask pictures, see `helpers.convert.mask_pictures.read_masks`.
    polygons : {"auto", "outline", "pixels"}
        What corners mean in YOLO and LabelMe, which do not say it: points on the outline, or pixels
        that belong to the object. With ``auto``, pixels if all corners are whole numbers.

    Returns
    -------
    helpers.convert.source.Source

    Raises
    ------
    InputError
        Naming the file and the value that cannot be read.
    """
    root = Path(os.path.realpath(Path(root).expanduser()))
    if format is not None and format not in FORMATS:
        raise InputError(f"there is no format {format!r}", fix=f"use one of {', '.join(FORMATS)}")
    with _system_errors(root):
        name = detect_format(root) if format is None else format
        is_format, read = FORMATS[name]
        if format is not None and not is_format(root):
            raise InputError(
                f"holds nothing in the format {name}", where=root, fix="leave --format out"
            )
        options = {"category": category, "objects": objects} if name == "masks" else {}
        source = read(root, **options)
        if not source.images:
            raise InputError("lists no image", where=root, fix="put images beside the annotations")
        source = _checked(source, root if root.is_dir() else root.parent)
    return source if name == "coco" else settle_polygons(source, polygons)


@contextmanager
def _system_errors(where):
    """Turn what the operating system refuses (a full disk, a long name) into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            error.strerror or str(error),
            where=error.filename or where,
            fix="make room, choose a folder you may write to, or shorten the name",
        ) from error


def _checked(source, root):
    """Refuse files from outside and images that are listed twice; count the files not read."""
    files = {*source.files, *(path for image in source.images for path in image.files)}
    for path in (*files, *(image.path for image in source.images)):
        refuse_outside(path, root)
    split_of, shared = {}, 0
    for split, images in source.splits.items():
        for image in images:
            real = os.path.realpath(image.path)
            if split_of.get(real) == split:
                raise InputError(
                    f"the image '{image.path.relative_to(root)}' is listed twice",
                    where=(*image.files, *source.files, root)[0],
                    fix="merge the two entries, or name the image that each means",
                )
            shared += real in split_of
            split_of[real] = split
    notes = [f"{shared} images are in more than one split"] if shared else []
    known = {*map(os.path.realpath, files), *split_of}
    unread = [path for path in files_below(root) if os.path.realpath(path) not in known]
    for is_image, text in (
        (True, "images have no annotation or belong to no split, and are left out"),
        (False, "other files are not read"),
    ):
        paths = [path for path in unread if (path.suffix.lower() in PICTURES) == is_image]
        if paths:
            notes.append(
                f"{len(paths)} {text}: {examples(path.relative_to(root) for path in paths)}"
            )
    unused = Counter(path.suffix.lower() for path in unread)
    return replace(source, notes=(*source.notes, *notes), unused=dict(sorted(unused.items())))


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
):
    """Write a dataset as one ``_annotations.coco.json`` per split with copies of the images beside it.

    Parameters
    ----------
    src : os.PathLike
        The dataset, see `read_source`. It is never changed.
    dst : os.PathLike
        A folder that is missing or empty, outside `src`. It appears complete, in one step, or not
        at all, also when the process is killed.
    format, category, objects, polygons
        See `read_source`.
    split : sequence of float, optional
        Shares of train, valid and test, see `helpers.convert.splitting.split_source`; replaces the
        splits of the source. By default those stay, and a source without any becomes ``train``.
    seed : int
        For the division.
    tile : int, optional
        Cut larger images into tiles of this side in pixels, see `helpers.convert.tiles.tile_images`.
    overlap : float
        Share of a tile's side that it shares with the next one, in [0, 1).

    Returns
    -------
    dict
        ``format``, ``source``, ``output``; ``splits``: by name ``images``, ``empty`` (images
        without objects), ``objects``, ``with_mask``, ``categories`` (objects per name); ``unused``
        (files of the source that were not read, by ending); ``notes``: list of str.

    Raises
    ------
    InputError
        If the source cannot be read, holds what lies outside it, or the destination is in use or
        cannot be written.
    """
    src, dst = Path(src).expanduser().absolute(), Path(dst).expanduser().absolute()
    with _system_errors(dst):
        _refuse_destination(src, dst)
    source = read_source(src, format, category=category, objects=objects, polygons=polygons)
    root = Path(os.path.realpath(src if src.is_dir() else src.parent))
    splits, notes = _final_splits(source, split, seed)
    notes += _statement_notes(source.images)
    with _system_errors(dst), _new_folder(Path(os.path.realpath(dst))) as staging:
        for name, images in splits.items():
            folder = staging / name
            folder.mkdir()
            images = _with_names(images, root)
            if tile is not None:
                images = tile_images(images, folder, tile, overlap)
            _write_split(folder, images, source)
        written = [read_split(staging, name) for name in find_splits(staging)]
        notes += _category_notes(written)
    summary = {"format": source.format, "source": str(src), "output": str(dst)}
    return summary | {"splits": _counts(written), "unused": source.unused, "notes": notes}


def _refuse_destination(src, dst):
    """Raise if the destination is a file, holds anything, or lies in the source."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError("exists and is not empty", where=dst, fix="choose another folder")
    if src.is_dir() and Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(src)):
        raise InputError(
            "lies inside the source, which is not changed",
            where=dst,
            fix="choose a folder beside it",
        )


def _final_splits(source, split, seed):
    """Return the images of each split to write, and the notes so far."""
    if split is not None:
        splits, notes = split_source(source.splits, split, seed)
        return splits, [*source.notes, *notes]
    if WHOLE in source.splits:
        note = "the source has no splits: all images are in train; see --split"
        return {"train": source.splits[WHOLE]}, [*source.notes, note]
    return {name: images for name, images in source.splits.items() if images}, [*source.notes]


@contextmanager
def _new_folder(dst):
    """Yield a folder that becomes `dst` in one step; without success nothing stays but what was.

    It lies beside `dst`, in a folder with a lock. The system gives the lock back when a process
    dies, so whoever holds it may clear what a killed conversion left there.
    """
    name = dst.name.encode()[: MAX_NAME - 20].decode(errors="ignore")
    place = dst.parent / f".partial-{name}"
    parents = [path for path in place.parents if not path.exists()]
    lock_file, content = place / "convert.lock", place / "dataset"
    if place.exists() and not lock_file.exists() and any(place.iterdir()):
        raise InputError(
            "is in the way, and no conversion made it", where=place, fix="move or remove it"
        )
    place.mkdir(parents=True, exist_ok=True)
    try:
        with _terminable(), FileLock(lock_file, timeout=0):
            shutil.rmtree(content, ignore_errors=True)
            content.mkdir()
            try:
                yield content
                if dst.exists():
                    dst.rmdir()
                content.rename(dst)
            finally:
                shutil.rmtree(place, ignore_errors=True)
                for path in parents:
                    with suppress(OSError):  # holds the new dataset, or files of others
                        path.rmdir()
    except Timeout as error:
        raise InputError(
            "another conversion is writing it",
            where=dst,
            fix="wait for it, or choose another folder",
        ) from error


@contextmanager
def _terminable():
    """Let SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that nothing is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _with_names(images, root):
    """Name images for one folder: as their files, with folders before it where two would be equal.

    Names also differ on file systems that ignore case or how accents are composed.
    """
    parts = [image.path.relative_to(root).parts for image in images]
    names = [own[-1] for own in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        for index in _clashes(names):
            name = "_".join(parts[index][-depth:])
            names[index] = name if len(os.fsencode(name)) <= MAX_NAME else names[index]
    taken = set(map(_plain, names))
    for index in _clashes(names)[1:]:  # "a_b.png" and "a/b.png", or folders of very long names
        path = Path(names[index])
        numbers = (
            path.with_stem(f"{path.stem[:50]}_{number}").name for number in itertools.count(2)
        )
        names[index] = next(name for name in numbers if _plain(name) not in taken)
        taken.add(_plain(names[index]))
    return [replace(image, new_name=name) for image, name in zip(images, names, strict=True)]


def _plain(name):
    """Return what two names share that some file systems take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _clashes(names):
    """Return the indices of names that are not the only one of their kind."""
    counts = Counter(map(_plain, names))
    return [index for index, name in enumerate(names) if counts[_plain(name)] > 1]


def _write_split(folder, images, source):
    """Write the images and the annotation file of one split."""
    by_name = {entry.name: entry.category_id for entry in source.categories}
    image_ids = _ids([image.extra.get("id") for image in images])
    entries, annotations = [], []
    own_ids = _ids([item.get("id") for image in images for item in image.objects])
    for image, image_id in zip(images, image_ids, strict=True):
        _place(image.path, folder / image.name)
        entries.append(
            {**image.extra, "id": image_id, "file_name": image.name}
            | {"width": image.width, "height": image.height}
        )
        for item in image.objects:
            entry = _complete(item, image)
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


def _ids(values):
    """Keep ids if they are whole numbers and differ, else number from 1."""
    is_sound = all(type(value) is int for value in values) and len(set(values)) == len(values)
    return values if is_sound else list(range(1, len(values) + 1))


def _place(path, target):
    """Copy an image file to a new name, unless it is a tile that was written there."""
    if path == target:
        return
    with path.open("rb") as original, target.open("xb") as copy:  # "x" never opens what is there
        try:
            fcntl.ioctl(copy, FICLONE, original.fileno())
        except (NameError, OSError):  # another system, or a file system that cannot share blocks
            shutil.copyfileobj(original, copy, 1 << 20)


def _complete(item, image):
    """Add box and area to an entry that lacks them; what the file says is not touched."""
    entry = dict(item)
    rle = _rle(item, image) if "bbox" not in entry or "area" not in entry else None
    if "bbox" not in entry and rle is not None and rle_area(rle):
        x0, y0, x1, y1 = rle_box_xyxy(rle)
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    if "area" not in entry and (rle is not None or "bbox" in entry):
        entry["area"] = rle_area(rle) if rle is not None else entry["bbox"][2] * entry["bbox"][3]
    return entry


def _rle(item, image):
    """Return the mask of an entry; None without one, or where the data check names its fault."""
    if not item.get("segmentation"):
        return None
    try:
        return segmentation_to_rle(item["segmentation"], image.height, image.width)
    except ValueError:
        return None


def _statement_notes(images):
    """Compare what annotations say twice, and look at the share of their picture that masks cover."""
    areas, boxes, shares = [], [], {}
    for image in images:
        covered = Counter()
        for item in image.objects:
            rle = _rle(item, image)
            if rle is None or rle["size"] != [image.height, image.width]:
                continue
            area = rle_area(rle)
            covered[item["category"]] += area
            if _misses_area(item.get("area", area), area):
                areas.append(image.path.name)
            if area and "bbox" in item and _misses_box(item["bbox"], rle_box_xyxy(rle)):
                boxes.append(image.path.name)
        for category, area in covered.items():
            shares.setdefault(category, []).append(area / (image.width * image.height))
    notes = [
        f"{len(names)} annotations state another {what} than that of their mask, in {examples(names)}"
        for what, names in (("area", areas), ("box", boxes))
        if names
    ]
    for category, values in shares.items():
        mean, whole = sum(values) / len(values), sum(value >= NEARLY_ALL for value in values)
        if mean > MOST or whole:
            notes.append(
                f"masks of '{category}' cover {mean:.0%} of their pictures on average, and {whole} "
                "pictures nearly whole; if they show the background, invert the masks"
            )
    return notes


def _misses_area(area, measured):
    """Return whether a stated area is another than that of the mask."""
    limit = max(AREA_SLACK[0], AREA_SLACK[1] * measured)
    return type(area) in (int, float) and abs(area - measured) > limit


def _misses_box(bbox, box_xyxy):
    """Return whether a stated box is another than that of the mask."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and {*map(type, bbox)} <= {int, float}):
        return False  # the data check names it
    x0, y0, x1, y1 = box_xyxy
    offsets = (bbox[0] - x0, bbox[1] - y0, bbox[0] + bbox[2] - x1, bbox[1] + bbox[3] - y1)
    limits = [max(BOX_SLACK[0], BOX_SLACK[1] * side) for side in (x1 - x0, y1 - y0)] * 2
    return any(abs(offset) > limit for offset, limit in zip(offsets, limits, strict=True))


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
        Without characters that a terminal would obey.
    """
    lines = [f"{summary['source']} ({summary['format']}) -> {summary['output']}"]
    lines.append(f"  {'split':<8}{'images':>8}{'empty':>8}{'objects':>9}{'masks':>8}  categories")
    for name, row in summary["splits"].items():
        categories = ", ".join(f"{key} {count}" for key, count in row["categories"].items())
        lines.append(
            f"  {name:<8}{row['images']:>8}{row['empty']:>8}{row['objects']:>9}"
            f"{row['with_mask']:>8}  {categories}"
        )
    lines += [f"  note: {note}" for note in summary["notes"]]
    return "\n".join(printable(line.replace("\n", "\\n")) for line in lines)
