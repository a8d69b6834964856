"""Every fault that is planted is found under its code; a clean dataset gives none."""

import json
import shutil
import time
import zlib

import cv2
import numpy as np
import pytest
from builders import (
    HEIGHT,
    WIDTH,
    check,
    edit_coco,
    mask_of,
    segmentation_of,
    write_coco,
    write_image,
    write_per_image,
)
from PIL import Image

from helpers.causes import CAUSES
from helpers.checks.findings import CODES, SEVERITIES
from helpers.errors import InputError
from helpers.files import ROOT

REAL_DATA = ROOT.parent / "shared" / "data"


def codes_of(report):
    return {finding.code for finding in report.findings}


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def change(index, **values):
    """Plant values in one training annotation."""
    return lambda root: edit_coco(root, "train", lambda c: c["annotations"][index].update(values))


def change_all(**values):
    """Plant values in every training annotation."""

    def plant(root):
        edit_coco(root, "train", lambda c: [a.update(values) for a in c["annotations"]])

    return plant


def content(function):
    """Plant a change of the parsed training file."""
    return lambda root: edit_coco(root, "train", function)


def as_corners(c):
    for annotation in c["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


def normalised(c):
    for annotation in c["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT]


def rename(**names):
    return content(
        lambda c: [e.update(name=names.get(e["name"], e["name"])) for e in c["categories"]]
    )


def add_category(category_id, name, parent="none"):
    entry = {"id": category_id, "name": name, "supercategory": parent}
    return content(lambda c: c["categories"].append(entry))


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def image(*parts, **options):
    return lambda root: write_image(root.joinpath(*parts), **options)


def copy_to_test(root):
    shutil.copy(root / "train" / "a.png", root / "test" / "g.png")


def make_tiny(c):
    c["annotations"][0].update(bbox=[8, 8, 3, 3], segmentation=[[8, 8, 11, 8, 11, 11, 8, 11]])


def annotate_twice(**changes):
    """Plant a second annotation of the first object."""

    def plant(c):
        c["annotations"].append(c["annotations"][0] | {"id": 99} | changes)

    return content(plant)


def cover(c):
    for annotation in c["annotations"]:
        annotation["bbox"] = [0, 0, WIDTH, HEIGHT - 8]
        x1, y1 = WIDTH, HEIGHT - 8
        annotation["segmentation"] = [[0, 0, x1, 0, x1, y1, 0, y1]]
    c["annotations"] = c["annotations"][:2]


def cover_one(c):
    size = [HEIGHT, WIDTH]
    runs = {"size": size, "counts": [0, HEIGHT * WIDTH]}
    c["annotations"][0].update(bbox=[0, 0, WIDTH, HEIGHT], segmentation=runs)


def save_as(mode=None, **options):
    """Plant another form of the first training image."""

    def plant(root):
        path = root / "train" / "a.png"
        with Image.open(path) as opened:
            opened.convert(mode or opened.mode).save(path, **options)

    return plant


def hide_a_corner(root):
    path = root / "train" / "a.png"
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGBA")).copy()
    pixels[:8, :8] = (0, 255, 0, 0)
    Image.fromarray(pixels).save(path)


def deepen(root):
    pixels = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    cv2.imwrite(str(root / "train" / "a.png"), pixels)


def link_out(root):
    """Put a link to a file outside in the place of the first image."""
    path = root / "train" / "a.png"
    outside = root.parent / f"{root.name}_outside.png"
    path.rename(outside)
    path.symlink_to(outside)


def name_outside(absolute):
    """Let the first entry name a file outside the dataset."""

    def plant(root):
        outside = write_image(root.parent / f"{root.name}_outside.png")
        name = str(outside) if absolute else f"../../{outside.name}"
        edit_coco(root, "train", lambda c: c["images"][0].update(file_name=name))

    return plant


def put_foreign_files(root):
    for name in ("b.heic", "c.HEIC", "notes.txt", ".hidden"):
        (root / "train" / name).write_bytes(b"x")


SWAPPED = segmentation_of(mask_of(8, 8, 16, 32, (WIDTH, HEIGHT)), "rle")
NOTHING = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
FAULTS = [
    ("D01_NO_OBJECTS", content(lambda c: c["annotations"].clear()), "4 images are listed"),
    ("D02_OBJECTS_LOST", change_all(iscrowd=1), "5 objects are in the files, 0 reach the loss"),
    ("D02_OBJECTS_LOST", change(0, bbox=[200, 8, 16, 32]), "4 reach the loss (80.0%)"),
    ("D03_UNREADABLE", content(lambda c: c["categories"][0].pop("name")), "category 1 has no name"),
    ("D03_UNREADABLE", change(0, category_id=9), "category_id 9 has no name"),
    ("D04_NO_TRAIN_SPLIT", remove("train"), "no folder 'train'"),
    ("D05_MISSING_SPLIT", remove("valid"), "no folder 'valid'"),
    (
        "D06_EMPTY_SPLIT",
        content(lambda c: (c["images"].clear(), c["annotations"].clear())),
        "no image",
    ),
    ("D07_UNANNOTATED_IMAGE", image("train", "z.png"), "1 images have no annotation entry"),
    (
        "D08_MISSING_IMAGE",
        lambda root: (root / "train" / "a.png").unlink(),
        "have an annotation entry",
    ),
    ("D09_LOADER_REFUSES", rename(crack="crack " * 31), "33 tokens"),
    ("D10_ALL_CROWD", change(0, iscrowd=1), "1 annotations with iscrowd 1"),
    ("D12_UNUSED_FILES", put_foreign_files, "3 files are not used: 2 .heic, 1 .txt"),
    ("D11_CROWD", change(3, iscrowd=1), "1 of 5 annotations have iscrowd 1"),
    ("D20_BOX_OUTSIDE", change(0, bbox=[80, 8, 40, 32]), "the farthest by 24 px"),
    ("D20_BOX_OUTSIDE", content(as_corners), "[x, y, width, height] in pixels"),
    ("D21_BOX_NORMALISED", content(normalised), "5 of 5 boxes have numbers between 0 and 1"),
    (
        "D22_BOX_OFF_MASK",
        change(0, bbox=[8, 8, 24, 40]),
        "1 of them fit if read as [x0, y0, x1, y1]",
    ),
    ("D22_BOX_OFF_MASK", change(0, bbox=[40, 8, 16, 32]), "1 of 5 boxes overlap"),
    ("D23_BOX_FROM_MASK", change(0, bbox=None), "1 of 5 objects have no bbox"),
    ("D24_AREA_DIFFERS", change(0, area=51), "51 px stated, 512 px drawn"),
    ("D24_AREA_DIFFERS", change_all(area=4 * 512), "5 of 5 areas differ"),
    ("D24_AREA_DIFFERS", change(0, area=float("nan")), "1 of 5 areas differ"),
    ("D24_AREA_DIFFERS", change(0, area=5000, segmentation=[]), "5000 px stated, 512 px drawn"),
    ("D30_ROOT_CATEGORY", add_category(0, "defect"), "'defect' is the parent"),
    ("D30_ROOT_CATEGORY", add_category(0, "-"), "'-' holds no word, is never annotated"),
    (
        "D31_SIMILAR_NAMES",
        add_category(3, "crack"),
        "1 and 3 are both 'crack' and are asked as one",
    ),
    ("D31_SIMILAR_NAMES", add_category(3, "Cracks"), "'crack' and 'Cracks' are nearly the same"),
    ("D31_SIMILAR_NAMES", add_category(3, "joints"), "'joint' and 'joints'"),
    ("D31_SIMILAR_NAMES", add_category(3, "craack"), "'crack' and 'craack'"),
    ("D32_NO_NOUN", rename(crack="object"), "'object' is the prompt"),
    ("D32_NO_NOUN", rename(crack="0"), "'0' is the prompt"),
    ("D32_NO_NOUN", rename(crack="class_3"), "'class_3' is the prompt"),
    ("D33_UNUSED_CATEGORY", add_category(3, "moss"), "never annotated in this split: moss"),
    ("D34_ZERO_BASED_IDS", add_category(0, "moss"), "start at 0"),
    ("D35_CATEGORIES_DIFFER", change(2, category_id=1), "annotated only here: joint"),
    ("D36_NO_WORD", rename(crack="-"), "the category '-' holds no word"),
    ("D36_NO_WORD", rename(crack="_ ?!"), "the category '_ ?!' holds no word"),
    ("D40_DEGENERATE_BOX", change(0, bbox=[8, 8, 0, 32]), "1 of 5 boxes are less than 1 pixel"),
    (
        "D40_DEGENERATE_BOX",
        change(0, bbox=[24, 40, -16, -32]),
        "1 of 5 boxes are less than 1 pixel",
    ),
    ("D41_NOT_FINITE", change(0, bbox=[8, float("nan"), 16, 32]), "1 of 5 boxes hold NaN"),
    ("D42_EMPTY_MASK", change(0, segmentation=NOTHING), "1 of 5 masks have no pixel"),
    ("D43_MASK_SIZE", change(0, segmentation=SWAPPED), "1 of them with width and height swapped"),
    ("D44_BAD_MASK", change(0, segmentation=[[1, 2, 3]]), "at least 6 numbers"),
    ("D45_NO_MASK", change(0, segmentation=[]), "1 of 5 objects have a box only"),
    ("D45_NO_MASK", change_all(segmentation=[]), "the mask decoder has nothing to learn from"),
    ("D46_ANNOTATED_TWICE", annotate_twice(), "1 of 6 objects are annotated twice"),
    ("D46_ANNOTATED_TWICE", annotate_twice(bbox=[8.5, 7.5, 16, 32]), "1 of 6 objects"),
    ("D46_ANNOTATED_TWICE", annotate_twice(segmentation=None), "1 of 6 objects"),
    ("D50_TOO_SMALL", content(make_tiny), "1 of 5 objects span less than 2 of the 32 cells"),
    ("D52_COVERS_PICTURE", content(cover), "'crack' covers 88% of 2 of its 2 images"),
    ("D52_COVERS_PICTURE", content(cover_one), "'crack' covers 100% of 1 of its 3 images"),
    (
        "D70_BROKEN_IMAGE",
        lambda root: (root / "train" / "a.png").write_bytes(b""),
        "cannot be opened",
    ),
    ("D70_BROKEN_IMAGE", deepen, "more than 8 bits per channel"),
    (
        "D70_BROKEN_IMAGE",
        lambda root: (root / "train" / "a.png").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20)),
        "HEIC cannot be read",
    ),
    ("D71_IMAGE_SHAPE", image("train", "a.png", size=(HEIGHT, WIDTH)), "64 x 96 upright, 96 x 64"),
    ("D71_IMAGE_SHAPE", image("train", "a.png", exif=exif_of(6)), "EXIF orientation 6"),
    (
        "D72_IMAGE_SCALED",
        image("train", "a.png", size=(2 * WIDTH, 2 * HEIGHT)),
        "192 x 128 upright",
    ),
    (
        "D73_IMAGE_TURNED",
        image("train", "a.png", size=(HEIGHT, WIDTH), exif=exif_of(6)),
        "orientation",
    ),
    ("D08_MISSING_IMAGE", content(lambda c: c["images"][0].update(file_name="a\0.png")), "no file"),
    (
        "D08_MISSING_IMAGE",
        content(lambda c: c["images"][0].update(file_name="a\ud800.png")),
        "no file",
    ),
    (
        "D08_MISSING_IMAGE",  # of two entries, one spelt otherwise, that mean one file
        content(lambda c: c["images"][1].update(file_name="A.png")),
        "A.png",
    ),
    (
        "D78_OTHER_SPELLING",
        content(lambda c: c["images"][0].update(file_name="A.PNG")),
        "A.PNG is a.png",
    ),
    ("D24_AREA_DIFFERS", content(lambda c: c["annotations"][0].update(area="9000")), "nan px"),
    (
        "D24_AREA_DIFFERS",
        content(lambda c: c["annotations"][0].update(area=float("inf"))),
        "inf px",
    ),
    ("D74_IMAGE_OUTSIDE", link_out, "1 images lie outside the dataset"),
    ("D74_IMAGE_OUTSIDE", name_outside(absolute=True), "1 images lie outside the dataset"),
    ("D74_IMAGE_OUTSIDE", name_outside(absolute=False), "1 images lie outside the dataset"),
    ("D75_TRANSPARENT", hide_a_corner, "1 images have transparent pixels"),
    (
        "D76_SEVERAL_FRAMES",
        save_as(save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
        "a.png with 2",
    ),
    ("D80_LEAKAGE", copy_to_test, "1 of 2 images of 'test' are also in 'train'"),
]


@pytest.mark.parametrize(
    ("code", "plant", "expected"), FAULTS, ids=[f"{f[0]}-{n}" for n, f in enumerate(FAULTS)]
)
def test_a_planted_fault_is_found(code, plant, expected, tmp_path):
    plant(write_coco(tmp_path))
    report = check(tmp_path)
    finding = next(finding for finding in report.findings if finding.code == code)
    assert expected in f"{finding.message} {finding.fix}"
    assert finding.where
    assert finding.fix
    assert finding.severity == CODES[code].severity
    assert report.ok == (not any(CODES[c].severity == "error" for c in codes_of(report)))
    if CODES[code].severity == "error":
        assert not report.ok


def test_a_clean_dataset_has_neither_errors_nor_warnings(tmp_path):
    write_coco(tmp_path / "coco")
    write_per_image(tmp_path / "single")
    reports = [check(tmp_path / layout, num_negatives=1, negative_prompts=["dog"]) for layout in ("coco", "single")]  # fmt: skip
    for report in reports:
        assert report.ok
        assert codes_of(report) == {"D60_IMAGES_WITHOUT_OBJECTS", "D62_UNVERIFIED_NEGATIVES"}
    assert reports[0].counts == reports[1].counts
    assert reports[0].counts["train"] == {
        "images": 4,
        "images_without_objects": 1,
        "objects_in_files": 5,
        "crowd_objects": 0,
        "objects_after_collate": 5,
        "masks_after_collate": 5,
        "present_queries": 4,
        "absent_queries": 4,
        "objects_per_category": {"crack": 4, "joint": 1},
    }


def test_settings_have_their_findings(tmp_path):
    write_coco(tmp_path, {"train": {"a.png": [("crack", 8, 8, 16, 32), ("crack", 50, 8, 16, 32)]}})
    report = check(tmp_path, num_queries=1)
    assert "D51_TOO_MANY" in codes_of(report)
    assert "D61_NO_ABSENT_PROMPT" in codes_of(report)
    report = check(tmp_path, num_queries=2, num_negatives=1, negative_prompts=["dog"])
    assert not {"D51_TOO_MANY", "D61_NO_ABSENT_PROMPT"} & codes_of(report)
    assert "D62_UNVERIFIED_NEGATIVES" in codes_of(report)
    edit_coco(tmp_path, "train", lambda c: c["images"][0].update(contents=["joint"]))
    report = check(tmp_path, num_negatives=1, negative_prompts=["dog"])
    assert "D62_UNVERIFIED_NEGATIVES" not in codes_of(report)
    edit_coco(tmp_path, "train", lambda c: c["images"][0].update(contents=["joint", "dog"]))
    report = check(tmp_path, num_negatives=1, negative_prompts=["dog"])
    assert "no noun is absent" in json.dumps(report.to_json())


def test_every_code_is_covered():
    other = {"D51_TOO_MANY", "D60_IMAGES_WITHOUT_OBJECTS", "D61_NO_ABSENT_PROMPT", "D62_UNVERIFIED_NEGATIVES", "D77_CONTRADICTION"}  # fmt: skip
    assert {code for code, _, _ in FAULTS} | other == set(CODES)
    assert {code.severity for code in CODES.values()} == set(SEVERITIES)
    assert {code.cause for code in CODES.values()} <= set(CAUSES)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["images"][0].update(file_name="b.png"), "'file_name' is 'b.png' in a.json"),
        (lambda c: c.update(width=2 * WIDTH), "'width' is 192 and 96"),
    ],
)
def test_statements_about_an_image_that_differ_are_named(change, expected, tmp_path):
    path = write_per_image(tmp_path) / "train" / "annotations" / "a.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    [finding] = [f for f in check(tmp_path).findings if f.code == "D77_CONTRADICTION"]
    assert expected in finding.message


