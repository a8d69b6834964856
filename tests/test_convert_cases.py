"""Cases from the field: what public reports tell of, and the right value of each.

What is written is read with pycocotools alone.
"""

import base64
import contextlib
import io
import json
import unicodedata
from urllib.parse import quote

import numpy as np
import pytest
from builders import (
    HEIGHT,
    WIDTH,
    coco_of,
    edit_coco,
    mask_of,
    write_coco,
    write_image,
    write_per_image,
)
from PIL import Image
from pycocotools.coco import COCO
from source_builders import blob

from helpers.__main__ import main
from helpers.answers import answer_text
from helpers.convert.conversion import convert
from helpers.errors import InputError

MASK = blob(8, 8, 16, 32)
RING = [10.5, 10.0, 60.25, 12.5, 50.0, 50.5]
FILES = {"a.png": [("crack", 8, 8, 16, 32)], "b.png": [("joint", 60, 0, 8, 64)]}


def read(dst, split="train"):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(dst / split / "_annotations.coco.json")


def masks(dst, split="train"):
    """Return file name -> union of the masks, bool."""
    coco = read(dst, split)
    union = {}
    for image in coco.loadImgs(coco.getImgIds()):
        items = coco.loadAnns(coco.getAnnIds(image["id"]))
        parts = [coco.annToMask(item).astype(bool) for item in items]
        union[image["file_name"]] = np.logical_or.reduce(parts) if parts else None
    return union


def boxes(dst, split="train"):
    return [item["bbox"] for item in read(dst, split).dataset["annotations"]]


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    return path


def write_labels(root, files=None, images=(), name="labels.json", **content):
    """Write a COCO file at the root; the images lie where their file names say, or in `images`."""
    write(root / name, coco_of(FILES if files is None else files) | content)
    for image in images or FILES:
        write_image(root / image)
    return root


def write_yolo(root, labels, yaml="train: images\n", names="names: [crack]\n"):
    """Write data.yaml, and per label file (relative path below images/) an image and the text."""
    write(root / "data.yaml", names + yaml)
    for stem, text in labels.items():
        write_image(root / "images" / f"{stem}.png")
        if text is not None:
            write(root / "labels" / f"{stem}.txt", text)
    return root


def write_mask(root, values, name="a.png", folders=("images", "masks"), **options):
    write_image(root / folders[0] / "a.png")
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    (root / folders[1]).mkdir(parents=True, exist_ok=True)
    picture.save(root / folders[1] / name, **options)
    return root


def voc(*corners, head="", name="crack"):
    box = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return (
        f"<annotation>{head}<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    )


def labelme(image, *shapes, **content):
    shapes = shapes or ({"label": "crack", "shape_type": "polygon", "points": [[1.5, 2], [9, 9]]},)
    return {"imagePath": image, "shapes": shapes, **content}


def polygon(label="crack", kind="polygon", points=((10.5, 10), (60.25, 12.5), (50, 50.5))):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None}


def refused(src, dst, *words, **options):
    with pytest.raises(InputError) as error:
        convert(src, dst, **options)
    assert error.value.fix
    assert not dst.exists()
    for word in words:
        assert word in str(error.value)


# COCO


@pytest.mark.parametrize("deep", ["x/", "x/y/z/"])
def test_a_path_from_the_dataset_decides_between_files_of_one_name(tmp_path, deep):
    names = ["images/cam_a/1.png", f"images/{deep}cam_a/1.png", "images/cam_b/1.png"]
    for seed, name in enumerate(names):
        write_image(tmp_path / "src" / name, seed=seed)
    for stated in (names, [name.removeprefix("images/") for name in names]):
        write(
            tmp_path / "src" / "annotations" / "instances_default.json",
            coco_of(dict.fromkeys(stated, [])),
        )
        dst = tmp_path / f"dst{len(stated[0])}"
        convert(tmp_path / "src", dst)
        written = [dst / "train" / image["file_name"] for image in read(dst).dataset["images"]]
        assert [path.read_bytes() for path in written] == [
            (tmp_path / "src" / name).read_bytes() for name in names
        ]


@pytest.mark.parametrize(
    "stated", ["cam_b/a.png", "../images/a.png", "C:\\data\\a.png", "/data/a.png"]
)
def test_a_file_that_the_path_contradicts_is_not_taken(tmp_path, stated):
    src = write_labels(tmp_path / "src", {stated: []}, ["images/cam_a/a.png"])
    refused(src, tmp_path / "dst", "a.png", "not there")


def test_a_split_does_not_take_the_images_of_another(tmp_path):
    write_labels(tmp_path / "src", {"a.png": []}, ["val/a.png"], "instances_train.json")
    refused(tmp_path / "src", tmp_path / "dst", "'a.png' is not there")


def test_windows_separators_are_separators(tmp_path):
    src = write_labels(tmp_path / "src", {"images\\deep\\a.png": []}, ["images/deep/a.png"])
    convert(src, tmp_path / "dst")
    assert list(masks(tmp_path / "dst")) == ["a.png"]


