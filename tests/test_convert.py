import json
from dataclasses import replace

import numpy as np
import pytest
from builders import (
    DATASET,
    check,
    coco_of,
    edit_coco,
    mask_of,
    write_coco,
    write_image,
    write_per_image,
)
from PIL import Image
from source_builders import TRUTH, masks_in, masks_of, write_with_supervision

from helpers.__main__ import main
from helpers.convert import conversion as module
from helpers.convert.conversion import convert, read_source
from helpers.data.coco import read_split
from helpers.errors import InputError
from helpers.files import ROOT

REAL_DATA = ROOT.parent / "shared" / "data"


def content_of(folder):
    return json.loads((folder / "_annotations.coco.json").read_text())


@pytest.mark.parametrize("form", ["polygon", "runs", "rle"])
def test_coco_comes_out_as_it_went_in(tmp_path, form):
    src = write_coco(tmp_path / "src", form=form)
    for split in DATASET:
        edit_coco(src, split, lambda c: c.update(licenses=[{"id": 1, "name": "CC BY 4.0"}]))
    summary = convert(src, tmp_path / "dst")
    assert summary["format"] == "coco"
    for split in DATASET:
        before, after = content_of(src / split), content_of(tmp_path / "dst" / split)
        for entry in after["annotations"]:
            entry.pop("area")
        assert after == before
    row = summary["splits"]["train"]
    assert row == {
        "images": 4,
        "empty": 1,
        "objects": 5,
        "with_mask": 5,
        "categories": {"crack": 4, "joint": 1},
    }


def test_per_image_files_keep_contents(tmp_path):
    src = write_per_image(tmp_path / "src")
    path = src / "train" / "annotations" / "a.json"
    content = json.loads(path.read_text())
    content["images"][0]["contents"] = ["moss"]
    path.write_text(json.dumps(content))
    convert(src, tmp_path / "dst")
    before, after = (read_split(root, "train") for root in (src, tmp_path / "dst"))
    assert [r.contents for r in after.records] == [r.contents for r in before.records]
    assert after.records[0].contents == {"moss"}
    for first, second in zip(before.records, after.records, strict=True):
        added = [replace(item, area_px=None) for item in second.objects]
        assert list(first.objects) == added


@pytest.mark.parametrize("kind", ["yolo", "voc", "labelme"])
def test_converted_data_are_sound_and_read_again(tmp_path, kind):
    convert(write_with_supervision(tmp_path, kind), tmp_path / "dst")
    again = read_source(tmp_path / "dst")
    if kind != "voc":  # of which only the boxes are read
        assert masks_in(again) == masks_of(TRUTH)
    report = check(tmp_path / "dst")
    assert not [f for f in report.findings if f.severity == "error"], report.summary()


def test_images_are_copies_of_the_same_bytes(tmp_path):
    src = write_coco(tmp_path / "src")
    convert(src, tmp_path / "dst")
    original, written = src / "train" / "a.png", tmp_path / "dst" / "train" / "a.png"
    assert written.read_bytes() == original.read_bytes()
    assert not written.samefile(original)


def test_a_source_without_splits_is_divided_or_all_train(tmp_path):
    (tmp_path / "src").mkdir()
    files = {f"{number}.png": [("crack", 8, 8, 16, 32)] for number in range(20)}
    (tmp_path / "src" / "labels.json").write_text(json.dumps(coco_of(files)))
    for name in files:
        write_image(tmp_path / "src" / name, seed=int(name[:-4]))
    summary = convert(tmp_path / "src", tmp_path / "whole")
    assert {name: row["images"] for name, row in summary["splits"].items()} == {"train": 20}
    assert any("--split" in note for note in summary["notes"])
    summary = convert(tmp_path / "src", tmp_path / "parts", split=(0.6, 0.2, 0.2), seed=1)
    counts = {name: row["images"] for name, row in summary["splits"].items()}
    assert counts == {"train": 12, "valid": 4, "test": 4}


def test_images_of_one_name_get_longer_names(tmp_path):
    src = write_coco(tmp_path / "src", {split: {"a.png": []} for split in ("train", "valid")})
    write_image(src / "valid" / "a.png", seed=99)
    convert(src, tmp_path / "dst", split=(1, 0))
    names = {record.image_id for record in read_split(tmp_path / "dst", "train").records}
    assert names == {"train_a.png", "valid_a.png"}


