"""Every fault is planted here, and found by the check or the gate that must find it."""

import json
import shutil
from copy import copy
from dataclasses import replace

import pytest
from builders import DATASET, write_coco, write_per_image
from started_runs import copy_walls

from data.experiments.make_confusion import left_in
from helpers.causes import CAUSES, LEFT_OUT
from helpers.checks.dataset import check_dataset
from helpers.checks.findings import CODES
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import load_dataset
from helpers.diagnose.diagnosis import FAILED, GATES, pass_gate
from helpers.errors import InputError
from helpers.files import CONFIGS, WALL_CRACKS
from helpers.lab.careless import AFTER_TRAINING, IN_CODE, MISTAKES, Careless
from helpers.lab.faults import FAULTS, LESSON_FAULTS, SPOIL_SAVED, alive, planted
from helpers.lab.spoil import SHRINK, SPOIL_DATA
from notebooks.examples import NUM_IMAGES, write_broken_copy, write_copy

ALL_FAULTS = FAULTS | LESSON_FAULTS
CHECKED = [name for name, fault in ALL_FAULTS.items() if fault.codes]
ALIVE = {
    "no absent prompts": "absent prompts",
    "trained as object": "words of the training",
    "dropout of a half": "regularisation",
    "flag without effect": "places of LoRA",
    "names of another model": "places of LoRA",
    "wrong keys": "objects after the loader",
    "masks swallowed": "masks after the loader",
    "emptied by a transform": "objects after the loader",
    "boxes in pixels": "box targets",
    "boxes as corners": "box targets",
    "base not frozen": "trained parameters",
    "score weight zero": "loss and objects",
    "sigmoid twice": "loss and objects",
    "many queries per object": "loss and objects",
    "presence left out": "detection",
    "threshold fixed": "detection",
    "masks left at grid size": "detection",
    "boxes left as fractions": "detection",
}
"""Fault of the script to the gate that sees it in the kernel, before any training."""
IN_MODEL = ("base from its config", "base not frozen", "lora b frozen")  # made when the model is
SAVED = {
    "keys with prefix": "keys of the adapter",
    "keys of another version": "keys of the adapter",
    "alpha halved": "saved adapter",
    "numbers lost": "weights as they are",
    "file cut off": "weights as they are",
}
"""Fault of what was saved to the gate that sees it in the files."""
LEARNED = {
    *("half the labels", "hardly any object", "images turned", "trained far too hard"),
    *("words run together", "word out of reach", "presence at its clamp", "lora b frozen"),
    *("text features detached", "settings hard-coded", "base from its config", "spelling"),
    *("loader without effect", "finest level dropped", "categories joined", "nouns in the picture"),
    *(
        "validation crashes",
        "scores hardly paid",
        "first epoch kept",
        "evaluation shifted",
        "weights rounded",
        "numbers lost",
    ),
}
"""Seen after a training, on the whole data, or with the embedded base only: in the confusion table."""
GATE = {gate.name: gate for gate in GATES}


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return copy_walls(tmp_path_factory.mktemp("walls") / "data")


@pytest.fixture(scope="module")
def intact_codes(walls):
    return codes_of(walls)


def codes_of(folder):
    config = load_config(CONFIGS / "crack_detection_config.yaml", "tiny", {"data.data_dir": folder})
    return {finding.code for finding in check_dataset(load_dataset(config)).findings}


def test_every_fault_is_found_somewhere():
    assert ALL_FAULTS.keys() - {*CHECKED, *ALIVE, *SAVED, *LEARNED} == {"mirrored"}
    for name, fault in FAULTS.items():
        assert fault.cause in {*CAUSES, *LEFT_OUT}
        places = [kind for kind in (SPOIL_DATA, MISTAKES, SPOIL_SAVED) if name in kind]
        # To join categories, the data need a second one.
        assert len(places) == (2 if name == "categories joined" else 1)
        assert bool(fault.shown_by) == (fault.seen != "both")
        assert fault.seen in ("both", "alive", "files", "none")
    for fault in ALL_FAULTS.values():
        assert fault.what
        assert fault.symptom
        assert set(fault.codes) <= set(CODES)
    assert {*MISTAKES, *SPOIL_SAVED} <= FAULTS.keys()
    assert set(AFTER_TRAINING) <= set(MISTAKES)


