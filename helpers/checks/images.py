"""Faults of image files: broken, of another size, in two splits, turned against their masks."""

from collections import Counter, defaultdict
from itertools import combinations
from pathlib import PurePosixPath

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from helpers.checks.findings import Place, finding_at, finding_of, findings_by_code
from helpers.data.images import near_pairs, open_upright, same_shape
from helpers.data.records import mask_fits_image

SIDE_PX = 256  # images and masks are compared at this size, as squares
RIM_PX = 5  # width of the rim around the objects that they are compared with


def check_images(split, pictures):
    """Compare image files, described in ``pictures`` by path, with what the annotations say."""
    faults = [
        (code, Place(split.name, record.image_id, record.path), detail)
        for record in split.records
        for code, detail in _faults_of(record, pictures[record.path], split.root)
    ]
    for path in split.unannotated:
        faults.append(("D07_UNANNOTATED_IMAGE", Place(split.name, path.name, path), ""))
    findings = findings_by_code(faults)
    if split.unread:  # neither images nor annotations
        endings = Counter(path.suffix.lower() or "no ending" for path in split.unread)
        counts = ", ".join(f"{number} {ending}" for ending, number in endings.most_common())
        values = {"n": len(split.unread), "counts": counts}
        findings.append(finding_of("D12_UNUSED_FILES", split.root, **values))
    return findings


def _faults_of(record, picture, root):
    """Yield the code of each fault of an image file, and a detail."""
    if record.contradiction is not None:
        yield "D77_CONTRADICTION", record.contradiction
    if not picture.digest and not record.path.is_file():
        yield "D08_MISSING_IMAGE", str(record.path)
        return
    if not record.path.resolve().is_relative_to(root.resolve().parent):
        yield "D74_IMAGE_OUTSIDE", str(record.path.resolve())
    if record.path.name != PurePosixPath(record.image_id).name:
        yield "D78_OTHER_SPELLING", f"{record.image_id} is {record.path.name}"
    if picture.problem is not None:
        fix = f"; {picture.fix}" if picture.fix else ""
        yield "D70_BROKEN_IMAGE", f"{picture.problem}{fix}"
        return
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


def check_leakage(splits, pictures):
    """Find images of one split in another, as the same file or a copy that looks the same."""
    findings = []
    for first, second in combinations(splits, 2):
        same, similar = _shared(splits[first].records, splits[second].records, pictures)
        parts = [f"{len(same)} are the same files"] if same else []
        parts += [f"{len(similar)} look the same, as copies saved anew do"] if similar else []
        places = [Place(second, record.image_id, record.path) for record in [*same, *similar]]
        values = {"total": len(splits[second].records), "first": first, "second": second}
        findings += finding_at("D80_LEAKAGE", places, shared=", ".join(parts), **values)
    return findings


def _shared(first, second, pictures):
    """Return the records of `second` that `first` has byte for byte, and those it has by looks."""
    first, second = ([r for r in records if pictures[r.path].size] for records in (first, second))
    digests = {pictures[record.path].digest for record in first}
    same = [record for record in second if pictures[record.path].digest in digests]
    looks = ([pictures[record.path].look for record in records] for records in (first, second))
    similar = (second[row] for row in np.unique(near_pairs(*looks)[:, 1]))
    return same, [record for record in similar if pictures[record.path].digest not in digests]


def turns(picture):
    """Yield a square picture turned and mirrored in eight ways, by name, first as it is."""
    names = ("as it is", "turned by 90", "turned by 180", "turned by 270")
    for mirrored, pixels in (("", picture), ("mirrored, ", picture[:, ::-1])):
        for quarter, name in enumerate(names):
            yield mirrored + name, np.rot90(pixels, quarter)


def contrast(grey, mask):
    """Return how many deviations of their rim marked pixels (S, S) differ from it, or NaN."""
    kernel = np.ones((2 * RIM_PX + 1, 2 * RIM_PX + 1), np.uint8)
    inside = mask.astype(bool)
    rim = cv2.dilate(mask, kernel).astype(bool) & ~inside
    if not inside.any() or not rim.any():
        return float("nan")
    return float(abs(grey[inside].mean() - grey[rim].mean()) / max(grey[rim].std(), 1.0))


def contrast_per_turn(records):
    """Return one `contrast` per image with masks, for each of the `turns` by name."""
    values = defaultdict(list)
    for record in records:
        rles = [item.rle for item in record.objects if mask_fits_image(record, item)]
        if not rles:
            continue
        picture = np.asarray(open_upright(record.path).convert("L").resize((SIDE_PX, SIDE_PX)))
        mask = coco_mask.decode(coco_mask.merge(rles))
        mask = cv2.resize(mask, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_NEAREST)
        for name, turned in turns(picture.astype(np.float32)):
            values[name].append(contrast(turned, mask))
    return {name: np.array(contrasts) for name, contrasts in values.items()}
