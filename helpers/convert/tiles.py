"""Cut large images into tiles for training, with their objects."""

from __future__ import annotations

from pycocotools import mask as coco_mask

from helpers.convert.source import SourceImage
from helpers.data.images import IMAGE_SUFFIXES, open_upright
from helpers.data.masks import mask_to_rle, rle_area, rle_box_xyxy, segmentation_to_rle
from helpers.detect.tiles import tile_boxes
from helpers.errors import InputError

# A cut piece stays an object if its longer side is at least this share of the tile's: two cells of
# SAM3's mask grid, below which the data check calls an object too small.
MIN_PIECE = 2 / 288
OPTIONS = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"quality": 95}}
OPTIONS[".jpeg"] = OPTIONS[".jpg"]


def tile_images(images, folder, tile, overlap):
    """Cut the images that are larger than a tile of `tile` pixels a side; return all images.

    The tiles are written into `folder` as ``<stem>_x<left>_y<top>`` with the image's ending (JPEG and
    WebP in quality 95), also those without objects: there the category is absent, which has to be
    taught. Masks become run lengths. A piece smaller than `MIN_PIECE` is no object of its tile, but
    its category is listed in ``contents``, so that it is not asked as absent where a corner of it
    shows. For `overlap` see `helpers.detect.tiles.tile_boxes`.
    """
    result = []
    for image in images:
        boxes = tile_boxes(image.width, image.height, tile, overlap)
        result += [image] if len(boxes) == 1 else _cut(image, boxes, folder / image.name, tile)
    return result


def _cut(image, boxes, target, tile):
    """Write the tiles of one image beside `target`, the place it would have had as a whole."""
    picture = open_upright(image.path)
    if picture.size != (image.width, image.height):
        raise InputError(
            f"the upright image is {picture.width} x {picture.height} pixels, its annotation says "
            f"{image.width} x {image.height}",
            where=image.path,
            fix="annotate the upright image at its own size",
        )
    objects, contents = [[] for _ in boxes], [set(image.extra.get("contents", ())) for _ in boxes]
    for item in image.objects:
        mask, extent = _mask_and_extent(item, image)
        for index, box in enumerate(boxes):
            piece, side = _piece(item, mask, extent, box)
            if piece is None:
                continue
            if side >= MIN_PIECE * tile or _contains(box, extent):
                objects[index].append(piece)
            else:
                contents[index].add(item["category"])
    tiles = []
    for box, entries, nouns in zip(boxes, objects, contents, strict=True):
        suffix = target.suffix if target.suffix.lower() in IMAGE_SUFFIXES else ".png"
        path = target.with_name(f"{target.stem}_x{box[0]}_y{box[1]}{suffix}")
        picture.crop(box).save(path, **OPTIONS.get(suffix.lower(), {}))
        size = (box[2] - box[0], box[3] - box[1])
        extra = {"contents": sorted(nouns)} if nouns else {}
        tiles.append(SourceImage(path, *size, tuple(entries), extra))
    return tiles


def _mask_and_extent(item, image):
    """Return the mask of an object, None for a box alone, and its tight box in pixels."""
    if item.get("segmentation"):
        where = f"{image.path}, annotation {item.get('id')}"
        try:
            rle = segmentation_to_rle(item["segmentation"], image.height, image.width)
        except ValueError as error:
            raise InputError(str(error), where=where, fix="draw the mask again") from error
        if rle["size"] != [image.height, image.width]:
            raise InputError(
                f"the mask has the size {rle['size']}", where=where, fix="use [height, width]"
            )
        if rle_area(rle):
            return coco_mask.decode(rle), rle_box_xyxy(rle)
    x, y, width, height = item.get("bbox", (0, 0, 0, 0))
    return None, (x, y, x + width, y + height)


def _piece(item, mask, extent, box):
    """Return an object as a tile shows it, or None, and the longer side of that piece in pixels."""
    (x0, y0, x1, y1), (left, top, right, bottom) = box, extent
    left, top, right, bottom = max(left, x0), max(top, y0), min(right, x1), min(bottom, y1)
    if right <= left or bottom <= top:
        return None, 0.0
    entry = {key: item[key] for key in ("category", "iscrowd") if key in item}
    if mask is None:
        bbox = [left - x0, top - y0, right - left, bottom - top]
        return entry | {"bbox": bbox}, max(bbox[2:])
    part = mask[y0:y1, x0:x1]
    if not part.any():
        return None, 0.0
    rle = mask_to_rle(part)
    left, top, right, bottom = rle_box_xyxy(rle)
    return entry | {"segmentation": rle}, max(right - left, bottom - top)


def _contains(box, extent):
    """Return whether a tile shows an object whole."""
    inside = box[0] <= extent[0] and box[1] <= extent[1]
    return inside and extent[2] <= box[2] and extent[3] <= box[3]
