"""Write ``data/known_things``: ``python -m data.known_things.make``.

32 walls with the ten things that the embedded base knows, drawn with a seed that its training does
not use. They measure what an adapter makes the base forget.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.tiny_sam3.make_score import HELD_OUT_SEED, choose_prompts, held_out_walls
from data.wall_cracks.make import annotation_entry
from data.wall_cracks.make_scenes import BASE_CONCEPTS
from helpers.files import ROOT, write_json

NUM_WALLS = 32


def write_walls(folder):
    """Write images (PNG, so that no pixel changes), annotations and the prompts to ask."""
    images_folder = folder / "test" / "images"
    images_folder.mkdir(parents=True, exist_ok=True)
    ids = {noun: number for number, noun in enumerate(BASE_CONCEPTS, start=1)}
    images, annotations, prompts = [], [], {}
    for index, scene in enumerate(held_out_walls(NUM_WALLS)):
        name = f"known_{index:03d}.png"
        Image.fromarray(scene.image).save(images_folder / name, optimize=True)
        height, width = scene.image.shape[:2]
        image = {"id": index + 1, "file_name": f"images/{name}", "width": width, "height": height}
        images.append(image)
        for item in scene.objects:
            entry = annotation_entry(item.mask, as_polygon=False)
            entry |= {"id": len(annotations) + 1, "image_id": image["id"]}
            annotations.append(entry | {"category_id": ids[item.concept]})
        generator = np.random.default_rng((HELD_OUT_SEED, 2, index))
        chosen = choose_prompts(generator, scene.concepts)
        prompts[name] = [noun for noun in dict.fromkeys(chosen) if noun in ids]
    categories = [{"id": number, "name": noun} for noun, number in ids.items()]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "test" / "_annotations.coco.json").write_text(json.dumps(content) + "\n")
    write_json(folder / "prompts.json", prompts)


def main():
    """Write the walls into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "known_things")
    write_walls(parser.parse_args().output)


if __name__ == "__main__":
    main()
