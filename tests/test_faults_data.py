"""Each fault shows what it is said to show, its gate names it, and its patch is taken back."""

import importlib
import pkgutil
import shutil

import numpy as np
import pytest
import torch
from started_runs import copy_walls, examine, examine_fault, start_run
from tiny_random import RESOLUTION, save_tiny_base, write_dataset

import helpers
from helpers.data.coco import read_split
from helpers.data.masks import rle_box_xyxy
from helpers.diagnose.data_gates import DATA_GATES, PROMPT_GATES
from helpers.diagnose.examination import Examination
from helpers.diagnose.run_gates import CONFIG_GATES
from helpers.errors import InputError
from helpers.files import TINY_BASE
from helpers.lab.faults import DATA_FAULTS, PROMPT_FAULTS
from helpers.lab.planting import Fault, planted
from helpers.lab.spoil import SHRINK
from helpers.model.sam3 import load_base
from helpers.train.run import METRICS_FILE, read_history, read_run

FAULTS = DATA_FAULTS | PROMPT_FAULTS
LEARNED = ("half the labels", "schedule ignored")  # seen only in what a training leaves
ONE_LAYOUT = ("hardly any object", "no absent prompts")  # leave whole files out
GATES = (*DATA_GATES, *PROMPT_GATES, *CONFIG_GATES)
COSTLY = "absent prompts in pictures"  # asks the base


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return copy_walls(tmp_path_factory.mktemp("walls") / "data")


@pytest.fixture(scope="module")
def base():
    return load_base(TINY_BASE, resolution=128)


@pytest.fixture(scope="module")
def random_settings(tmp_path_factory):
    folder = save_tiny_base(tmp_path_factory.mktemp("base"))
    return (f"model.name={folder}", f"model.resolution={RESOLUTION}", "lora.rank=4")


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bars") / "data")


def functions():
    names = [f"helpers.{info.name}" for info in pkgutil.iter_modules(helpers.__path__)]
    modules = [importlib.import_module(name) for name in names]
    return {(m.__name__, key): v for m in modules for key, v in vars(m).items() if callable(v)}


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in LEARNED])
def test_gates_name_the_fault_first_and_its_patch_is_taken_back(tmp_path, walls, base, name):
    before = functions()
    asks_base = FAULTS[name].cause == "present_negatives"
    gates = [gate for gate in GATES if gate.name != COSTLY or asks_base]
    causes, _ = examine_fault(FAULTS[name], tmp_path, walls, gates, base)
    assert causes[0] == FAULTS[name].cause
    assert functions() == before


def test_intact_data_give_no_cause(tmp_path, walls, base):
    intact = Fault("no_objects", "nothing is done", "nothing is seen")
    causes, results = examine_fault(intact, tmp_path, walls, GATES, base)
    assert causes == []
    left_open = {name for name, result in results.items() if result.status == "not checked"}
    assert left_open == {"objects without annotation", "settings in the log"}  # need a training


@pytest.mark.parametrize(
    "name", [n for n, fault in FAULTS.items() if fault.spoil_data and n not in ONE_LAYOUT]
)
def test_both_layouts_are_spoiled_alike_and_in_place(tmp_path, walls, name):
    shutil.copytree(walls, tmp_path / "data")
    FAULTS[name].spoil_data(tmp_path / "data")
    for split in ("train", "valid"):
        read = [_outcome(tmp_path / "data", split, layout) for layout in ("coco", "per_image")]
        assert read[0] == read[1]


def _outcome(folder, split, layout):
    """What reading gives: objects and names, or the kind of refusal."""
    try:
        found = read_split(folder, split, layout)
    except InputError as error:
        return error.message.split("annotation")[0].split(" but ")[0]
    entries = [
        (record.path.name, item.category, item.box_xyxy, item.rle, item.is_crowd)
        for record in found.records
        for item in record.objects
    ]
    return found.categories, entries


def first_target(run, base):
    examination = Examination(run)
    examination.base = base
    return next(one for one in examination.train_queries if one[1]["prompt"] == "crack")


def test_targets_are_changed_as_said(tmp_path, walls, base):
    run = start_run(tmp_path / "run", walls)
    _, _, whole = first_target(run, base)
    (cx, cy, w, h) = whole["boxes_cxcywh"][0].tolist()
    changed = {}
    for name in ("masks swallowed", "emptied by a transform", "corners as targets", "NaN targets"):
        with FAULTS[name].patch():
            changed[name] = first_target(run, base)[2]
    assert whole["mask_valid"].all()
    assert not changed["masks swallowed"]["mask_valid"].any()
    assert torch.equal(changed["masks swallowed"]["boxes_cxcywh"], whole["boxes_cxcywh"])
    assert changed["emptied by a transform"]["boxes_cxcywh"].shape == (0, 4)
    corners = changed["corners as targets"]["boxes_cxcywh"][0].tolist()
    assert corners == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    assert changed["NaN targets"]["boxes_cxcywh"].isnan().all()


def test_objects_seen_from_afar_keep_boxes_that_fit_their_masks(tmp_path):
    folder = copy_walls(tmp_path / "data")
    before = read_split(folder, "train")
    FAULTS["seen from afar"].spoil_data(folder)
    after = read_split(folder, "train")
    for old, new in zip(before.records, after.records, strict=True):
        for was, item in zip(old.objects, new.objects, strict=True):
            assert item.box_xyxy == pytest.approx(rle_box_xyxy(item.rle))
            sides = np.subtract(was.box_xyxy[2:], was.box_xyxy[:2])
            shrunk = np.subtract(item.box_xyxy[2:], item.box_xyxy[:2])
            assert (shrunk <= np.ceil(sides / SHRINK) + 1).all()


def test_wrong_keys_leave_a_run_that_tells_of_it_later(tmp_path, bars, random_settings):
    fault = FAULTS["wrong keys"]
    with planted(fault, tmp_path, settings=random_settings, data_dir=bars) as run:
        assert read_run(run).metrics["objects"]["train"] == 0
    history = [entry for entry in read_history(run) if "loss_bbox" in entry]
    assert history
    assert all(entry["loss_bbox"] == entry["loss_mask"] == 0 for entry in history)
    causes, _ = examine(run, DATA_GATES[-2:], None)
    assert causes == ["no_objects"]  # the reader is right again, the record is not


def test_a_training_that_stopped_at_NaN_is_examined_as_far_as_it_goes(
    tmp_path, bars, random_settings
):
    with planted(FAULTS["NaN targets"], tmp_path, settings=random_settings, data_dir=bars) as run:
        assert not (run / METRICS_FILE).exists()
        causes, results = examine(run, GATES, None)
    assert causes[0] == "not_finite"
    assert results["annotation files"].status == "ok"


def test_schedule_of_the_config_is_found_in_the_log_or_missed(tmp_path, bars, random_settings):
    faults = {"planted": FAULTS["schedule ignored"], "healthy": None}
    causes = {}
    for name, fault in faults.items():
        settings = (*random_settings, "scale.num_epochs=0.04")
        with planted(fault, tmp_path / name, settings=settings, data_dir=bars) as run:
            causes[name], _ = examine(run, CONFIG_GATES, None)
    assert causes == {"planted": ["dead_config_keys"], "healthy": []}


def test_half_of_the_labels_are_missing_in_every_split(tmp_path):
    folder = copy_walls(tmp_path / "data")
    counts = {split: read_split(folder, split).num_objects for split in ("train", "valid")}
    FAULTS["half the labels"].spoil_data(folder)
    for split, before in counts.items():
        assert abs(read_split(folder, split).num_objects - before / 2) <= 0.5
