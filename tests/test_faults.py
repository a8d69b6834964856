"""Every fault is planted here, found by the check or the gate that must find it, and taken back."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from builders import DATASET, write_coco, write_per_image
from started_runs import copy_walls
from tiny_random import RESOLUTION, tiny_model, token_inputs

from helpers.causes import CAUSES
from helpers.checks.dataset import check_dataset
from helpers.checks.findings import CODES
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import load_dataset
from helpers.diagnose.diagnosis import GATES, pass_gate
from helpers.diagnose.examination import FAILED, Examination
from helpers.errors import InputError
from helpers.files import CONFIGS, WALL_CRACKS
from helpers.lab.faults import FAULTS, LESSON_FAULTS, PATCHES, planted
from helpers.lab.spoil import NUM_IMAGES, SHRINK, SPOIL_DATA, write_broken_copy, write_copy

ALL_FAULTS = FAULTS | LESSON_FAULTS
CHECKED = [name for name, fault in ALL_FAULTS.items() if fault.codes]
GATE_OF = {
    "images turned": "annotations on pixels",
    "hardly any object": "images without objects",
    "no absent prompts": "absent prompts",
    "trained as object": "words of the training",
    "dropout of a half": "regularisation",
    "keys with prefix": "keys of the adapter",
    "keys of another version": "keys of the adapter",
    "alpha halved": "saved adapter",
    "weights rounded": "saved adapter",
    "wrong keys": "annotation files",
    "masks swallowed": "masks after the loader",
    "emptied by a transform": "objects after the loader",
    "score weight zero": "logged loss",
    "finest level dropped": "port",
    "decoder zeroed": "base of the run",
    "flag without effect": "places of LoRA",
    "names of another model": "places of LoRA",
    "lora b frozen": "learning",
    "text features detached": "learning",
    "loader without effect": "weights in memory",
}
LEARNED = {
    "half the labels",
    "trained far too hard",
    "words run together",
    "presence at its clamp",
}
"""Show only after a training that takes minutes: the committed confusion table holds their diagnosis."""
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


def functions():
    modules = [module for name, module in sys.modules.items() if name.startswith("helpers.")]
    return {
        (module.__name__, key): id(value)
        for module in modules
        for key, value in vars(module).items()
        if callable(value)
    }


def test_every_fault_is_found_somewhere():
    visible = {*CHECKED, *GATE_OF, *LEARNED}
    assert ALL_FAULTS.keys() - visible == {"mirrored"}
    assert not set(CHECKED) & GATE_OF.keys()
    for fault in FAULTS.values():
        assert fault.cause in CAUSES
    for fault in ALL_FAULTS.values():
        assert fault.what
        assert fault.symptom
        assert set(fault.codes) <= set(CODES)
        assert fault.settings or fault.patch or fault.spoil_data or fault.spoil_run


@pytest.mark.parametrize("name", CHECKED)
def test_a_fault_in_files_is_found_by_the_data_check(tmp_path, walls, intact_codes, name):
    folder = shutil.copytree(walls, tmp_path / "data")
    if name == "leakage":
        shutil.rmtree(folder / "valid")
    SPOIL_DATA[name](folder)
    assert (codes_of(folder) - intact_codes) & set(ALL_FAULTS[name].codes)


@pytest.mark.parametrize("name", GATE_OF)
def test_a_fault_of_a_run_is_named_by_its_gate_and_taken_back(
    tmp_path, walls, base, run_folder, name, capsys
):
    fault = FAULTS[name]
    settings = [text for text in fault.settings if not text.startswith("scale.num_epochs")]
    options = {
        "healthy": run_folder,
        "data_dir": walls,
        "settings": (f"model.name={base}", f"model.resolution={RESOLUTION}", "lora.rank=4",
                     "scale.num_epochs=0.02"),
    }  # fmt: skip
    before = functions()
    capsys.readouterr()
    with planted(replace(fault, settings=tuple(settings)), tmp_path / "lab", **options) as run:
        assert "note:" not in capsys.readouterr().err, "the training gives the fault away"
        result = pass_gate(GATE[GATE_OF[name]], Examination(run))
    assert result.status == FAILED, result.measured
    assert {evidence.cause for evidence in result.evidence} == {fault.cause}
    after = functions()
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_the_settings_of_a_fault_are_accepted(name):
    load_config(CONFIGS / "crack_detection_config.yaml", "tiny", FAULTS[name].settings)


def test_presence_is_pushed_down_behind_the_back_of_the_loss():
    model = tiny_model()
    inputs = {
        "pixel_values": torch.zeros(1, 3, RESOLUTION, RESOLUTION),
        "image_index": torch.zeros(1, dtype=torch.long),
        **token_inputs(["crack"]),
    }

    def compute_loss(trainer, model, inputs):
        return 0 * model(**inputs).presence_logits.sum() + 1

    _, wrap = PATCHES["presence at its clamp"].args
    loss = wrap(compute_loss)(SimpleNamespace(model=model), model, inputs)
    assert loss.item() == pytest.approx(1)
    loss.backward()
    assert model.detr_decoder.presence_head.layer3.bias.grad > 0


def test_half_of_the_labels_are_missing_in_every_split(tmp_path, walls):
    folder = shutil.copytree(walls, tmp_path / "data")
    SPOIL_DATA["half the labels"](folder)
    for split in ("train", "valid"):
        before, after = (read_split(root, split).num_objects for root in (walls, folder))
        assert abs(after - before / 2) <= 0.5


ONE_LAYOUT = ("hardly any object", "no absent prompts")  # leave whole files out
TWO_LAYOUTS = [n for n, f in FAULTS.items() if f.spoil_data and n not in ONE_LAYOUT]


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
