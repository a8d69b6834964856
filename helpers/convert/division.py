"""Divide images into training, validation and test by scene, and large images into tiles."""

import math
import re
from collections import Counter

import numpy as np
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.convert.source import SourceImage
from helpers.data.images import IMAGE_SUFFIXES, near_pairs, open_upright, picture_hash
from helpers.data.masks import mask_to_rle, rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.detect.tiles import tile_boxes
from helpers.errors import InputError, explain
from helpers.files import progress_bar

NAMES = ("train", "valid", "test")
# Roboflow's ending of augmented copies, and the last number of a name with what goes before it.
ROBOFLOW = re.compile(r"(?:_(?:jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9A-Za-z]+$")
LAST_NUMBER = re.compile(r"^(.*?)[ _.\-()]*(\d+)\D*$")
LARGEST = 0.5  # share of the images from which a group is cut into runs of neighbours
RUNS = 10  # that such a group is cut into, in the order of its last number
# A cut piece stays an object if its longer side is at least this share of the tile's: two cells of
# SAM3's mask grid, below which the data check calls an object too small.
MIN_PIECE = 2 / 288
OPTIONS = dict.fromkeys((".jpg", ".jpeg"), {"quality": 95, "subsampling": 0})
OPTIONS[".webp"] = {"quality": 95}


def name_groups(stems):
    """Give names of one scene equal groups; return (list of str, notes on scenes that were cut)."""
    plain = [ROBOFLOW.sub("", stem) for stem in stems]
    groups, numbers = {}, {}
    for name in plain:
        match = LAST_NUMBER.match(name)
        numbers[name] = int(match[2]) if match else 0
        # "wall_3_17" and "bridge_frame_0040" name a scene; "IMG_0040" says nothing.
        is_scene = match and (re.search(r"\d", match[1]) or "frame" in match[1].casefold())
        groups[name] = match[1] if is_scene else name
    notes = []
    for group, count in Counter(groups[name] for name in plain).items():
        if count > LARGEST * len(stems) and len(groups) > 1:
            members = sorted((numbers[name], name) for name in groups if groups[name] == group)
            for rank, (_, name) in enumerate(members):
                groups[name] = f"{group}, run {rank * RUNS // len(members)}"
            notes.append(f"'{group}' names {count} images and was cut into {RUNS} runs")
    return [groups[name] for name in plain], notes


def scene_groups(paths):
    """Label images (n,) int, equal for one name group or look, also through others; and notes."""
    groups, notes = name_groups([path.stem for path in paths])
    hashes = np.empty((len(paths), 32), dtype=np.uint8)
    with progress_bar(len(paths), "comparing images") as bar:
        for index, path in enumerate(paths):
            hashes[index] = picture_hash(open_upright(path))
            bar.update()
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    by_name = np.stack([np.arange(len(paths)), first[inverse]], axis=1)
    edges = np.concatenate([by_name, near_pairs(hashes, hashes)])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(paths), len(paths)))
    count, labels = connected_components(graph, directed=False)
    if count < len(paths):
        notes.append(f"{len(paths)} images form {count} scenes, each kept in one split")
    return labels, notes


def divide(labels, shares, seed):
    """Return the split (n,) int of each image: whole groups, large ones first, near the shares."""
    sizes = np.bincount(labels)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    lacking = np.array(shares, dtype=float) * len(labels)
    split_of_group = np.empty(len(sizes), dtype=int)
    for group in order:
        split_of_group[group] = np.argmax(lacking)
        lacking[split_of_group[group]] -= sizes[group]
    return split_of_group[labels]


