import json
from dataclasses import replace

import pytest
from builders import CATEGORIES, DATASET, make_processor, write_coco, write_per_image

from helpers.data.coco import read_split
from helpers.data.dataset import PromptDataset, count_objects
from helpers.errors import InputError
from helpers.files import WALL_CRACKS
from helpers.lab.spoil import WRONG_BOX_KEY, WRONG_MASK_KEY, read_split_wrong_keys
from helpers.train.training import train

LAYOUTS = {"coco": write_coco, "per_image": write_per_image}


@pytest.fixture(params=LAYOUTS)
def source(request, tmp_path):
    return LAYOUTS[request.param](tmp_path)


def edit_files(source, change):
    """Apply change(content, annotations of the image) wherever the faulty reader looks."""
    for path in source.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name == "annotations":
            change(content, content["annotations"])
        else:
            for image in content["images"]:
                own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
                change(image, own)
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("split", DATASET)
def test_finds_no_object_and_nothing_else_differs(source, split):
    right, wrong = read_split(source, split), read_split_wrong_keys(source, split)
    assert right.num_objects > 0
    assert wrong.num_objects == 0
    assert wrong == replace(
        right, records=tuple(replace(record, objects=()) for record in right.records)
    )


def test_keeps_what_else_is_in_the_picture(source):
    edit_files(source, lambda entry, _: entry.update(contents=["moss"]))
    wrong = read_split_wrong_keys(source, "train")
    assert all("moss" in record.contents for record in wrong.records)


def test_really_looks_the_wrong_keys_up(source):
    def write_wrong_keys(entry, own):
        entry[WRONG_BOX_KEY] = [item["bbox"] for item in own]
        entry[WRONG_MASK_KEY] = [item["segmentation"] for item in own]

    edit_files(source, write_wrong_keys)
    right, wrong = (read(source, "train") for read in (read_split, read_split_wrong_keys))
    assert wrong.num_objects == right.num_objects
    for expected, record in zip(right.records, wrong.records, strict=True):
        for item, found in zip(expected.objects, record.objects, strict=True):
            assert (found.box_xyxy, found.rle) == (item.box_xyxy, item.rle)
            assert found.category == CATEGORIES[0]


def test_reads_the_per_image_files_where_a_split_has_both_layouts():
    wrong = read_split_wrong_keys(WALL_CRACKS, "test")
    assert wrong.layout == "per_image"
    assert (len(wrong.records), wrong.num_objects) == (32, 0)


def test_one_prompt_per_image_arrives_and_no_object(source):
    wrong = read_split_wrong_keys(source, "train")
    dataset = PromptDataset(
        wrong, make_processor(), resolution=56, mask_size=28, prompt="object", num_negatives=0
    )
    counted = count_objects(dataset)
    assert counted["prompt"].tolist() == ["object"] * len(wrong.records)
    assert not counted["is_positive"].any()
    assert counted["num_objects"].sum() == 0


def test_training_refuses_such_a_split(tmp_path, data_copy, config):
    wrong = read_split_wrong_keys(data_copy, "train")
    with pytest.raises(InputError, match="no object of 6 images reaches the loss"):
        train(config, output_dir=tmp_path / "run", train_split=wrong, val_split=wrong)
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read_split_wrong_keys(tmp_path / "nowhere", "train")
