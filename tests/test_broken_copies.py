"""A copy is intact until a fault is planted, and every fault but one is found."""

import json

import pytest
from builders import DATASET, check, edit_coco, write_coco, write_per_image

from helpers.data.coco import read_split
from helpers.errors import InputError
from helpers.files import WALL_CRACKS
from helpers.lab.spoil import FAULTS, NUM_IMAGES, write_broken_copy, write_copy

VISIBLE = [name for name, fault in FAULTS.items() if fault.codes]


@pytest.fixture
def train(tmp_path):
    return read_split(write_coco(tmp_path / "source", form="rle"), "train")


def findings_of(folder):
    return {finding.code: finding for finding in check(folder).findings}


def objects_of(split):
    return [(r.image_id.split(".")[0], o.category, o.box_xyxy, o.rle, o.is_crowd)
            for r in split.records for o in r.objects]  # fmt: skip


@pytest.mark.parametrize("write", [write_coco, write_per_image])
def test_copy_holds_the_objects_of_the_source_in_the_layout_of_the_document(tmp_path, write):
    train = read_split(write(tmp_path / "source"), "train")
    folder = write_copy(train, tmp_path / "copy")
    copy = read_split(folder, "train")
    assert copy.layout == "per_image"
    assert objects_of(copy) == objects_of(train)
    assert [record.path.suffix for record in copy.records] == [".jpg"] * len(copy.records)
    assert len(copy.records) == sum(bool(objects) for objects in DATASET["train"].values())


def test_copy_keeps_what_else_is_in_the_pictures_and_is_small(tmp_path):
    train = read_split(WALL_CRACKS, "train")
    copy = read_split(write_copy(train, tmp_path / "copy"), "train")
    assert len(copy.records) == NUM_IMAGES
    contents = {record.image_id: record.contents for record in train.records}
    assert {record.image_id: record.contents for record in copy.records}.items() <= contents.items()
    assert any(record.contents for record in copy.records)


def test_intact_copy_has_no_fault(tmp_path, train):
    findings = findings_of(write_copy(train, tmp_path / "copy"))
    assert {finding.severity for finding in findings.values()} == {"warning"}
    assert findings.keys() == {"D05_MISSING_SPLIT", "D61_NO_ABSENT_PROMPT"}


@pytest.mark.parametrize("name", VISIBLE)
def test_fault_is_found(tmp_path, train, name):
    intact = findings_of(write_copy(train, tmp_path / "intact"))
    broken = findings_of(write_broken_copy(train, tmp_path / "broken", name))
    assert (broken.keys() - intact.keys()) & set(FAULTS[name].codes)


def test_mirrored_annotations_agree_with_themselves(tmp_path, train):
    intact = write_copy(train, tmp_path / "intact")
    mirrored = write_broken_copy(train, tmp_path / "mirrored", "mirrored")
    assert findings_of(mirrored).keys() == findings_of(intact).keys()
    assert objects_of(read_split(mirrored, "train")) != objects_of(read_split(intact, "train"))


def test_transposed_masks_of_square_images_are_found_by_their_boxes(tmp_path):
    train = read_split(WALL_CRACKS, "train")
    folder = write_broken_copy(train, tmp_path / "copy", "transposed")
    assert "D22_BOX_OFF_MASK" in findings_of(folder)


def test_masks_are_left_out_where_there_are_none(tmp_path):
    root = write_coco(tmp_path / "source")
    edit_coco(root, "train", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    folder = write_broken_copy(read_split(root, "train"), tmp_path / "copy", "half size")
    path = next((folder / "train" / "annotations").glob("*.json"))
    entry = json.loads(path.read_text())["annotations"][0]
    assert "segmentation" not in entry
    assert "D45_NO_MASK" in findings_of(folder)


def test_a_second_copy_replaces_the_first(tmp_path, train):
    write_broken_copy(train, tmp_path / "copy", "leakage")
    folder = write_copy(train, tmp_path / "copy", num_images=1)
    assert [path.name for path in folder.iterdir()] == ["train"]
    assert len(list((folder / "train" / "images").iterdir())) == 1


def test_unknown_fault_is_refused_before_anything_is_written(tmp_path, train):
    with pytest.raises(InputError, match="no fault 'rain'"):
        write_broken_copy(train, tmp_path / "copy", "rain")
    assert not (tmp_path / "copy").exists()


def test_split_without_objects_is_refused(tmp_path):
    root = write_coco(tmp_path / "source", {"train": {"a.png": []}})
    with pytest.raises(InputError, match="no image has an object"):
        write_copy(read_split(root, "train"), tmp_path / "copy")