def split_source(splits, shares, seed):
    """Divide all images anew by shares of train, valid and test; return splits and notes."""
    is_sound = len(shares) in (2, 3) and min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6
    if not is_sound or not shares[0]:
        fix = "give numbers that add up to 1, for example --split 0.8 0.1 0.1"
        raise InputError(f"the shares {[*shares]} are not of train, valid and test", fix=fix)
    if seed < 0:
        raise InputError(f"the seed is {seed}", fix="give a whole number of at least 0")
    images = [image for name in splits for image in splits[name]]
    labels, notes = scene_groups([image.path for image in images])
    split_indices, result = divide(labels, shares, seed), {}
    for index, (name, share) in enumerate(zip(NAMES, shares, strict=False)):
        members = [images[place] for place in np.flatnonzero(split_indices == index)]
        if share and not members:
            message = f"{len(images)} images in {labels.max() + 1} scenes leave none for '{name}'"
            raise InputError(message, fix="give a larger share, or divide the images by hand")
        if members:
            result[name] = members
    return result, notes


def tile_images(images, folder, tile, overlap):
    """Cut the images that are larger than `tile` pixels a side into `folder`; return all images."""
    result = []
    for image in images:
        boxes = tile_boxes(image.width, image.height, tile, overlap)
        result += [image] if len(boxes) == 1 else _cut(image, boxes, folder, tile)
    return result


def _cut(image, boxes, folder, tile):
    """Write all tiles of an image, also those without objects: absence has to be taught."""
    picture, target = open_upright(image.path), folder / (image.name or image.path.name)
    if picture.size != (image.width, image.height):
        upright = f"the upright image is {picture.width} x {picture.height} pixels"
        message = f"{upright}, its annotation says {image.width} x {image.height}"
        raise InputError(message, where=image.path, fix="annotate the upright image at its size")
    objects, contents = [[] for _ in boxes], [set(image.extra.get("contents", ())) for _ in boxes]
    for item in image.objects:
        mask, extent = _mask_and_extent(item, image)
        for index, box in enumerate(boxes):
            piece, is_object = _piece(item, mask, extent, box, MIN_PIECE * tile)
            if is_object:
                objects[index].append(piece)
            elif piece is not None:  # no object of its tile, but not asked as absent there
                contents[index].add(item["category"])
    tiles = []
    for box, entries, nouns in zip(boxes, objects, contents, strict=True):
        suffix = target.suffix if target.suffix.lower() in IMAGE_SUFFIXES else ".png"
        path = target.with_name(f"{target.stem}_x{box[0]}_y{box[1]}{suffix}")
        part, extra = picture.crop(box), {"contents": sorted(nouns)} if nouns else {}
        part.save(path, **OPTIONS.get(suffix.lower(), {}))
        tiles.append(SourceImage(path, *part.size, tuple(entries), extra, name=path.name))
    return tiles


def _mask_and_extent(item, image):
    """Return the mask of an object, None for a box alone, and its tight box in pixels."""
    where = f"{image.path}, annotation {item.get('id')}"
    if item.get("segmentation"):
        with explain(ValueError, "its mask cannot be cut", where=where, fix="draw it again"):
            rle = segmentation_to_rle(item["segmentation"], image.height, image.width)
            if rle["size"] != [image.height, image.width]:
                raise ValueError(f"its size {rle['size']} is not [height, width] of the image")
        if rle_area(rle):
            return coco_mask.decode(rle), rle_box_xyxy(rle)
    x, y, width, height = item["bbox"]
    if not all(map(math.isfinite, item["bbox"])):
        raise InputError(f"its box is {item['bbox']}", where=where, fix="draw it again")
    return None, (x, y, x + width, y + height)


def _piece(item, mask, extent, box, least):
    """Return an object as a tile shows it, or None; and whether it is whole or `least` pixels."""
    (x0, y0, x1, y1), (left, top, right, bottom) = box, extent
    left, top, right, bottom = max(left, x0), max(top, y0), min(right, x1), min(bottom, y1)
    is_whole = (left, top, right, bottom) == extent
    if right <= left or bottom <= top:
        return None, False
    piece = {key: item[key] for key in ("category", "iscrowd") if key in item}
    if mask is None:
        piece["bbox"] = [left - x0, top - y0, right - left, bottom - top]
    else:
        part = mask[y0:y1, x0:x1]
        if not part.any():
            return None, False
        piece["segmentation"] = mask_to_rle(part)
        left, top, right, bottom = rle_box_xyxy(piece["segmentation"])
    return piece, is_whole or max(right - left, bottom - top) >= least
