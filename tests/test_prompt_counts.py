"""Counting without images gives what the dataset asks with them."""

import pytest
from tiny_random import MASK_SIZE, RESOLUTION, tiny_processor, tiny_run_config, write_dataset

from helpers.annotations import read_split
from helpers.datasets import PromptDataset
from helpers.prompt_counts import count_prompts


def items_of(config):
    """Load every item as training does."""
    data = config.data
    dataset = PromptDataset(
        read_split(data.data_dir, data.train_split),
        tiny_processor(),
        resolution=RESOLUTION,
        mask_size=MASK_SIZE,
        prompt=data.prompt,
        num_negatives=data.num_negatives,
        negative_prompts=data.negative_prompts,
        seed=config.training.seed,
    )
    return [dataset[index]["queries"] for index in range(len(dataset))]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.num_negatives=0",),
        ("data.num_negatives=1",),
        ("data.num_negatives=9",),
        ("data.prompt=fissure", "data.num_negatives=2"),
        ("data.prompt=fissure", "data.num_negatives=0"),
        ("data.prompt=fissure", "data.num_negatives=9"),
    ],
)
def test_equals_what_the_dataset_asks(tmp_path, overrides):
    config = tiny_run_config("base", write_dataset(tmp_path), *overrides)
    asked = items_of(config)
    present = [[query for query in queries if query["is_positive"]] for queries in asked]
    counts = count_prompts(config)
    assert counts.train_images == len(asked)
    assert counts.val_images == 3
    assert counts.mean_prompts == sum(map(len, asked)) / len(asked)
    assert counts.max_prompts == max(map(len, asked))
    assert counts.max_present == max(map(len, present))
    objects = [len(query["boxes_cxcywh"]) for queries in present for query in queries]
    assert counts.max_objects == max(objects)
    assert counts.val_prompts == 1 + len(config.evaluation.absent_prompts)


def test_without_data_the_config_is_read(tmp_path):
    config = tiny_run_config("base", tmp_path / "nowhere", "data.num_negatives=4")
    counts = count_prompts(config)
    assert (counts.max_prompts, counts.mean_prompts, counts.max_present) == (5, 5.0, 1)
    assert counts.train_images is None
    assert "config" in counts.source
    assert "nowhere" in counts.source
