"""Faults of image files: broken, of another size, in two splits, turned against their masks."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from helpers.checks.findings import Finding, Place, finding_at
from helpers.data.images import near_pairs, open_upright, same_shape
from helpers.data.records import mask_fits_image

WHAT_AND_FIX = {
    "D07_UNANNOTATED_IMAGE": (
        "have no annotation entry and are not used",
        "annotate them; if they show nothing, add an entry with an empty list",
    ),
    "D08_MISSING_IMAGE": (
        "have an annotation entry and no file",
        "restore the files or remove their entries",
    ),
    "D70_BROKEN_IMAGE": (
        "cannot be opened",
        "replace the files or remove them with their entries",
    ),
    "D71_IMAGE_SHAPE": (
        "have another shape than their annotation says",
        "annotate the upright images, or save them without an EXIF orientation",
    ),
    "D72_IMAGE_SCALED": (
        "are larger or smaller than stated, in the same shape",
        "nothing to do if boxes and masks are in the stated size",
    ),
    "D73_IMAGE_TURNED": (
        "carry an EXIF orientation, which is applied",
        "make sure that they were annotated upright, above all if they are square",
    ),
    "D74_IMAGE_OUTSIDE": (
        "lie outside the dataset, by their path or through a link",
        "copy them into the dataset and correct file_name",
    ),
    "D75_TRANSPARENT": (
        "have transparent pixels, which are made white whatever colour they hide",
        "save the images without transparency, as they looked when they were annotated",
    ),
    "D76_SEVERAL_FRAMES": (
        "hold several frames or pages, of which only the first is used",
        "save the frame that was annotated as an image of its own",
    ),
    "D77_CONTRADICTION": (
        "are described by two statements that differ",
        "correct the wrong one: the objects may belong to another image",
    ),
}


def check_images(split, pictures):
    """Compare image files with what the annotations say about them: D07, D08, D12, D70 to D77.

    ``pictures`` maps their paths to what `helpers.data.dataset.Dataset.look` saw of them.
    """
    places, details = defaultdict(list), defaultdict(list)
    for record in split.records:
        for code, detail in _faults_of(record, pictures[record.path], split.root):
            places[code].append(Place(split.name, record.image_id, record.path))
            details[code].append(detail)
    code = "D07_UNANNOTATED_IMAGE"
    places[code] = [Place(split.name, path.name, path) for path in split.unannotated]
    findings = _unused_files(split)
    for code, (what, fix) in WHAT_AND_FIX.items():
        detail = f" (the first: {details[code][0]})" if details[code] else ""
        findings += finding_at(
            code, places[code], f"{len(places[code])} images {what}{detail}", fix
        )
    return findings


def _faults_of(record, picture, root):
    """Yield the code of each fault of an image file, and a detail."""
    if record.contradiction is not None:
        yield "D77_CONTRADICTION", record.contradiction
    if not is_inside(record.path, root):
        yield "D74_IMAGE_OUTSIDE", str(record.path.resolve())
    if not picture.digest and not record.path.is_file():
        yield "D08_MISSING_IMAGE", str(record.path)
    elif picture.problem is not None:
        fix = f"; {picture.fix}" if picture.fix else ""
        yield "D70_BROKEN_IMAGE", f"{picture.problem}{fix}"
    else:
        yield from _faults_of_content(record, picture)


def _faults_of_content(record, picture):
    """Yield the code of each fault of an image that could be decoded, and a detail."""
    size, stated = picture.size, (record.width, record.height)
    turn = "" if picture.orientation == 1 else f", EXIF orientation {picture.orientation}"
    detail = f"{size[0]} x {size[1]} upright{turn}, {stated[0]} x {stated[1]} stated"
    if not same_shape(size, stated):
        yield "D71_IMAGE_SHAPE", detail
    elif size != stated:
        yield "D72_IMAGE_SCALED", detail
    elif turn:
        yield "D73_IMAGE_TURNED", detail
    if picture.is_transparent:
        yield "D75_TRANSPARENT", record.image_id
    if picture.num_frames > 1:
        yield "D76_SEVERAL_FRAMES", f"{record.image_id} with {picture.num_frames}"


def is_inside(path, root):
    """Return whether a file, links resolved, lies in the dataset of a split's folder."""
    path, root = path.resolve(), root.resolve()
    return path.is_relative_to(root) or path.is_relative_to(root.parent)


