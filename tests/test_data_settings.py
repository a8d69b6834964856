"""A split and a check as the config says: the mapping of the training is part of both."""

import pytest
from builders import edit_coco
from tiny_random import save_tiny_base, tiny_run_config, write_dataset

from helpers.checks.dataset import check_dataset
from helpers.data.coco import read_split
from helpers.data.dataset import load_dataset
from helpers.errors import InputError
from helpers.model.sam3 import load_base

MAPPING = "data.prompts_by_category={cracks: crack}"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("data") / "bars")
    for split in ("train", "valid", "test"):
        edit_coco(folder, split, lambda content: content["categories"][0].update(name="cracks"))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def test_a_split_has_the_nouns_of_the_config(base, data_dir):
    plain, mapped = (tiny_run_config(base, data_dir, *more) for more in ((), (MAPPING,)))
    assert load_dataset(plain).split("train") == read_split(data_dir, "train")
    split = load_dataset(mapped).split("train")
    assert split.categories == ("crack",)
    assert {item.file_category for one in split.records for item in one.objects} == {"cracks"}


def test_another_dataset_is_read_with_the_same_mapping(base, data_dir, tmp_path):
    config = tiny_run_config(base, tmp_path / "nowhere", MAPPING)
    assert load_dataset(config, data_dir).split("test").categories == ("crack",)
    with pytest.raises(InputError, match="no such folder"):
        load_dataset(config)


def test_the_check_asks_what_the_training_asks(base, data_dir):
    config = tiny_run_config(base, data_dir, MAPPING)
    model, processor = load_base(base, resolution=config.model.resolution)
    report = check_dataset(load_dataset(config), model, processor)
    assert report.counts["train"]["objects_per_category"] == {"crack": 7}
    assert report.counts["train"]["objects_after_collate"] == 7
    without_model = check_dataset(load_dataset(config))
    assert without_model.counts == report.counts


def test_the_one_prompt_of_a_config_is_asked_in_the_check(base, data_dir):
    """With a prompt for all, absent prompts may not be among its words."""
    config = tiny_run_config(base, data_dir, "data.prompt=line", "data.num_negatives=0")
    report = check_dataset(load_dataset(config))
    assert report.counts["train"]["absent_queries"] == 1  # on the one image without objects


def test_a_slip_in_the_mapping_is_refused(base, data_dir):
    config = tiny_run_config(base, data_dir, "data.prompts_by_category={crakcs: crack}")
    with pytest.raises(InputError, match="did you mean 'cracks'"):
        check_dataset(load_dataset(config))
