import shutil
from dataclasses import replace

import pytest
from builders import edit_coco, write_coco, write_image, write_per_image

from helpers.data.coco import read_split
from helpers.data.dataset import data_fingerprint
from helpers.errors import InputError


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path / "data", form="rle")


def of(root):
    return data_fingerprint(read_split(root, "train"))


def test_is_the_same_elsewhere_and_in_either_layout(root, tmp_path):
    assert len(of(root)) == 16
    assert of(shutil.copytree(root, tmp_path / "copy")) == of(root)
    assert of(write_per_image(tmp_path / "per_image", form="rle")) == of(root)


def move_a_box(content):
    content["annotations"][0]["bbox"][0] += 1


def mark_a_crowd(content):
    content["annotations"][0]["iscrowd"] = 1


def rename_a_category(content):
    content["categories"][0]["name"] = "fissure"


def drop_an_object(content):
    content["annotations"].pop()


def name_a_content(content):
    content["images"][0]["contents"] = ["moss"]


@pytest.mark.parametrize(
    "change", [move_a_box, mark_a_crowd, rename_a_category, drop_an_object, name_a_content]
)
def test_changes_with_the_annotations(root, change):
    before = of(root)
    edit_coco(root, "train", change)
    assert of(root) != before


def test_changes_with_the_bytes_of_an_image(root):
    before = of(root)
    write_image(root / "train" / "a.png", seed=1)
    assert of(root) != before


def test_split_without_images_has_one_too(root):
    assert data_fingerprint(replace(read_split(root, "train"), records=())) != of(root)


def test_missing_image_is_no_data(root):
    (root / "train" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        of(root)