def _unused_files(split):
    """Count the files of a split that are neither images nor annotations it reads: D12."""
    if not split.unread:
        return []
    endings = Counter(path.suffix.lower() or "no ending" for path in split.unread)
    counts = ", ".join(f"{number} {ending}" for ending, number in endings.most_common())
    message = f"{len(split.unread)} files are not used: {counts}"
    fix = "nothing to do unless they should be; save other image formats as JPEG or PNG"
    return [Finding("D12_UNUSED_FILES", str(split.root), message, fix)]


def is_usable_picture(record, picture):
    """Return whether the training loader can take the image of a record."""
    return picture.size is not None and same_shape(picture.size, (record.width, record.height))


def check_leakage(splits, pictures):
    """Find images of one split in another, as the same file or as a copy that looks the same: D80."""
    findings = []
    for first, second in combinations(splits, 2):
        same, similar = _shared(splits[first].records, splits[second].records, pictures)
        parts = [f"{len(same)} are the same files"] if same else []
        parts += [f"{len(similar)} look the same, as copies saved anew do"] if similar else []
        shared = [*same, *similar]
        findings += finding_at(
            "D80_LEAKAGE",
            [Place(second, record.image_id, record.path) for record in shared],
            f"{len(shared)} of {len(splits[second].records)} images of '{second}' are also in "
            f"'{first}': {', '.join(parts)}",
            "keep each photograph, and all its crops, in one split",
        )
    return findings


def _shared(first, second, pictures):
    """Return the records of `second` that `first` has byte for byte, and those it has by looks."""
    first, second = (
        [(record, pictures[record.path]) for record in records if pictures[record.path].size]
        for records in (first, second)
    )
    if not first or not second:
        return [], []
    digests = {picture.digest for _, picture in first}
    same = [record for record, picture in second if picture.digest in digests]
    looks = [np.stack([picture.look for _, picture in group]) for group in (first, second)]
    rows = sorted(set(near_pairs(*looks)[:, 1].tolist()))
    return same, [second[row][0] for row in rows if second[row][1].digest not in digests]


SIDE_PX = 256  # images and masks are compared at this size, as squares
RIM_PX = 5  # width of the rim around the objects that they are compared with


def turns():
    """Return the eight ways to turn and mirror a square picture, by name; the first changes nothing."""
    names = ("as it is", "turned by 90", "turned by 180", "turned by 270")
    ways = {}
    for quarter, name in enumerate(names):
        ways[name] = lambda pixels, quarter=quarter: np.rot90(pixels, quarter)
    for quarter, name in enumerate(names):
        ways[f"mirrored, {name}"] = lambda pixels, quarter=quarter: np.rot90(
            pixels[:, ::-1], quarter
        )
    return ways


def contrast(grey, mask):
    """Return how much marked pixels differ from a rim around them, in deviations of the rim.

    ``grey`` and ``mask`` (uint8 of 0 and 1) are (S, S). NaN without mask or rim.
    """
    kernel = np.ones((2 * RIM_PX + 1, 2 * RIM_PX + 1), np.uint8)
    inside = mask.astype(bool)
    rim = cv2.dilate(mask, kernel).astype(bool) & ~inside
    if not inside.any() or not rim.any():
        return float("nan")
    return float(abs(grey[inside].mean() - grey[rim].mean()) / max(grey[rim].std(), 1.0))


def contrast_per_turn(records):
    """Return one `contrast` per image with masks, for each of the `turns` by name.

    Where annotations lie on what they name, the untouched image has by far the highest.
    """
    values = {name: [] for name in turns()}
    for record in records:
        rles = [item.rle for item in record.objects if mask_fits_image(record, item)]
        if not rles:
            continue
        picture = np.asarray(open_upright(record.path).convert("L").resize((SIDE_PX, SIDE_PX)))
        mask = cv2.resize(
            coco_mask.decode(coco_mask.merge(rles)),
            (SIDE_PX, SIDE_PX),
            interpolation=cv2.INTER_NEAREST,
        )
        for name, turn in turns().items():
            values[name].append(contrast(turn(picture).astype(np.float32), mask))
    return {name: np.array(contrasts) for name, contrasts in values.items()}
