"""Write ``data/known_things``: walls with what the embedded base knows, as one COCO split.

The walls are the first of those that the base's own score is measured on; its training never saw
them. Pictures are PNG, so that a model gets exactly the pixels that were rendered.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from data.tiny_sam3.make_score import choose_prompts, held_out_walls, prompt_generator
from data.wall_cracks.make import mask_entry
from data.wall_cracks.make_scenes import BASE_CONCEPTS
from helpers.files import DATA

KNOWN_THINGS = DATA / "known_things"
WALLS = 32
CATEGORIES = [
    {"id": number, "name": noun, "supercategory": "wall"}
    for number, noun in enumerate(BASE_CONCEPTS, start=1)
]


def write_known_things(folder: Path, count: int = WALLS) -> None:
    """Write ``count`` walls and their annotations to ``folder/test``."""
    split = folder / "test"
    (split / "images").mkdir(parents=True, exist_ok=True)
    category_ids = {category["name"]: category["id"] for category in CATEGORIES}
    images, annotations = [], []
    for index, scene in enumerate(held_out_walls(count)):
        file_name = f"images/known_{index:03d}.png"
        Image.fromarray(scene.image).save(split / file_name, optimize=True)
        height, width = scene.image.shape[:2]
        image = {"id": index, "file_name": file_name, "width": width, "height": height}
        # What the experiment asks about this wall: present nouns and as many absent ones.
        image["prompts"] = choose_prompts(prompt_generator(index), scene.concepts)
        images.append(image)
        for item in scene.objects:
            entry = {"id": len(annotations) + 1, "image_id": index, **mask_entry(item.mask)}
            annotations.append(entry | {"category_id": category_ids[item.concept]})
    content = {
        "info": {"description": "known_things, synthetic", "license": "CC0-1.0"},
        "images": images,
        "categories": CATEGORIES,
        "annotations": annotations,
    }
    (split / "_annotations.coco.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    """Write the split."""
    parser = argparse.ArgumentParser(description="Write the walls with things the base knows.")
    parser.add_argument(
        "--output", type=Path, default=KNOWN_THINGS, help="folder to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    write_known_things(arguments.output)
    print(f"{arguments.output}: {WALLS} walls")


if __name__ == "__main__":
    main()