def test_what_is_stated_twice_may_differ_by_rounding(tmp_path):
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", lambda c: [a.update(area=a["bbox"][2] * a["bbox"][3] + 30) for a in c["annotations"]])  # fmt: skip
    neighbour = {"id": 99, "bbox": [11, 8, 16, 32], "segmentation": []}
    edit_coco(tmp_path, "train", lambda c: c["annotations"].append(c["annotations"][0] | neighbour))
    assert not {"D24_AREA_DIFFERS", "D46_ANNOTATED_TWICE"} & codes_of(check(tmp_path))


def test_two_folders_of_one_split_are_refused_by_name(tmp_path):
    write_coco(tmp_path)
    shutil.copytree(tmp_path / "valid", tmp_path / "Validation")
    report = check(tmp_path)
    [finding] = [f for f in report.findings if f.code == "D03_UNREADABLE"]
    assert "'Validation' and 'valid' both mean the split 'valid'" in finding.message
    assert set(report.counts) == {"train", "test"}


@pytest.mark.parametrize("side", [60_000, 12_000])
def test_huge_sizes_end_quickly(side, tmp_path):
    """A header of that size, and an annotation that agrees; neither is decoded to find out."""
    write_coco(tmp_path, {"train": {"a.png": [("crack", 8, 8, 16, 32)]}})
    path = tmp_path / "train" / "a.png"
    header = path.read_bytes()
    size = side.to_bytes(4, "big") * 2
    chunk = header[12:16] + size + header[24:29]
    path.write_bytes(header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:])
    corners = [0, 0, side // 2, 0, side // 2, side // 2]
    box = [0, 0, side // 2, side // 2]
    edit_coco(tmp_path, "train", lambda c: c["images"][0].update(width=side, height=side))
    change(0, segmentation=[corners], bbox=box)(tmp_path)
    start = time.process_time()
    report = check(tmp_path)
    assert time.process_time() - start < 10
    assert not report.ok
    assert ("500 megapixels" in report.summary()) == (side == 60_000)


def test_what_a_terminal_would_obey_is_escaped(tmp_path):
    write_coco(tmp_path)
    rename(crack="crack\x1b[2J\nok")(tmp_path)
    change(0, iscrowd=1)(tmp_path)
    name = "\x1b]0;title\x07.png"
    edit_coco(tmp_path, "train", lambda c: c["images"][0].update(file_name=name))
    text = check(tmp_path).summary()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b]0;title" in text


def test_a_finding_names_the_worst_place_first(tmp_path):
    write_coco(tmp_path)
    change(0, bbox=[80, 8, 20, 32])(tmp_path)
    change(3, bbox=[10, 10, 20, 500])(tmp_path)
    report = check(tmp_path)
    finding = next(finding for finding in report.findings if finding.code == "D20_BOX_OUTSIDE")
    assert finding.where == "train/d.png, annotation 4 and 1 more"
    assert [place.annotation_id for place in finding.places] == [4, 1]
    worst = report.worst(2)
    assert [image.name for image in worst] == ["train/d.png", "train/a.png"]
    assert worst[0].path == tmp_path / "train" / "d.png"
    assert (10, 10, 30, 510) in worst[0].boxes_xyxy
    assert report.worst(0) == []


def test_one_unreadable_split_does_not_hide_the_others(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "train" / "_annotations.coco.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    edit_coco(tmp_path, "valid", lambda c: c["annotations"][0].update(bbox=[90, 8, 40, 10]))
    report = check(tmp_path)
    assert {"D03_UNREADABLE", "D20_BOX_OUTSIDE"} <= codes_of(report)
    assert set(report.counts) == {"valid", "test"}
    unreadable = next(f for f in report.findings if f.code == "D03_UNREADABLE")
    assert unreadable.where == str(path)


def test_forms_of_the_report(tmp_path):
    write_coco(tmp_path)
    assert check(tmp_path).raise_for_errors() is None
    change(0, iscrowd=1)(tmp_path)
    report = check(tmp_path)
    data = json.loads(json.dumps(report.to_json()))
    assert set(data) == {"data", "ok", "findings", "counts"}
    assert data["ok"] is False
    assert all(set(f) == {"code", "severity", "where", "message", "fix"} for f in data["findings"])
    severities = [SEVERITIES.index(f["severity"]) for f in data["findings"]]
    assert severities == sorted(severities)
    table = report.to_frame()
    assert list(table["code"]) == [f["code"] for f in data["findings"]]
    assert table.set_index("code").loc["D10_ALL_CROWD", "cause"] == "objects_filtered"
    assert report.counts_frame().loc["train", "crowd_objects"] == 1
    text = report.summary()
    assert "NOT OK" in text
    assert all(f["fix"] in text for f in data["findings"])
    with pytest.raises(InputError, match=r"1 further errors\) \[D10_ALL_CROWD\]"):
        report.raise_for_errors()


def test_missing_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no split"):
        check(tmp_path)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_goes_to_stderr_once_it_takes_long(tmp_path, capsys, monkeypatch, terminal):
    write_coco(tmp_path)
    check(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    monkeypatch.setattr("helpers.files.PROGRESS_DELAY", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    check(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "8/8" in captured.err
    assert ("\r" in captured.err) == terminal


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real datasets are not beside the project")
@pytest.mark.parametrize("name", ["masonry224", "pothole90"])
def test_real_datasets_have_no_errors(name):
    report = check(REAL_DATA / name, mask_size=64)
    assert report.ok, report.summary()
    assert all(c["objects_in_files"] == c["objects_after_collate"] for c in report.counts.values())
