"""Large datasets are read, checked and indexed in time and memory that fit a laptop."""

import json
import time

import numpy as np
from builders import make_processor

from helpers.checks.boxes_and_masks import check_annotations
from helpers.checks.words import check_categories
from helpers.data.coco import read_split
from helpers.data.dataset import PromptDataset

PER_IMAGE = 10
SECONDS_PER_100_000 = 60


def write_large(root, num_images, side):
    """Write annotations of stars with 20 corners; the images are not needed and do not exist."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(num_images):
        images.append({"id": number, "file_name": f"{number}.jpg", "width": side, "height": side})
        for _ in range(PER_IMAGE):
            angle = np.sort(generator.uniform(0, 2 * np.pi, 20))
            radius = side * generator.uniform(0.02, 0.15, (20, 1))
            corners = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            corners += generator.uniform(0.2 * side, 0.8 * side, 2)
            low, extent = corners.min(axis=0), np.ptp(corners, axis=0)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 1 + len(annotations) % 3,
                    "bbox": [*low.tolist(), *extent.tolist()],
                    "segmentation": [corners.ravel().tolist()],
                }
            )
    names = enumerate(("crack", "joint", "moss"), start=1)
    categories = [{"id": number, "name": name} for number, name in names]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "train").mkdir(parents=True)
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def test_time_is_within_a_minute_for_100_000_annotations(tmp_path):
    root = write_large(tmp_path, 1000, 640)
    start = time.process_time()
    split = read_split(root, "train")
    check_annotations(split, mask_size=288, num_queries=200)
    check_categories(split)
    dataset = PromptDataset(
        split, make_processor(), resolution=1008, mask_size=288, num_negatives=2,
        negative_prompts=["dog", "tile"],
    )  # fmt: skip
    seconds = time.process_time() - start
    assert split.num_objects == 1000 * PER_IMAGE
    assert len(dataset) == 1000
    assert seconds < SECONDS_PER_100_000 * split.num_objects / 100_000


def test_memory_grows_with_the_outline_and_not_with_the_pixels(tmp_path):
    def length(side):
        split = read_split(write_large(tmp_path / str(side), 10, side), "train")
        return sum(len(item.rle["counts"]) for record in split.records for item in record.objects)

    # 64 times the pixels: 8 times the outline, in numbers of up to twice as many characters.
    small, large = length(250), length(2000)
    assert small < large < 16 * small
    assert large < 0.01 * 10 * PER_IMAGE * 2000**2
