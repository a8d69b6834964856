import numpy as np
import pytest
from builders import HEIGHT, WIDTH, write_image
from source_builders import TRUTH, masks_in, masks_of, write_with_supervision

from helpers.convert.conversion import read_source
from helpers.convert.yolo import names_file, read_yolo
from helpers.errors import InputError

SQUARE = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75"


def write_yolo(root, labels, yaml="names: [crack, joint]\n"):
    """Write one image and label file per entry below train/."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(yaml)
    (root / "train" / "labels").mkdir(parents=True)
    for stem, text in labels.items():
        write_image(root / "train" / "images" / f"{stem}.png")
        if text is not None:
            (root / "train" / "labels" / f"{stem}.txt").write_text(text)
    return root


def test_what_supervision_writes_is_read_pixel_by_pixel(tmp_path):
    source = read_source(write_with_supervision(tmp_path, "yolo"))
    assert source.format == "yolo"
    assert masks_in(source) == masks_of(TRUTH)
    assert any("pixels" in note for note in source.notes)


def test_a_polygon_stays_an_outline(tmp_path):
    [image] = read_yolo(write_yolo(tmp_path, {"a": SQUARE})).splits["train"]
    assert (image.width, image.height) == (WIDTH, HEIGHT)
    [item] = image.objects
    assert item == {
        "category": "crack",
        "segmentation": [[24, 16, 72, 16, 72, 48, 24, 48]],
        "iscrowd": 0,
    }


def test_a_box_has_a_centre_and_no_mask(tmp_path):
    [image] = read_yolo(write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n"})).splits["train"]
    [item] = image.objects
    assert item["category"] == "joint"
    assert "segmentation" not in item
    np.testing.assert_allclose(item["bbox"], [36, 16, 24, 32])


def test_images_without_label_file_are_empty_and_counted(tmp_path):
    source = read_yolo(write_yolo(tmp_path, {"a": SQUARE, "b": "", "c": None}))
    assert [len(image.objects) for image in source.splits["train"]] == [1, 0, 0]
    [note] = source.notes
    assert note == "1 images have no label file and count as empty: train/images/c.png"


@pytest.mark.parametrize(
    "entry", ["train: train/images", "train: ../train/images", "path: .\ntrain: [train/images]"]
)
def test_the_yaml_file_says_where_the_images_are(tmp_path, entry):
    root = write_yolo(tmp_path, {"a": SQUARE}, f"names: {{0: crack}}\n{entry}\n")
    assert [image.path.stem for image in read_yolo(root).splits["train"]] == ["a"]


def test_a_text_file_may_list_the_images(tmp_path):
    root = write_yolo(tmp_path, {"a": SQUARE, "b": SQUARE}, "names: [crack]\nval: list.txt\n")
    (root / "list.txt").write_text("./train/images/b.png\n")
    assert [image.path.stem for image in read_yolo(root).splits["valid"]] == ["b"]


def test_split_folders_inside_images(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [crack]\n")
    write_image(tmp_path / "images" / "val" / "a.png")
    (tmp_path / "labels" / "val").mkdir(parents=True)
    (tmp_path / "labels" / "val" / "a.txt").write_text(SQUARE)
    source = read_yolo(tmp_path)
    assert [len(image.objects) for image in source.splits["valid"]] == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2 is not among"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is not among"),
        ("0 0.5 0.5 0.1", "3 numbers are neither"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers are neither"),
        ("0 10 10 20 20", "10 is no share"),
        ("0 nan 0.5 0.1 0.1", "nan is no share"),
        ("0 a b c d", "not all numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    root = write_yolo(tmp_path, {"a": f"{SQUARE}\n{text}\n"})
    with pytest.raises(InputError, match=message) as error:
        read_yolo(root)
    assert error.value.where.endswith("a.txt, line 2")
    assert error.value.fix


def test_names_must_be_named(tmp_path):
    with pytest.raises(InputError, match="names is"):
        read_yolo(write_yolo(tmp_path, {"a": SQUARE}, "names: {a: crack}\n"))


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="names 'nowhere'"):
        read_yolo(write_yolo(tmp_path, {"a": SQUARE}, "names: [crack]\ntrain: nowhere\n"))


def test_only_a_folder_with_names_names_file(tmp_path):
    assert not names_file(tmp_path)
    (tmp_path / "data.yaml").write_text("lr: 1\n")
    assert not names_file(tmp_path)