@pytest.mark.parametrize(
    ("stated", "on_disk"),
    [
        (unicodedata.normalize("NFC", "Größe é.png"), unicodedata.normalize("NFD", "Größe é.png")),
        (quote("my photo#1.png"), "my photo#1.png"),
        ("IMG_1.jpg", "IMG_1.JPG"),
        ("img_1.JPG", "Img_1.jpg"),
        ("100%25.png", "100%.png"),
    ],
)
def test_other_spellings_of_a_name_are_told(tmp_path, stated, on_disk):
    src = write_labels(tmp_path / "src", {stated: FILES["a.png"]}, [f"images/{on_disk}"])
    notes = convert(src, tmp_path / "dst")["notes"]
    assert any(on_disk in note for note in notes)
    assert (masks(tmp_path / "dst")[on_disk] == mask_of(8, 8, 16, 32)).all()


def test_of_two_spellings_the_exact_one_is_taken(tmp_path):
    src = write_labels(tmp_path / "src", {"A.png": []}, ["images/a.png", "images/A.png"])
    notes = convert(src, tmp_path / "dst")["notes"]
    assert not any("spelt" in note for note in notes)
    assert list(masks(tmp_path / "dst")) == ["A.png"]


@pytest.mark.parametrize("first", [2**53 + 1, 2**63 - 5, 2**64 - 3, 10**18])
def test_ids_are_whole_numbers_of_any_size(tmp_path, first):
    content = coco_of(FILES)
    for image, item in zip(content["images"], content["annotations"], strict=True):
        image["id"] = item["image_id"] = first + image["id"] - 1
        item["id"] = first + 10 + item["id"]
    src = write_labels(tmp_path / "src")
    write(src / "labels.json", content)
    convert(src, tmp_path / "dst")
    after = read(tmp_path / "dst").dataset
    assert [image["id"] for image in after["images"]] == [first, first + 1]
    assert [item["image_id"] for item in after["annotations"]] == [first, first + 1]


def test_an_id_as_text_is_told_from_a_number(tmp_path):
    src = write_labels(tmp_path / "src")
    content = coco_of(FILES)
    content["annotations"][0]["image_id"] = "1"
    write(src / "labels.json", content)
    refused(src, tmp_path / "dst", "'1'", "text")


@pytest.mark.parametrize("place", ["labels.json", "train/_annotations.coco.json"])
def test_an_image_listed_twice_is_named(tmp_path, place):
    content = coco_of(FILES)
    content["images"][1]["file_name"] = "a.png"
    write_image((write(tmp_path / "src" / place, content)).with_name("a.png"))
    refused(tmp_path / "src", tmp_path / "dst", "a.png", "twice")


def test_other_tasks_of_coco_are_named(tmp_path):
    items = [{"image_id": 1, "file_name": "a.png", "segments_info": []}]
    refused(write_labels(tmp_path / "src", annotations=items), tmp_path / "dst", "panoptic")


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_1.heif"])
def test_heic_is_named(tmp_path, name):
    src = write_labels(tmp_path / "src", {name: []}, ["images/b.png"])
    write(src / "images" / name, "\0\0\0\x18ftypheic")
    refused(src, tmp_path / "dst", "HEIC")


def test_other_encodings_of_json_are_named(tmp_path):
    src = write_labels(tmp_path / "src")
    write(src / "labels.json", coco_of(FILES), "utf-16")
    with contextlib.suppress(InputError):
        convert(src, tmp_path / "dst")
        assert len(boxes(tmp_path / "dst")) == 2
        return
    refused(src, tmp_path / "dst", "UTF-8")


@pytest.mark.parametrize(
    "words", [("Train", "Valid", "Test"), ("training", "validation", "testing")]
)
def test_other_words_for_splits(tmp_path, words):
    src = write_coco(tmp_path / "src")
    for name, word in zip(("train", "valid", "test"), words, strict=True):
        (src / name).rename(src / f"{word}_")
        (src / f"{word}_").rename(src / word)
    summary = convert(src, tmp_path / "dst")
    assert list(summary["splits"]) == ["train", "valid", "test"]
    assert summary["splits"]["train"]["objects"] == 5


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_two_folders_of_one_split_are_refused(tmp_path, kind):
    src = write_coco(tmp_path / "src", {name: FILES for name in ("train", "valid", "val")})
    if kind == "yolo":
        write(src / "data.yaml", "names: [crack]\n")
        for path in src.glob("*/_annotations.coco.json"):
            path.unlink()
    refused(src, tmp_path / "dst", "'val' and 'valid' both mean")


def test_sizes_that_differ_are_told(tmp_path):
    src = write_labels(tmp_path / "src")
    write_image(src / "a.png", size=(2 * WIDTH, 2 * HEIGHT))
    notes = convert(src, tmp_path / "dst")["notes"]
    assert any("192 x 128, stated 96 x 64" in note for note in notes)


def test_areas_and_boxes_that_differ_are_told(tmp_path):
    for change, code in (({"area": 9000}, "D24"), ({"bbox": [50, 30, 20, 20]}, "D22")):
        src = write_coco(tmp_path / code)
        edit_coco(src, "train", lambda c, change=change: c["annotations"][0].update(change))
        assert any(code in note for note in convert(src, tmp_path / f"dst{code}")["notes"])


def test_one_name_of_two_categories_is_one_category(tmp_path):
    src = write_labels(
        tmp_path / "src", categories=[{"id": 1, "name": "crack"}, {"id": 2, "name": "crack"}]
    )
    convert(src, tmp_path / "dst")
    content = read(tmp_path / "dst").dataset
    assert [entry["name"] for entry in content["categories"]] == ["crack"]
    assert {item["category_id"] for item in content["annotations"]} == {1}