def test_every_cause_has_a_patient_or_a_reason_why_not():
    planted_causes = {fault.cause for fault in FAULTS.values()}
    assert set(CAUSES) <= planted_causes
    assert all(LEFT_OUT.values())


@pytest.mark.parametrize("name", CHECKED)
def test_a_fault_in_files_is_found_by_the_data_check(tmp_path, walls, intact_codes, name):
    folder = shutil.copytree(walls, tmp_path / "data")
    if name == "leakage":
        shutil.rmtree(folder / "valid")
    SPOIL_DATA[name](folder)
    assert (codes_of(folder) - intact_codes) & set(ALL_FAULTS[name].codes)


@pytest.fixture(scope="module")
def made(base, data_dir):
    return lambda *mistakes: Careless(mistakes, base=base, data_dir=data_dir, rank=4, epochs=1)


@pytest.fixture(scope="module")
def untrained(made):
    return made()


@pytest.mark.parametrize("name", ALIVE)
def test_a_mistake_of_the_script_is_named_by_its_gate(made, untrained, name):
    script = copy(untrained) if name in IN_CODE and name not in IN_MODEL else made(name)
    script.mistakes = {name}
    result = pass_gate(GATE[ALIVE[name]], alive(script))
    assert result.status == FAILED, result.measured
    assert FAULTS[name].cause in {evidence.cause for evidence in result.evidence}


def test_no_gate_of_these_speaks_of_the_right_script(untrained):
    patient = alive(untrained)
    for name in set(ALIVE.values()):
        result = pass_gate(GATE[name], patient)
        assert (result.status, result.evidence) == ("ok", ()), result.measured


@pytest.fixture(scope="module")
def saved(untrained, tmp_path_factory):
    untrained.log = [{"epoch": 1, "train_loss": 9.0, "val_loss": 9.0}]
    return untrained.save(tmp_path_factory.mktemp("saved") / "run")


@pytest.mark.parametrize("name", SAVED)
def test_a_fault_of_what_was_saved_is_seen_in_the_files(tmp_path, base, data_dir, saved, name):
    options = {"healthy": saved, "base": base, "data_dir": data_dir, "rank": 4, "epochs": 1}
    script = planted(FAULTS[name], tmp_path, **options)
    result = pass_gate(GATE[SAVED[name]], left_in(tmp_path / "run", script))
    assert result.status == FAILED, result.measured
    assert {evidence.cause for evidence in result.evidence} == {FAULTS[name].cause}


def test_what_stops_the_script_is_said_and_leaves_the_data(tmp_path, base, data_dir):
    script = planted(FAULTS["key"], tmp_path, base=base, data_dir=data_dir)
    assert script.error == "KeyError: 'annotations'"
    assert left_in(tmp_path / "run", script).data_dir == tmp_path / "data"


def test_half_of_the_labels_are_missing_in_every_split(tmp_path, walls):
    folder = shutil.copytree(walls, tmp_path / "data")
    SPOIL_DATA["half the labels"](folder)
    for split in ("train", "valid"):
        before, after = (read_split(root, split).num_objects for root in (walls, folder))
        assert abs(after - before / 2) <= 0.5


ONE_LAYOUT = ("hardly any object",)  # leaves whole files out
TWO_LAYOUTS = [n for n in FAULTS if n in SPOIL_DATA and n not in ONE_LAYOUT]


@pytest.mark.parametrize("name", TWO_LAYOUTS)
def test_both_layouts_are_spoiled_alike(tmp_path, walls, name):
    shutil.copytree(walls / "valid", tmp_path / "data" / "valid")
    shutil.copytree(walls / "train", tmp_path / "data" / "train")
    SPOIL_DATA[name](tmp_path / "data")
    for split in ("train", "valid"):
        outcomes = [outcome(tmp_path / "data", split, layout) for layout in ("coco", "per_image")]
        assert outcomes[0] == outcomes[1]


