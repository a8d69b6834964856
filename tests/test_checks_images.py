"""Copies of an image in two splits are found, whatever they were saved as."""

import pytest
from builders import dataset_at, write_coco
from PIL import Image

from helpers.checks.images import check_leakage

FILES = {
    "train": {"a.png": [("crack", 8, 8, 16, 32)], "b.png": []},
    "test": {"c.png": [("crack", 8, 8, 16, 32)], "d.png": []},
}


def leakage(root):
    dataset = dataset_at(root)
    splits = {name: dataset.split(name) for name in FILES}
    for split in splits.values():
        dataset.look(split)
    return check_leakage(splits, dataset.pictures)


def test_different_images_are_no_leakage(tmp_path):
    assert leakage(write_coco(tmp_path, FILES)) == []


@pytest.mark.parametrize("quality", [None, 60])
def test_a_copy_is_found_as_a_file_or_by_its_look(tmp_path, quality):
    root = write_coco(tmp_path, FILES)
    source, target = root / "train" / "a.png", root / "test" / "d.png"
    if quality is None:
        target.write_bytes(source.read_bytes())
    else:
        with Image.open(source) as image:
            image.save(target, "JPEG", quality=quality)
    [finding] = leakage(root)
    assert finding.code == "D80_LEAKAGE"
    assert [str(place) for place in finding.places] == ["test/d.png"]
    assert "1 of 2 images of 'test' are also in 'train'" in finding.message
    assert ("same files" in finding.message) == (quality is None)
    assert ("look the same" in finding.message) == (quality is not None)


def test_an_image_that_cannot_be_opened_is_no_leakage(tmp_path):
    root = write_coco(tmp_path, FILES)
    for split, name in (("train", "a.png"), ("test", "c.png")):
        (root / split / name).write_bytes(b"same")
    assert leakage(root) == []