# foreign and hidden files


@pytest.mark.parametrize("text", ['[{"image": "a.png"}]', '{"images": [', "\ufeff{", "nonsense"])
def test_a_foreign_json_is_ignored_and_counted(tmp_path, text):
    yolo = write_yolo(tmp_path / "yolo", {"a": "0 0.5 0.5 0.5 0.5"})
    coco = write_labels(tmp_path / "coco")
    tool = tmp_path / "tool"
    write_image(tool / "a.png")
    write(tool / "a.json", labelme("a.png", polygon()))
    for src in (yolo, coco, tool):
        write(src / "log.json", text)
        summary = convert(src, tmp_path / f"{src.name}_dst")
        assert summary["unused"] == {".json": 1}
        assert any("log.json" in note for note in summary["notes"])


@pytest.mark.parametrize("name", ["train.json", "instances_val.json"])
def test_a_damaged_json_of_a_split_is_not_foreign(tmp_path, name):
    src = write_labels(tmp_path / "src", name="instances_test.json")
    write(src / name, '{"images": [')
    refused(src, tmp_path / "dst", name, "no complete JSON")


def test_a_damaged_json_alone_is_named(tmp_path):
    write(tmp_path / "src" / "labels.json", '{"images": [')
    refused(tmp_path / "src", tmp_path / "dst", "labels.json", "no complete JSON")


def test_files_of_a_mac_are_ignored(tmp_path):
    sources = {
        "yolo": write_yolo(tmp_path / "yolo", {"a": "0 0.5 0.5 0.5 0.5"}),
        "coco": write_coco(tmp_path / "coco"),
    }
    write_image(tmp_path / "tool" / "a.png")
    write(tmp_path / "tool" / "a.json", labelme("a.png", polygon()))
    write_image(tmp_path / "voc" / "a.png")
    write(tmp_path / "voc" / "a.xml", voc(1, 1, 9, 9))
    write_mask(tmp_path / "masks", MASK)
    sources |= {name: tmp_path / name for name in ("tool", "voc", "masks")}
    for name, src in sources.items():
        for path in [path for path in src.rglob("*") if path.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0\x05\x16\7")
        write(src / "__MACOSX" / "a.json", "\0")
        write(src / ".DS_Store", "\0")
        summary = convert(src, tmp_path / f"{name}_dst", category="crack")
        assert summary["unused"] == {}, name


def test_cvat_for_images_is_named(tmp_path):
    write_image(tmp_path / "src" / "images" / "a.png")
    write(tmp_path / "src" / "annotations.xml", '<annotations><image name="a.png"/></annotations>')
    refused(tmp_path / "src", tmp_path / "dst", "CVAT for images", "COCO 1.0")


# YOLO


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (4, 2), (1, 3), (17, 3)])
def test_the_boxes_of_poses_are_read(tmp_path, shape):
    points = " 0.4 0.5 1"[: 8 if shape[1] == 2 else None] * shape[0]
    src = write_yolo(
        tmp_path / "src",
        {"a": f"0 0.5 0.5 0.5 0.25{points}"},
        f"train: images\nkpt_shape: {list(shape)}\n",
    )
    notes = convert(src, tmp_path / "dst")["notes"]
    assert any("keypoints" in note for note in notes)
    assert boxes(tmp_path / "dst") == [[24, 24, 48, 16]]
    assert "segmentation" not in read(tmp_path / "dst").dataset["annotations"][0]


@pytest.mark.parametrize("shape", ["[2]", "nonsense", "[1, 2.5]"])
def test_a_shape_of_keypoints_that_is_none_is_named(tmp_path, shape):
    src = write_yolo(tmp_path / "src", {"a": ""}, f"train: images\nkpt_shape: {shape}\n")
    refused(src, tmp_path / "dst", "kpt_shape")


@pytest.mark.parametrize(
    "tail",
    [
        "0.93 1",
        "0.9{n} {n}",
        "0.39{n} 0.51{n}",
        "0.4{n} 0.5{n} 1 0.41 0.52 2",
        "0.39{n} 0.51{n} 0.0 0.0",
    ],
)
def test_boxes_with_more_numbers_are_no_polygons(tmp_path, tail):
    lines = {f"i{n}": f"0 0.4{n} 0.5 0.3{n} 0.25 {tail.format(n=n)}\n" for n in range(4)}
    src = write_yolo(tmp_path / "src", lines)
    refused(src, tmp_path / "dst", "is a box followed by")


@pytest.mark.parametrize(
    "ring",
    ["0.3 0.3 0.5 0.3 0.5 0.5 0.3 0.5", "0.6 0.2 0.7 0.3 0.65 0.4", "0.2 0.7 0.3 0.6 0.4 0.9"],
)
def test_polygons_of_one_length_stay_polygons(tmp_path, ring):
    numbers = [float(number) for number in ring.split()]
    lines = [" ".join(f"{number + n / 100:.3f}" for number in numbers) for n in range(4)]
    src = write_yolo(tmp_path / "src", {f"i{n}": f"0 {line}\n" for n, line in enumerate(lines)})
    assert convert(src, tmp_path / "dst")["splits"]["train"]["with_mask"] == 4


