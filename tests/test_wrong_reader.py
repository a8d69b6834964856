import ast
import json
import re
from dataclasses import replace

import pytest
from builders import CATEGORIES, DATASET, make_processor, write_coco, write_per_image
from tiny_random import save_tiny_base, tiny_run_config, write_dataset

from helpers.data.coco import read_split
from helpers.data.dataset import PromptDataset, count_objects
from helpers.errors import InputError
from helpers.files import ROOT, WALL_CRACKS
from helpers.lab.spoil import WRONG_BOX_KEY, WRONG_MASK_KEY, read_split_wrong_keys
from helpers.train.training import train

LAYOUTS = {"coco": write_coco, "per_image": write_per_image}


@pytest.fixture(params=LAYOUTS)
def data_dir(request, tmp_path):
    return LAYOUTS[request.param](tmp_path)


def edit_files(data_dir, change):
    """Apply change(content, annotations of the image) wherever the faulty reader looks."""
    for path in data_dir.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name == "annotations":
            change(content, content["annotations"])
        else:
            for image in content["images"]:
                own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
                change(image, own)
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("split", DATASET)
def test_finds_no_object_and_nothing_else_differs(data_dir, split):
    right, wrong = read_split(data_dir, split), read_split_wrong_keys(data_dir, split)
    assert right.num_objects > 0
    assert wrong.num_objects == 0
    assert wrong == replace(
        right, records=tuple(replace(record, objects=()) for record in right.records)
    )


def test_keeps_what_else_is_in_the_picture(data_dir):
    edit_files(data_dir, lambda entry, _: entry.update(contents=["moss"]))
    wrong = read_split_wrong_keys(data_dir, "train")
    assert all("moss" in record.contents for record in wrong.records)


def test_really_looks_the_wrong_keys_up(data_dir):
    def write_wrong_keys(entry, own):
        entry[WRONG_BOX_KEY] = [item["bbox"] for item in own]
        entry[WRONG_MASK_KEY] = [item["segmentation"] for item in own]

    edit_files(data_dir, write_wrong_keys)
    right, wrong = (read(data_dir, "train") for read in (read_split, read_split_wrong_keys))
    assert wrong.num_objects == right.num_objects
    for expected, record in zip(right.records, wrong.records, strict=True):
        for item, found in zip(expected.objects, record.objects, strict=True):
            assert (found.box_xyxy, found.rle) == (item.box_xyxy, item.rle)
            assert found.category == CATEGORIES[0]


def test_reads_the_per_image_files_where_a_split_has_both_layouts():
    wrong = read_split_wrong_keys(WALL_CRACKS, "test")
    assert wrong.layout == "per_image"
    assert (len(wrong.records), wrong.num_objects) == (32, 0)


def test_one_prompt_per_image_arrives_and_no_object(data_dir):
    wrong = read_split_wrong_keys(data_dir, "train")
    dataset = PromptDataset(
        wrong, make_processor(), resolution=56, mask_size=28, prompt="object", num_negatives=0
    )
    counted = count_objects(dataset)
    assert counted["prompt"].tolist() == ["object"] * len(wrong.records)
    assert not counted["is_positive"].any()
    assert counted["num_objects"].sum() == 0


def test_training_refuses_such_a_split(tmp_path):
    config = tiny_run_config(save_tiny_base(tmp_path / "base"), write_dataset(tmp_path / "data"))
    wrong = read_split_wrong_keys(tmp_path / "data", "train")
    with pytest.raises(InputError, match="no object of 6 images reaches the loss"):
        train(config, output_dir=tmp_path / "run", train_split=wrong, val_split=wrong)
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read_split_wrong_keys(tmp_path / "nowhere", "train")


LABORATORY = re.compile(r"faults(_\w+)?|clinic|confusion|experiment_run")
PLANTS = re.compile(r"faults(_\w+)?|wrong_reader|planting|clinic|confusion")


def test_only_the_laboratory_knows_of_the_faults():
    """Neither the pipeline nor the diagnosis may know what was planted."""
    checked = 0
    for path in (ROOT / "helpers").glob("*.py"):
        if LABORATORY.fullmatch(path.stem):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = str(getattr(node, "module", "")).removeprefix("helpers.")
            names = (
                [alias.name for alias in getattr(node, "names", ())] if module == "helpers" else []
            )
            assert not any(PLANTS.fullmatch(name) for name in (module, *names)), path.name
        checked += 1
    assert checked > 50