def outcome(folder, split, layout):
    """What reading gives: objects and names, or the kind of refusal."""
    try:
        content = read_split(folder, split, layout)
    except InputError as error:
        return error.message.split("annotation")[0].split(" but ")[0]
    return content.categories, objects_of(content)


def objects_of(split):
    return [(r.image_id.split(".")[0], o.category, o.box_xyxy, o.rle, o.is_crowd)
            for r in split.records for o in r.objects]  # fmt: skip


def test_objects_seen_from_afar_are_smaller_and_keep_boxes_that_fit_their_masks(tmp_path, walls):
    folder = shutil.copytree(walls, tmp_path / "data")
    SPOIL_DATA["seen from afar"](folder)
    assert "D22_BOX_OFF_MASK" not in codes_of(folder)
    for old, new in zip(
        *(read_split(root, "train").records for root in (walls, folder)), strict=True
    ):
        for before, after in zip(old.objects, new.objects, strict=True):
            for side in (0, 1):
                width = before.box_xyxy[side + 2] - before.box_xyxy[side]
                shrunk = after.box_xyxy[side + 2] - after.box_xyxy[side]
                assert shrunk <= width / SHRINK + 2


@pytest.fixture
def split(tmp_path):
    return read_split(write_coco(tmp_path / "source", form="rle"), "train")


@pytest.mark.parametrize("write", [write_coco, write_per_image])
def test_a_copy_holds_the_objects_of_the_source_in_the_layout_of_the_document(tmp_path, write):
    source = read_split(write(tmp_path / "source"), "train")
    copy = read_split(write_copy(source, tmp_path / "copy"), "train")
    assert copy.layout == "per_image"
    assert objects_of(copy) == objects_of(source)
    assert [record.path.suffix for record in copy.records] == [".jpg"] * len(copy.records)
    assert len(copy.records) == sum(bool(objects) for objects in DATASET["train"].values())


def test_a_copy_keeps_what_else_is_in_the_pictures_is_small_and_intact(tmp_path):
    source = read_split(WALL_CRACKS, "train")
    folder = write_copy(source, tmp_path / "copy")
    copy = read_split(folder, "train")
    assert len(copy.records) == NUM_IMAGES
    contents = {record.image_id: record.contents for record in source.records}
    assert {record.image_id: record.contents for record in copy.records}.items() <= contents.items()
    assert any(record.contents for record in copy.records)
    assert codes_of(folder) == {"D05_MISSING_SPLIT"}


def test_mirrored_annotations_agree_with_themselves(tmp_path):
    source = read_split(WALL_CRACKS, "train")
    mirrored = write_broken_copy(source, tmp_path / "mirrored", "mirrored")
    assert codes_of(mirrored) == {"D05_MISSING_SPLIT"}
    intact = write_copy(source, tmp_path / "intact")
    assert objects_of(read_split(mirrored, "train")) != objects_of(read_split(intact, "train"))


def test_masks_are_left_out_where_there_are_none(tmp_path, split):
    records = tuple(
        replace(record, objects=tuple(replace(item, rle=None) for item in record.objects))
        for record in split.records
    )
    bare = replace(split, records=records)
    folder = write_broken_copy(bare, tmp_path / "copy", "half size")
    path = next((folder / "train" / "annotations").glob("*.json"))
    assert "segmentation" not in json.loads(path.read_text())["annotations"][0]


def test_a_second_copy_replaces_the_first(tmp_path, split):
    write_broken_copy(split, tmp_path / "copy", "leakage")
    folder = write_copy(split, tmp_path / "copy", num_images=1)
    assert [path.name for path in folder.iterdir()] == ["train"]
    assert len(list((folder / "train" / "images").iterdir())) == 1


def test_an_unknown_fault_is_refused_before_anything_is_written(tmp_path, split):
    with pytest.raises(InputError, match="no fault 'rain'"):
        write_broken_copy(split, tmp_path / "copy", "rain")
    assert not (tmp_path / "copy").exists()


def test_a_split_without_objects_is_refused(tmp_path):
    root = write_coco(tmp_path / "source", {"train": {"a.png": []}})
    with pytest.raises(InputError, match="no image has an object"):
        write_copy(read_split(root, "train"), tmp_path / "copy")