def test_pictures_in_subfolders_are_read(tmp_path):
    labels = {name: "0 0.5 0.5 0.5 0.5" for name in ("train/a", "train/d1/b", "train/d1/d2/c")}
    src = write_yolo(tmp_path / "src", labels, "path: .\ntrain: images/train\n")
    row = convert(src, tmp_path / "dst")["splits"]["train"]
    assert (row["images"], row["objects"]) == (3, 3)


@pytest.mark.parametrize("missing", ["val: ../valid/images\n", "test: ../test/images\n"])
def test_a_split_without_images_is_told(tmp_path, missing):
    src = write_yolo(tmp_path / "src", {"a": "0 0.5 0.5 0.5 0.5"}, f"train: ../images\n{missing}")
    summary = convert(src, tmp_path / "dst")
    assert list(summary["splits"]) == ["train"]
    assert any("does not exist" in note for note in summary["notes"])
    src = write_yolo(tmp_path / "none", {"a": ""}, "train: nowhere\nval: images\n")
    refused(src, tmp_path / "dst2", "'nowhere', which does not exist")


@pytest.mark.parametrize("text", ["\ufeff0 0.5 0.5 0.5 0.5\n", "0 0.5 0.5 0.5 0.5\r\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_byte_order_marks_of_labels_are_read(tmp_path, text, encoding):
    src = write_yolo(tmp_path / "src", {"a": None})
    write(
        src / "labels" / "a.txt", text.lstrip("\ufeff") if encoding == "utf-16" else text, encoding
    )
    convert(src, tmp_path / "dst")
    assert boxes(tmp_path / "dst") == [[24, 16, 48, 32]]


def test_labels_beside_the_pictures_are_read(tmp_path):
    src = write_yolo(tmp_path / "src", {"a": None}, "train: [images, other]\n")
    write(src / "images" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write_image(src / "other" / "b.png")
    write(src / "other" / "b.txt", "0 0.5 0.5 0.25 0.5")
    convert(src, tmp_path / "dst")
    assert boxes(tmp_path / "dst") == [[24, 16, 48, 32], [36, 16, 24, 32]]


def test_a_folder_called_images_above_the_source_says_nothing(tmp_path):
    src = write_yolo(tmp_path / "images" / "src", {})
    write(src / "data.yaml", "names: [crack]\ntrain: train\n")
    write_image(src / "train" / "a.png")
    write(src / "train" / "a.txt", "0 0.5 0.5 0.5 0.5")
    assert convert(src, tmp_path / "dst")["splits"]["train"]["objects"] == 1


def test_lists_of_images_and_labels_without_images_are_counted(tmp_path):
    labels = {name: "0 0.5 0.5 0.5 0.5" for name in ("a", "b")}
    src = write_yolo(tmp_path / "src", labels, "train: lists/train.txt\n")
    write(src / "lists" / "train.txt", "./images/a.png\n")
    summary = convert(src, tmp_path / "dst")
    assert summary["splits"]["train"]["images"] == 1
    assert summary["unused"] == {".png": 1, ".txt": 1}


def test_names_that_contradict_are_told(tmp_path):
    src = write_yolo(
        tmp_path / "src", {"a": "1 0.5 0.5 0.5 0.5"}, "nc: 3\ntrain: images\n", "names: [a, a]\n"
    )
    notes = convert(src, tmp_path / "dst")["notes"]
    assert any("nc is 3" in note for note in notes)
    assert any("several classes" in note for note in notes)
    refused(
        write_yolo(tmp_path / "no", {"a": ""}, names="names: [crack, ~]\n"),
        tmp_path / "x",
        "names is",
    )


def test_images_in_two_splits_are_told(tmp_path):
    src = write_yolo(tmp_path / "src", {"a": ""}, "train: images\nval: images\n")
    assert any("more than one split" in note for note in convert(src, tmp_path / "dst")["notes"])


# VOC and LabelMe


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_size_that_differs_is_refused(tmp_path, factor):
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    write_image(tmp_path / "src" / "a.png", size=(int(WIDTH * factor), int(HEIGHT * factor)))
    write(tmp_path / "src" / "a.xml", voc(1, 1, 9, 9, head=size))
    refused(tmp_path / "src", tmp_path / "dst", "says 96 x 64", f"has {int(96 * factor)} x")


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_size_that_is_not_stated_is_none(tmp_path, size):
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.xml", voc("1.5", 2, "9.25", 9, head=size))
    convert(tmp_path / "src", tmp_path / "dst")
    assert boxes(tmp_path / "dst") == [[0.5, 1, 8.75, 8]]


@pytest.mark.parametrize(
    "encoding", ["gb2312", "gbk", "utf-16", "windows-1252", "shift_jis", "utf-8"]
)
def test_xml_is_read_in_its_own_encoding(tmp_path, encoding):
    name = {"windows-1252": "Größe", "utf-8": "割れ é", "shift_jis": "割れ"}.get(encoding, "裂缝")
    write_image(tmp_path / "src" / "a.png")
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n{voc(1, 1, 9, 9, name=name)}'
    write(tmp_path / "src" / "a.xml", text, encoding)
    convert(tmp_path / "src", tmp_path / "dst")
    assert [entry["name"] for entry in read(tmp_path / "dst").dataset["categories"]] == [name]


@pytest.mark.parametrize("declared", ["utf-8", "ascii", "klingon"])
def test_xml_in_another_encoding_than_it_says_names_it(tmp_path, declared):
    write_image(tmp_path / "src" / "a.png")
    text = f'<?xml version="1.0" encoding="{declared}"?>\n{voc(1, 1, 9, 9, name="Größe")}'
    write(tmp_path / "src" / "a.xml", text, "windows-1252")
    refused(tmp_path / "src", tmp_path / "dst", "a.xml", declared, "save it as UTF-8")


def test_entities_are_refused(tmp_path):
    write_image(tmp_path / "src" / "a.png")
    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>' + voc(1, 1, 9, 9, name="&c;")
    write(tmp_path / "src" / "a.xml", bomb)
    refused(tmp_path / "src", tmp_path / "dst", "entities")


def test_a_name_that_contradicts_the_file_is_told_or_refused(tmp_path):
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.xml", voc(1, 1, 9, 9, head="<filename>b.png</filename>"))
    notes = convert(tmp_path / "src", tmp_path / "dst")["notes"]
    assert any("a.xml ('b.png')" in note for note in notes)
    write_image(tmp_path / "src" / "b.png")
    refused(tmp_path / "src", tmp_path / "dst2", "'b.png'", "'a.png'")


@pytest.mark.parametrize("folder", ["", "train"])
def test_the_folder_of_labelme_images_may_be_another(tmp_path, folder):
    root = tmp_path / "src" / folder
    write_image(root / "JPEGImages" / "a.png")
    write(root / "jsons" / "a.json", labelme("..\\JPEGImages\\a.png", polygon()))
    convert(tmp_path / "src", tmp_path / "dst")
    assert masks(tmp_path / "dst")["a.png"].any()
    refused(
        root / "jsons", tmp_path / "dst2", "lies outside the source", "a folder that holds both"
    )


@pytest.mark.parametrize("stated", ["..\\images\\a.png", "C:\\photos\\a.png", "/srv/x/a.png"])
def test_an_image_that_moved_beside_its_file_is_told(tmp_path, stated):
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.json", labelme(stated, polygon()))
    notes = convert(tmp_path / "src", tmp_path / "dst")["notes"]
    assert any("beside them" in note and "a.json" in note for note in notes)


def test_copied_files_that_keep_the_first_image_path_are_refused(tmp_path):
    for name in "ab":
        write_image(tmp_path / "src" / f"{name}.png")
        write(tmp_path / "src" / f"{name}.json", labelme("a.png", polygon()))
    refused(tmp_path / "src", tmp_path / "dst", "b.json", "'a.png'")
    (tmp_path / "src" / "b.png").unlink()
    refused(tmp_path / "src", tmp_path / "dst", "b.json", "a.png", "twice")


def test_a_turned_rectangle_is_a_polygon(tmp_path):
    corners = [[20, 10.5], [60, 20], [55, 40], [15, 30]]
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.json", labelme("a.png", polygon(kind="rotation", points=corners)))
    convert(tmp_path / "src", tmp_path / "dst")
    x0, y0, width, height = boxes(tmp_path / "dst")[0]
    assert (x0, x0 + width) == (15, 60)
    assert masks(tmp_path / "dst")["a.png"].sum() == pytest.approx(41 * 20, rel=0.1)


@pytest.mark.parametrize("encoding", ["gbk", "windows-1252", "utf-16"])
def test_labelme_in_another_encoding_names_it_or_is_read(tmp_path, encoding):
    label = "Größe" if encoding == "windows-1252" else "裂缝"
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.json", labelme("a.png", polygon(label)), encoding)
    refused(tmp_path / "src", tmp_path / "dst", "a.json", "UTF-8")


def test_images_without_annotations_are_counted(tmp_path):
    for name in "abcd":
        write_image(tmp_path / "src" / f"{name}.png")
    write(tmp_path / "src" / "a.json", labelme("a.png", polygon()))
    summary = convert(tmp_path / "src", tmp_path / "dst")
    assert summary["unused"] == {".png": 3}
    [note] = [note for note in summary["notes"] if "b.png, c.png, d.png" in note]
    assert note.startswith("3 images")


@pytest.mark.parametrize("shape", [3, {"label": "crack", "points": [[1, 1]], "group_id": [1]}])
def test_shapes_that_are_none_are_named(tmp_path, shape):
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.json", labelme("a.png", shape))
    refused(tmp_path / "src", tmp_path / "dst", "shape 0")


# mask pictures


def soft(mask, sigma=1.2):
    from scipy.ndimage import gaussian_filter

    return np.round(gaussian_filter(mask * 255.0, sigma)).astype(np.uint8)


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("classes", [None, "crack\n", "background\ncrack\n"])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_soft_edges_are_cut_at_half(tmp_path, classes, ending):
    src = write_mask(tmp_path / "src", soft(MASK), f"a.{ending}")
    if classes:
        write(src / "classes.txt", classes)
    category = None if classes else "crack"
    summary = convert(src, tmp_path / "dst", category=category)
    assert summary["splits"]["train"]["objects"] == 1
    assert iou(masks(tmp_path / "dst")["a.png"], MASK) > 0.9
    assert any("soft edges" in note for note in summary["notes"])
    if not classes:
        refused(src, tmp_path / "dst2", "soft edges", category="crack", objects="values")


def test_instances_of_many_values_are_not_soft(tmp_path):
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for number in range(8):
        values[8:24, 10 * number : 10 * number + 8] = 30 * (number + 1)
    src = write_mask(tmp_path / "src", values)
    row = convert(src, tmp_path / "dst", category="crack", objects="values")["splits"]["train"]
    assert row["objects"] == 8


def test_soft_and_hard_masks_of_one_set_agree(tmp_path):
    src = write_mask(tmp_path / "src", soft(MASK))
    write_image(src / "images" / "b.png")
    Image.fromarray(MASK * np.uint8(255)).save(src / "masks" / "b.png")
    convert(src, tmp_path / "dst", category="crack")
    found = masks(tmp_path / "dst")
    assert (found["b.png"] == MASK).all()
    assert iou(found["a.png"], MASK) > 0.9


@pytest.mark.parametrize("values", [255 * ~MASK, np.full((HEIGHT, WIDTH), 255)])
def test_masks_that_cover_the_picture_are_told(tmp_path, values):
    src = write_mask(tmp_path / "src", values.astype(np.uint8))
    notes = convert(src, tmp_path / "dst", category="crack")["notes"]
    assert any("'crack' covers" in note for note in notes)


@pytest.mark.parametrize("classes", ["background\ncrack\n", "crack\n"])
def test_255_is_void_beside_other_values_and_the_class_alone(tmp_path, classes):
    other = blob(50, 10, 20, 30)
    void = write_mask(tmp_path / "void", MASK + 255 * other.astype(np.uint8))
    binary = write_mask(tmp_path / "binary", 255 * MASK.astype(np.uint8))
    for src in (void, binary):
        write(src / "classes.txt", classes)
        notes = convert(src, tmp_path / f"{src.name}_dst")["notes"]
        assert (masks(tmp_path / f"{src.name}_dst")["a.png"] == MASK).all()
        assert any("void" in note for note in notes) == (src is void)
    convert(void, tmp_path / "values_dst", category="crack", objects="values")
    assert (masks(tmp_path / "values_dst")["a.png"] == MASK).all()


def test_masks_of_different_values_are_refused(tmp_path):
    src = write_mask(tmp_path / "src", MASK.astype(np.uint8))
    write_image(src / "images" / "b.png")
    Image.fromarray(MASK * np.uint8(255)).save(src / "masks" / "b.png")
    refused(src, tmp_path / "dst", "b.png", "only the value 255", category="crack")


def test_masks_with_alpha_and_of_fractions(tmp_path):
    grey = Image.fromarray(MASK * np.uint8(255))
    alpha = Image.new("L", grey.size, 255)
    pictures = {
        "la": (Image.merge("LA", (grey, alpha)), "png"),
        "alpha": (Image.merge("LA", (alpha, grey)), "png"),
        "rgba": (Image.merge("RGBA", (grey, grey, grey, alpha)), "png"),
        "half": (Image.fromarray(np.where(MASK, 0.95, 0.05).astype(np.float32)), "tiff"),
        "ones": (Image.fromarray(MASK.astype(np.float32)), "tiff"),
        "bits": (Image.fromarray(MASK), "png"),
        "deep": (Image.fromarray(MASK.astype(np.uint16) * 65535), "png"),
    }
    for name, (picture, ending) in pictures.items():
        src = write_mask(tmp_path / name, picture, f"a.{ending}")
        convert(src, tmp_path / f"{name}_dst", category="crack")
        assert (masks(tmp_path / f"{name}_dst")["a.png"] == MASK).all(), name
    nan = Image.fromarray(np.where(MASK, np.nan, 0).astype(np.float32))
    refused(write_mask(tmp_path / "nan", nan, "a.tiff"), tmp_path / "x", "a.tiff", category="crack")


@pytest.mark.parametrize(
    "name", ["mask_a.png", "a_labelIds.png", "a_mask.gif", "a_segmentation.bmp"]
)
@pytest.mark.parametrize("folders", [("images", "masks"), ("Images", "Masks"), ("IMAGES", "GT")])
def test_names_of_masks(tmp_path, name, folders):
    src = write_mask(tmp_path / "src", MASK * np.uint8(255), name, folders)
    convert(src, tmp_path / "dst", category="crack")
    assert (masks(tmp_path / "dst")["a.png"] == MASK).all()


def test_masks_in_subfolders_are_found(tmp_path):
    src = write_mask(tmp_path / "src", MASK * np.uint8(255), "d/a.png".replace("d/", ""))
    for folder in ("images", "masks"):
        (src / folder / "day").mkdir()
        (src / folder / "a.png").rename(src / folder / "day" / "a.png")
    convert(src, tmp_path / "dst", category="crack")
    assert (masks(tmp_path / "dst")["a.png"] == MASK).all()


def test_masks_that_belong_to_no_image_are_named(tmp_path):
    src = write_mask(tmp_path / "src", MASK * np.uint8(255), "other.png")
    refused(src, tmp_path / "dst", "no mask for a.png", category="crack")


# large pictures, and what a terminal would obey


def test_a_huge_picture_is_tiled(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    Image.new("L", (20_000, 9_200)).save(src / "a.png")
    content = coco_of({"a.png": [("crack", 8, 8, 16, 32)]})
    content["images"][0].update(width=20_000, height=9_200)
    write(src / "labels.json", content)
    row = convert(src, tmp_path / "dst", tile=10_000, overlap=0)["splits"]["train"]
    assert (row["images"], row["objects"], row["empty"]) == (2, 1, 1)


def test_names_cannot_steer_the_terminal(tmp_path, capfd):
    name = "crack\x1b[2J\nnote: all is well"
    src = write_labels(
        tmp_path / "src", categories=[{"id": 1, "name": name}, {"id": 2, "name": "joint"}]
    )
    write_image(src / "z\x1b[1m.png")
    text = answer_text("convert", convert(src, tmp_path / "dst"))
    assert "\x1b" not in text
    assert "\nnote" not in text
    write(src / "labels.json", coco_of({"\x1b[2J.png": []}))
    assert main(["convert", str(src), str(tmp_path / "dst2")]) == 2
    error = capfd.readouterr().err
    assert "\x1b" not in error
    assert len(error.splitlines()) == 1


# what a file states twice, and numbers that are none


@pytest.mark.parametrize("change", [{"bbox": ["8", 8, 16, 32]}, {"bbox": []}, {"bbox": None}])
def test_a_fault_of_the_source_is_named_before_it_is_cut(tmp_path, change):
    content = coco_of(FILES)
    content["annotations"][0].update(change, segmentation=None)
    src = write_labels(tmp_path / "src", annotations=content["annotations"])
    refused(src, tmp_path / "dst", "a.png", "annotation 1", tile=48)


@pytest.mark.parametrize("contents", ["joint", None, [{}]])
def test_contents_that_are_no_list_are_not_cut(tmp_path, contents):
    content = coco_of(FILES)
    content["images"][0]["contents"] = contents
    src = write_labels(tmp_path / "src")
    write(src / "labels.json", content)
    refused(src, tmp_path / "dst", "'contents' is no list", tile=48)


@pytest.mark.parametrize("change", [{"area": 5000}, {"bbox": [50, 30, 20, 20]}])
def test_what_differs_is_told_with_tiles_too(tmp_path, change):
    content = coco_of(FILES)
    content["annotations"][0].update(change)
    src = write_labels(tmp_path / "src", annotations=content["annotations"])
    notes = convert(src, tmp_path / "dst", tile=48)["notes"]
    assert any("D24" in note or "D22" in note for note in notes)
    assert [path.name for path in tmp_path.iterdir()].count("dst") == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1" + 400 * "0"])
def test_a_box_that_is_no_number_is_told_and_not_cut(tmp_path, number):
    src = write_labels(tmp_path / "src")
    content = coco_of(FILES)
    content["annotations"][0].update(bbox=[0.125, 8, 16, 32], segmentation=None)
    write(src / "labels.json", json.dumps(content).replace("0.125", number))
    assert any("D41" in note for note in convert(src, tmp_path / "dst")["notes"])
    refused(src, tmp_path / "tiles", "annotation 1: its box is", tile=48)


def test_a_size_beyond_any_image_is_one_line(tmp_path):
    content = coco_of(FILES)
    content["images"][0].update(width=10**30, height=10**30)
    src = write_labels(tmp_path / "src")
    write(src / "labels.json", content)
    refused(src, tmp_path / "dst", "a.png", "megapixels")


def test_a_seed_below_zero_is_one_line(tmp_path):
    src = write_labels(tmp_path / "src")
    refused(src, tmp_path / "dst", "the seed is -1", split=(0.5, 0.5), seed=-1)


def test_two_values_of_a_key_are_refused(tmp_path):
    src = write_labels(tmp_path / "src")
    text = json.dumps(coco_of(FILES))
    write(src / "labels.json", text[:-1] + ', "annotations": []}')
    refused(src, tmp_path / "dst", "two values of the key 'annotations'")
    write(src / "labels.json", '{"categories": [], ' + text[1:].replace('"categories"', '"x"'))
    refused(src, tmp_path / "dst", "category_id 1")
    write(src / "labels.json", text[:-1] + ', "info": 1, "info": 1}')
    convert(src, tmp_path / "dst")


def test_categories_that_become_one_are_told(tmp_path):
    table = [{"id": 1, "name": "crack "}, {"id": 2, "name": "crack"}]
    sources = [write_labels(tmp_path / "coco", categories=table)]
    sources.append(write_mask(tmp_path / "masks", MASK * np.uint8(2)))
    write(sources[1] / "classes.txt", "crack\ncrack\n")
    for src in sources:
        notes = convert(src, tmp_path / f"{src.name}_dst")["notes"]
        assert any("become one: crack" in note for note in notes), src


@pytest.mark.parametrize("path", ["/datasets/mine", "../datasets/src", "[a]"])
def test_a_path_that_is_not_there_is_told(tmp_path, path):
    src = write_yolo(tmp_path / "src", {"a": ""}, f"path: {path}\ntrain: images\n")
    notes = convert(src, tmp_path / "dst")["notes"]
    assert any(path.strip("[]") in note and "does not exist" in note for note in notes)


@pytest.mark.parametrize(
    "twice",
    [
        "<object><name>crack</name><name>joint</name>{box}</object>",
        "<object><name>crack</name>{box}{other}</object>",
        "<size><width>96</width><height>64</height></size>"
        "<size><width>960</width><height>640</height></size>",
        "<size><width>96</width><width>960</width><height>64</height></size>",
    ],
)
def test_elements_that_contradict_each_other_are_refused(tmp_path, twice):
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    text = twice.format(box=box, other=box.replace("9", "50"))
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.xml", f"<annotation>{text}</annotation>")
    refused(tmp_path / "src", tmp_path / "dst", "a.xml", "2 <", "that differ")
    text = twice.format(box=box, other=box).replace("960", "96").replace("640", "64")
    write(tmp_path / "src" / "a.xml", f"<annotation>{text.replace('joint', 'crack')}</annotation>")
    convert(tmp_path / "src", tmp_path / "dst")


def test_a_path_that_names_another_image_is_told_or_refused(tmp_path):
    head = "<filename>a.png</filename><path>C:\\old place\\b.png</path>"
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.xml", voc(1, 1, 9, 9, head=head))
    notes = convert(tmp_path / "src", tmp_path / "dst")["notes"]
    assert any("a.xml ('b.png')" in note for note in notes)
    write_image(tmp_path / "src" / "b.png")
    refused(tmp_path / "src", tmp_path / "dst2", "'b.png'", "both are there")


def test_names_in_lists_without_an_image_are_counted(tmp_path):
    write_image(tmp_path / "src" / "JPEGImages" / "a.png")
    write(tmp_path / "src" / "Annotations" / "a.xml", voc(1, 1, 9, 9))
    write(tmp_path / "src" / "ImageSets" / "Main" / "train.txt", "a.png\nb 1\n\n")
    summary = convert(tmp_path / "src", tmp_path / "dst")
    assert summary["splits"]["train"]["images"] == 1
    assert any(note.startswith("1 names in train.txt") for note in summary["notes"])


def test_points_of_three_numbers_are_no_pairs(tmp_path):
    points = [[8, 8, 1], [24, 8, 1], [24, 40, 1], [8, 40, 1]]
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.json", labelme("a.png", polygon(points=points)))
    refused(tmp_path / "src", tmp_path / "dst", "shape 0", "not pairs")


@pytest.mark.parametrize(("size", "fits"), [((17, 33), True), ((16, 32), True), ((5, 5), False)])
def test_a_painted_mask_has_the_size_of_its_box(tmp_path, size, fits):
    stream = io.BytesIO()
    Image.new("L", size, 255).save(stream, "PNG")
    mask = base64.b64encode(stream.getvalue()).decode()
    shape = polygon(kind="mask", points=[[8, 8], [24, 40]]) | {"mask": mask}
    write_image(tmp_path / "src" / "a.png")
    write(tmp_path / "src" / "a.json", labelme("a.png", shape))
    if fits:
        convert(tmp_path / "src", tmp_path / "dst")
        assert masks(tmp_path / "dst")["a.png"].sum() == size[0] * size[1]
    else:
        refused(tmp_path / "src", tmp_path / "dst", "shape 0", "(5, 5) pixels in a box of")


@pytest.mark.parametrize("name", ["a.tif", "a.gif"])
def test_masks_on_several_pages_are_refused(tmp_path, name):
    pages = [Image.fromarray(mask * np.uint8(255)) for mask in (MASK, ~MASK)]
    src = write_mask(tmp_path / "src", pages[0], name, save_all=True, append_images=pages[1:])
    refused(src, tmp_path / "dst", name, "2 frames or pages", category="crack")


def test_a_mask_is_turned_as_its_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    picture = Image.fromarray((MASK * np.uint8(255))[::-1, ::-1].copy())
    src = write_mask(tmp_path / "src", picture, exif=exif)
    convert(src, tmp_path / "dst", category="crack")
    assert (masks(tmp_path / "dst")["a.png"] == MASK).all()


def test_an_empty_line_among_classes_keeps_its_number(tmp_path):
    src = write_mask(tmp_path / "src", MASK * np.uint8(2))
    write(src / "classes.txt", "crack\n\njoint\n")
    refused(src, tmp_path / "dst", "holds the value 2", "line 2")
    write(src / "classes.txt", "crack\njoint\n\n")
    assert convert(src, tmp_path / "dst")["splits"]["train"]["categories"]["joint"] == 1


def test_a_link_to_an_annotation_file_is_followed(tmp_path):
    src = write_labels(tmp_path / "src", images=["p/a.png", "q/a.png"])
    content = coco_of({"p/a.png": FILES["a.png"], "q/a.png": []})
    write(src / "labels.json", content)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link.json").symlink_to(src / "labels.json")
    convert(tmp_path / "here" / "link.json", tmp_path / "dst")
    assert sorted(masks(tmp_path / "dst")) == ["p_a.png", "q_a.png"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c["images"][0].update(file_name="b.png"), "'file_name' is 'b.png'"),
        (lambda c: c.update(width=960), "'width' is 960 and 96"),
        (lambda c: c["annotations"][0].update(image_id=99), "'image_id' 99"),
    ],
)
def test_statements_of_a_file_per_image_that_differ_are_told(tmp_path, change, part):
    path = write_per_image(tmp_path / "src") / "train" / "annotations" / "a.json"
    content = json.loads(path.read_text())
    change(content)
    write(path, content)
    notes = convert(tmp_path / "src", tmp_path / "dst")["notes"]
    assert any("D77" in note and part in note for note in notes)


def test_a_source_without_any_object_is_told(tmp_path):
    src = write_labels(tmp_path / "src", dict.fromkeys(FILES, []))
    assert "no image shows an object" in convert(src, tmp_path / "dst")["notes"][-1]
    convert(write_labels(tmp_path / "other"), tmp_path / "dst2")
