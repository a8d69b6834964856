"""Generate the course's data, ``data/wall_cracks``: ``python -m data.wall_cracks.make``.

Walls with cracks, and with things the embedded base already knows; a fifth of them has no crack.
Every split is written in both layouts the course reads, the seed document's (one JSON per image) and
Roboflow's (one COCO file), from the same entries, so both describe the same objects to the pixel.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from data.wall_cracks.make_painters import RENDER_SIZE
from data.wall_cracks.make_scenes import BASE_CONCEPTS, draw_concepts, render_scene
from helpers.data.masks import mask_to_rle
from helpers.files import WALL_CRACKS

SPLITS = {"train": 64, "valid": 24, "test": 32}
CATEGORY = {"id": 1, "name": "crack", "supercategory": "defect"}
SECOND_CRACK_SHARE = 0.25
JOINT_SHARE = 0.3
JPEG_QUALITY = 90
DEFAULT_SEED = 20251205


def draw_wall(rng, has_crack):
    """Paint one wall with up to three known things and, if asked, one or two cracks on top."""
    things = draw_concepts(rng, [noun for noun in BASE_CONCEPTS if noun != "joint"], (0, 2))[:3]
    if rng.random() < JOINT_SHARE:
        things.append("joint")
    cracks = ["crack"] * (1 + (rng.random() < SECOND_CRACK_SHARE)) if has_crack else []
    return render_scene(rng, [*things, *cracks])


def polygons_of(mask):
    """Return COCO polygons whose rasterisation is close to the mask; None if it has holes.

    The outline is traced at twice the resolution, so that it runs a quarter of a pixel inside the
    border and not through the centres of the border pixels, which would lose them.
    """
    doubled = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
    outlines, levels = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if any(parent >= 0 for *_, parent in levels[0]):
        return None
    polygons = [
        (outline[:, 0] / 2 + 0.25).flatten().tolist() for outline in outlines if len(outline) >= 3
    ]
    return polygons or None


def annotation_entry(mask, as_polygon):
    """Return the COCO entry of one object: ``segmentation``, ``bbox`` in pixels, ``area``, crowd flag.

    Box and area are those of the decoded segmentation, so that all three always agree.
    """
    polygons = polygons_of(mask) if as_polygon else None
    if polygons is not None:
        segmentation = polygons
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))
    else:
        rle = segmentation = mask_to_rle(mask)
    return {
        "category_id": CATEGORY["id"],
        "bbox": [float(value) for value in coco_mask.toBbox(rle)],
        "segmentation": segmentation,
        "area": float(coco_mask.area(rle)),
        "iscrowd": 0,
    }


def write_split(folder, count, rng):
    """Write ``count`` images and both kinds of annotation files into ``folder``."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        scene = draw_wall(rng, has_crack=index % 5 != 4)
        file_name = f"wall_{folder.name}_{index:03d}.jpg"
        Image.fromarray(scene.image).save(folder / "images" / file_name, quality=JPEG_QUALITY)
        image = {
            "id": index + 1,
            "file_name": f"images/{file_name}",
            "width": RENDER_SIZE,
            "height": RENDER_SIZE,
            "contents": sorted(scene.concepts - {CATEGORY["name"]}),
        }
        cracks = [item.mask for item in scene.objects if item.concept == CATEGORY["name"]]
        entries = [annotation_entry(mask, as_polygon=index % 2 == 1) for mask in cracks]
        numbered = [
            {"id": len(annotations) + n + 1, "image_id": image["id"], **entry}
            for n, entry in enumerate(entries)
        ]
        images.append(image)
        annotations += numbered
        own = {"images": [image], "categories": [CATEGORY], "annotations": numbered}
        path = folder / "annotations" / Path(file_name).with_suffix(".json").name
        path.write_text(json.dumps(own) + "\n")
    whole = {
        "info": {"description": "wall_cracks, synthetic", "license": "CC0-1.0"},
        "images": images,
        "categories": [CATEGORY],
        "annotations": annotations,
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(whole) + "\n")


def main():
    """Write all three splits."""
    parser = argparse.ArgumentParser(
        description="Generate the course's data set of cracks in walls."
    )
    parser.add_argument(
        "--output", type=Path, default=WALL_CRACKS, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="seed of the generator (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for number, (split, count) in enumerate(SPLITS.items()):
        write_split(
            arguments.output / split, count, np.random.default_rng((arguments.seed, number))
        )
        print(f"{arguments.output / split}: {count} images")


if __name__ == "__main__":
    main()
