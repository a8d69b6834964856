"""Each image is read and decoded once before the first step, and nothing large is kept."""

import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from builders import check, dataset_at, model_of, write_coco, write_image
from PIL import Image, ImageFile
from tiny_random import tiny_model, tiny_processor, tiny_run_config, write_dataset

from helpers.checks.dataset import check_dataset
from helpers.data.dataset import data_fingerprint, load_dataset
from helpers.data.images import IMAGE_SUFFIXES
from helpers.train.training import training_data


@pytest.fixture
def work(monkeypatch):
    """Count the image files that are read and the images that are opened and decoded."""
    counts = Counter()

    def count(owner, name, key, applies):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[key] += applies(args[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(Path, "open", "files", lambda path: path.suffix in IMAGE_SUFFIXES)
    count(Image, "open", "files", lambda source: isinstance(source, str | Path))
    count(Image, "open", "opened", lambda source: True)
    count(ImageFile.ImageFile, "load", "decoded", lambda image: bool(image.tile))
    return counts


def test_a_check_reads_and_decodes_each_image_once(tmp_path, work):
    dataset = dataset_at(write_coco(tmp_path))
    check_dataset(dataset, model_of())
    assert work == {"files": 8, "opened": 8, "decoded": 8}
    check_dataset(dataset, model_of())
    data_fingerprint(dataset.split("train"), dataset.pictures)
    assert work["files"] == work["decoded"] == 8


@pytest.mark.parametrize("cache", [False, True])
def test_training_decodes_each_image_once_before_its_first_step(tmp_path, work, cache):
    data_dir = write_dataset(tmp_path / "data")
    settings = [f"training.feature_cache={tmp_path / 'cache'}"] if cache else []
    settings += ["lora.apply_to_vision_encoder=false"]
    config = tiny_run_config(tmp_path / "base", data_dir, *settings)
    data = training_data(config, tiny_model(), tiny_processor())
    images_of_the_cache = 6 + 3 if cache else 0  # the pixels that the frozen encoder sees
    assert work == dict.fromkeys(("files", "opened", "decoded"), 12 + images_of_the_cache)
    assert data.counts["train"]["num_objects"].sum() == 7
    before = work["decoded"]
    data.train[0]
    assert work["decoded"] == before + (not cache)


def test_a_fingerprint_from_the_pass_is_the_one_from_the_files(tmp_path):
    dataset = dataset_at(write_coco(tmp_path))
    split = dataset.split("train")
    assert data_fingerprint(split, dataset.look(split)) == data_fingerprint(split)


def test_files_of_a_dataset_are_parsed_once(tmp_path, monkeypatch):
    data_dir = write_dataset(tmp_path / "data")
    read = []
    original = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *args, **kw: read.append(path) or original(path, *args, **kw),
    )
    config = tiny_run_config(tmp_path / "base", data_dir)
    read.clear()
    training_data(config, tiny_model(), tiny_processor())
    assert sorted(path.parent.name for path in read) == ["test", "train", "valid"]
    dataset = load_dataset(config)
    assert dataset.split("val") is dataset.split("valid")


def test_memory_of_a_check_does_not_grow_with_pixels_and_masks(tmp_path):
    """The masks of 40 objects at 288 cells would take 3 MB, the pixels of 20 images 6 MB."""
    peaks = []
    for number in (2, 20):
        objects = [("crack", 8, 8, 16, 32), ("crack", 40, 4, 12, 40)]
        root = tmp_path / str(number)
        write_coco(root, {"train": {f"{index}.png": objects for index in range(number)}})
        for index in range(number):
            write_image(root / "train" / f"{index}.png", size=(384, 256), seed=index)
        check(root, mask_size=288)
        tracemalloc.start()
        check(root, mask_size=288)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000