def test_names_that_make_bad_prompts_are_noted(tmp_path):
    src = write_coco(tmp_path / "src")
    for split in DATASET:
        edit_coco(src, split, lambda c: c["categories"][1].update(name="cracks"))
    notes = convert(src, tmp_path / "dst")["notes"]
    assert len(notes) == 1
    assert "D31_SIMILAR_NAMES" in notes[0]
    assert "prompts_by_category" in notes[0]


def test_a_used_destination_is_refused_and_left_alone(tmp_path):
    src = write_coco(tmp_path / "src")
    convert(src, tmp_path / "dst")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="not empty"):
        convert(src, tmp_path / "dst")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    src = write_coco(tmp_path / "src")
    place, placed = module._place, []

    def break_off(path, target):
        placed.append(path)
        if len(placed) == 6:
            raise OSError(28, "No space left on device")
        place(path, target)

    monkeypatch.setattr(module, "_place", break_off)
    with pytest.raises(InputError, match="No space left on device"):
        convert(src, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_unknown_or_wrong_format_is_refused(tmp_path):
    src = write_coco(tmp_path / "src")
    with pytest.raises(InputError, match="no format 'csv'"):
        read_source(src, "csv")
    with pytest.raises(InputError, match="holds no yolo dataset"):
        read_source(src, "yolo")
    with pytest.raises(InputError, match="no such file"):
        read_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no annotations of a known format"):
        read_source(tmp_path / "empty")


def call(capfd, *arguments):
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_the_command(tmp_path, capfd):
    src = write_with_supervision(tmp_path, "yolo")
    status, out, _ = call(capfd, "convert", src, tmp_path / "dst", "--json")
    assert status == 0
    assert json.loads(out)["splits"]["train"]["objects"] == 3
    status, out, err = call(capfd, "convert", src, tmp_path / "dst")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    status, out, _ = call(capfd, "convert", src, tmp_path / "again", "--split", "0.5", "0.5")
    assert status == 0
    assert "valid" in out
    status, _, err = call(capfd, "convert", src, tmp_path / "third", "--split", "0.5", "0.6")
    assert status == 2
    assert "add up to 1" in err
    assert not (tmp_path / "third").exists()


def test_the_command_reads_mask_pictures(tmp_path, capfd):
    write_image(tmp_path / "src" / "images" / "a.png")
    path = tmp_path / "src" / "masks" / "a.png"
    path.parent.mkdir()
    Image.fromarray(mask_of(8, 8, 16, 32) * np.uint8(255)).save(path)
    status, _, err = call(capfd, "convert", tmp_path / "src", tmp_path / "dst")
    assert status == 2
    assert "--category" in err
    arguments = ("convert", tmp_path / "src", tmp_path / "dst", "--category", "crack")
    assert call(capfd, *arguments)[0] == 0
    [record] = read_split(tmp_path / "dst", "train").records
    assert record.objects[0].box_xyxy == (8, 8, 24, 40)


@pytest.mark.parametrize("name", ["masonry224", "pothole90"])
def test_real_sets_lose_nothing(tmp_path, name):
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"the shared dataset {name} is not here")
    convert(REAL_DATA / name, tmp_path / "dst")
    before, after = (read_split(root, "valid") for root in (REAL_DATA / name, tmp_path / "dst"))
    assert [r.image_id for r in after.records] == [r.image_id for r in before.records]
    assert [r.objects for r in after.records] == [r.objects for r in before.records]


def test_the_root_category_of_roboflow_stays_in_the_file_and_is_not_asked(tmp_path):
    src = write_coco(tmp_path / "src")
    for split in DATASET:
        edit_coco(src, split, lambda c: c["categories"].insert(0, {"id": 0, "name": "defect"}))
    summary = convert(src, tmp_path / "dst")
    assert summary["splits"]["train"]["categories"] == {"defect": 0, "crack": 4, "joint": 1}
    split = read_split(tmp_path / "dst", "train")
    assert split.categories == ("crack", "joint")
    assert (
        content_of(tmp_path / "dst" / "train")["categories"]
        == content_of(src / "train")["categories"]
    )
