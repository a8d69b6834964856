"""Both layouts give the same records; what cannot be read is refused in one clear line."""

import json
import shutil
import time

import numpy as np
import pytest
from builders import (
    DATASET,
    HEIGHT,
    WIDTH,
    edit_coco,
    mask_of,
    write_coco,
    write_image,
    write_per_image,
)
from pycocotools import mask as coco_mask

from helpers.data.coco import find_splits, read_split
from helpers.errors import InputError
from helpers.files import ROOT

REAL_DATA = ROOT.parent / "shared" / "data"


def first_annotation(content):
    return content["annotations"][0]


def change_first(**values):
    """Return a change for `edit_coco` that sets values of the first annotation."""
    return lambda content: first_annotation(content).update(values)


@pytest.mark.parametrize("form", ["polygon", "runs", "rle"])
def test_both_layouts_and_all_forms_give_the_same_records(form, tmp_path):
    whole = write_coco(tmp_path / "coco")
    single = write_per_image(tmp_path / "single", form=form)
    for split in ("train", "valid", "test"):
        first, second = read_split(whole, split), read_split(single, split)
        assert (first.layout, second.layout) == ("coco", "per_image")
        assert first.categories == second.categories == ("crack", "joint")
        for one, other in zip(first.records, second.records, strict=True):
            assert one.objects == other.objects
            assert (one.image_id, one.width, one.height) == (other.image_id, WIDTH, HEIGHT)
            assert other.path.is_file()
        assert [record.image_id for record in first.records] == sorted(DATASET[split])


def test_objects_are_what_was_written(tmp_path):
    split = read_split(write_coco(tmp_path), "train")
    record = split.records[1]
    crack, joint = record.objects
    assert split.num_objects == 5
    assert (crack.category, joint.category) == ("crack", "joint")
    assert crack.box_xyxy == (40, 4, 52, 44)
    assert np.array_equal(coco_mask.decode(crack.rle), mask_of(40, 4, 12, 40))
    assert crack.has_own_box
    assert not crack.is_crowd
    assert split.records[2].objects == ()


def test_both_layouts_in_one_folder(tmp_path):
    write_per_image(write_coco(tmp_path))
    assert read_split(tmp_path, "train").layout == "coco"
    assert read_split(tmp_path, "train", layout="per_image").layout == "per_image"
    with pytest.raises(InputError, match="in the layout yolo"):
        read_split(tmp_path, "train", layout="yolo")


def test_images_may_lie_in_a_subfolder(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "train" / "images").mkdir()
    for file_name in DATASET["train"]:
        (tmp_path / "train" / file_name).rename(tmp_path / "train" / "images" / file_name)
    split = read_split(tmp_path, "train")
    assert all(record.path.parent.name == "images" for record in split.records)
    assert all(record.path.is_file() for record in split.records)
    assert split.unannotated == ()


def test_val_means_valid(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "val")
    assert find_splits(tmp_path) == ["train", "valid", "test"]
    assert read_split(tmp_path, "valid") == read_split(tmp_path, "val")
    assert read_split(tmp_path, "val").name == "valid"


@pytest.mark.parametrize(
    ("folder", "name"), [("Train", "train"), ("TRAINING", "train"), ("Validation", "valid")]
)
def test_other_words_for_a_split_mean_it(folder, name, tmp_path):
    write_coco(tmp_path / "data", {"first": DATASET["train"]})
    (tmp_path / "data" / "first").rename(tmp_path / "data" / folder)
    assert find_splits(tmp_path / "data") == [name]
    assert read_split(tmp_path / "data", name).name == name


def test_two_folders_of_one_split_are_refused(tmp_path):
    write_coco(tmp_path)
    shutil.copytree(tmp_path / "valid", tmp_path / "val")
    with pytest.raises(InputError, match="'val' and 'valid' both mean the split 'valid'"):
        read_split(tmp_path, "valid")
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()  # an empty folder is no second split
    assert read_split(tmp_path, "valid").num_objects == 2


@pytest.mark.parametrize("write", [write_coco, write_per_image])
def test_the_folder_above_a_split_is_named(write, tmp_path):
    with pytest.raises(InputError, match="is one split and no dataset") as error:
        find_splits(write(tmp_path) / "train")
    assert str(tmp_path) in error.value.fix


@pytest.mark.parametrize(
    ("stated", "stored"),
    [
        ("Gr\u00f6\u00dfe.png", "Gro\u0308\u00dfe.png"),
        ("my%20photo%231.png", "my photo#1.png"),
        ("Img_1.png", "img_1.PNG"),
    ],
)
def test_an_image_is_found_under_another_spelling_of_its_name(stated, stored, tmp_path):
    write_coco(tmp_path, {"train": {stored: [("crack", 8, 8, 16, 32)]}})
    edit_coco(tmp_path, "train", lambda content: content["images"][0].update(file_name=stated))
    split = read_split(tmp_path, "train")
    assert split.records[0].path == tmp_path / "train" / stored
    assert split.unannotated == ()
    write_image(tmp_path / "train" / stored.upper())  # two files may be meant: neither is taken
    assert not read_split(tmp_path, "train").records[0].path.is_file()


def test_files_that_are_not_used_are_listed(tmp_path):
    write_per_image(write_coco(tmp_path))
    (tmp_path / "train" / "annotations" / "unknown.json").write_text("{}")
    (tmp_path / "train" / "._a.png").write_bytes(b"x")
    nested = write_image(tmp_path / "train" / "more" / "z.png")
    split = read_split(tmp_path, "train")
    assert [path.name for path in split.unread] == ["unknown.json"]
    assert nested in split.unannotated


def test_contents_and_missing_sizes(tmp_path):
    write_per_image(tmp_path, {"train": {"a.png": []}})
    path = tmp_path / "train" / "annotations" / "a.json"
    path.write_text(
        json.dumps({"annotations": [], "categories": [], "contents": ["moss"]}), "utf-8"
    )
    record = read_split(tmp_path, "train").records[0]
    assert record.contents == {"moss"}
    assert (record.width, record.height) == (WIDTH, HEIGHT)
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", lambda content: content["images"][0].update(contents=["dog"]))
    assert read_split(tmp_path, "train").records[0].contents == {"dog"}


def test_unannotated_parent_is_not_asked_for(tmp_path):
    write_coco(tmp_path)
    root = {"id": 7, "name": "defect", "supercategory": "none"}
    edit_coco(tmp_path, "train", lambda content: content["categories"].insert(0, root))
    split = read_split(tmp_path, "train")
    assert split.categories == ("crack", "joint")
    assert [entry.name for entry in split.category_table] == ["defect", "crack", "joint"]


def test_images_without_entry_are_listed(tmp_path):
    write_coco(tmp_path)
    extra = write_image(tmp_path / "train" / "z.png")
    split = read_split(tmp_path, "train")
    assert split.unannotated == (extra,)
    assert len(split.records) == 4


def test_box_is_taken_from_the_mask_if_there_is_none(tmp_path):
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", lambda content: first_annotation(content).pop("bbox"))
    item = read_split(tmp_path, "train").records[0].objects[0]
    assert item.box_xyxy == (8, 8, 24, 40)
    assert not item.has_own_box


@pytest.mark.parametrize("segmentation", [[], None, {}])
def test_object_with_a_box_only(segmentation, tmp_path):
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", change_first(segmentation=segmentation))
    item = read_split(tmp_path, "train").records[0].objects[0]
    assert item.rle is None
    assert item.mask_problem is None


def test_polygon_parts_are_joined(tmp_path):
    write_coco(tmp_path)
    parts = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 16, 10, 16, 12, 10, 12]]
    edit_coco(tmp_path, "train", change_first(segmentation=parts))
    item = read_split(tmp_path, "train").records[0].objects[0]
    assert coco_mask.area(item.rle) == 16 + 12


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "at least 6"),
        ([[1, 1, 5, 5, 9, 9, 2]], "even count"),
        ([1, 1, 5, 5, 9, 9], "flat list"),
        ([[1, 1, 5, float("nan"), 9, 9]], "no coordinate"),
        ([[1, 1, 5, 1e9, 9, 9]], "no coordinate"),
        ([[1, 1, 5, 10**400, 9, 9]], "no coordinate"),
        ([["1", 1, 5, 5, 9, 9]], "no coordinate"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, 5]}, "cover 15 pixels"),
        ({"size": [2, 2], "counts": [5, -1]}, "cover 4 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "ooo"}, "middle of a number"),
        ({"size": [HEIGHT, WIDTH], "counts": "a b"}, "character ' '"),
        ({"size": [HEIGHT, WIDTH], "counts": 5}, "neither whole numbers"),
        ({"size": [HEIGHT], "counts": "0"}, "not [height, width]"),
        ({"size": [0, WIDTH], "counts": "0"}, "not [height, width]"),
        ({"size": [60_000, 60_000], "counts": [3_600_000_000]}, "500 megapixels"),
        ("polygon", "is a str"),
    ],
)
def test_malformed_segmentation_is_kept_as_a_problem(segmentation, reason, tmp_path):
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", change_first(segmentation=segmentation))
    item = read_split(tmp_path, "train").records[0].objects[0]
    assert item.rle is None
    assert reason in item.mask_problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda content: content.pop("annotations"),
            "no key 'annotations' but only categories, images",
        ),
        (lambda content: content.pop("categories"), "no key 'categories'"),
        (lambda content: content.update(annotations={}), "no list of objects"),
        (lambda content: content["categories"][0].pop("name"), "category 1 has no name"),
        (lambda content: content["categories"][0].update(name="  "), "category 1 has no name"),
        (lambda content: content["categories"][0].update(id="1"), "category has the id '1'"),
        (lambda content: content["categories"][1].update(id=1), "means both 'crack' and 'joint'"),
        (change_first(category_id=9), "category_id 9 has no name"),
        (change_first(category_id=[1]), "category_id [1] has no name"),
        (change_first(category_id="1"), "category_id '1' has no name in 'categories' as text, but"),
        (change_first(image_id=99), "belongs to image 99"),
        (change_first(image_id="1"), "does not list as text, but as the number 1"),
        (
            lambda content: content["annotations"].insert(0, {"image_id": 1, "segments_info": []}),
            "panoptic segmentation",
        ),
        (lambda content: content["annotations"].insert(0, {"caption": "a crack"}), "for captions"),
        (
            lambda content: content["images"][0].update(width=60_000, height=60_000),
            "60000 x 60000, more than 500 megapixels",
        ),
        (change_first(image_id=None), "belongs to image None"),
        (change_first(bbox=[1, 2, 3]), "bbox is [1, 2, 3]"),
        (change_first(bbox=[1, 2, 3, "4"]), "bbox is [1, 2, 3, '4']"),
        (change_first(bbox=None, segmentation=[]), "neither a box nor a mask"),
        (change_first(iscrowd="0"), "iscrowd is '0'"),
        (lambda content: content["images"][0].update(width="96"), "the size is '96' x 64"),
        (lambda content: content["images"][0].update(width=None, height=0), "the size is None x 0"),
        (lambda content: content["images"][0].pop("file_name"), "no file_name"),
        (lambda content: content["images"][0].update(contents="dog"), "no list of nouns"),
        (lambda content: content["images"][0].update(id=2), "id 2 is missing or given twice"),
        (lambda content: content["images"][1].update(file_name="a.png"), "a.png is listed twice"),
    ],
)
def test_unreadable_annotations_are_refused(change, expected, tmp_path):
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", change)
    with pytest.raises(InputError) as error:
        read_split(tmp_path, "train")
    assert expected in str(error.value)
    assert str(tmp_path / "train") in str(error.value)
    assert error.value.fix


@pytest.mark.parametrize("text", ['{"images": [', "", "[]", "\xff\xfe", "[" * 100_000])
def test_broken_json_is_refused(text, tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "train" / "_annotations.coco.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_split(tmp_path, "train")
    assert str(path) in str(error.value)


def test_ids_of_64_bits_stay_what_they_are(tmp_path):
    write_coco(tmp_path)
    ids = [2**64 - 1, 2**64 - 2, 10**18 + 1, 10**18 + 2]

    def change(content):
        for image, number in zip(content["images"], ids, strict=True):
            for annotation in content["annotations"]:
                if annotation["image_id"] == image["id"]:
                    annotation["image_id"] = number
            image["id"] = number

    before = read_split(tmp_path, "train")
    edit_coco(tmp_path, "train", change)
    assert read_split(tmp_path, "train").records == before.records


def test_the_seeds_missing_keys_are_refused(tmp_path):
    """The seed read ``bboxes`` and ``masks``, which no file has: every image lost its objects."""
    write_per_image(tmp_path)
    path = tmp_path / "train" / "annotations" / "a.json"
    path.write_text(json.dumps({"bboxes": [], "masks": [], "categories": []}), encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json: has no key 'annotations'"):
        read_split(tmp_path, "train")


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_splits(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such folder"):
        read_split(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="holds no split"):
        find_splits(tmp_path)
    write_coco(tmp_path)
    with pytest.raises(InputError, match="use one of train, valid, test"):
        read_split(tmp_path, "tset")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="holds no annotations in the layout coco or per_image"):
        read_split(tmp_path, "other")
    with pytest.raises(InputError, match="holds no annotations in the layout per_image"):
        read_split(tmp_path, "train", layout="per_image")


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real datasets are not beside the project")
@pytest.mark.parametrize(
    ("name", "images", "objects"),
    [("masonry224", [184, 34, 22], [366, 60, 40]), ("pothole90", [54, 18, 18], [74, 23, 23])],
)
def test_real_datasets_are_read_fast(name, images, objects):
    start = time.perf_counter()
    splits = [read_split(REAL_DATA / name, split) for split in find_splits(REAL_DATA / name)]
    assert time.perf_counter() - start < 2
    assert [len(split.records) for split in splits] == images
    assert [split.num_objects for split in splits] == objects
    assert all(item.mask_problem is None for s in splits for r in s.records for item in r.objects)


def test_of_two_images_of_one_stem_the_stated_one_is_taken(tmp_path):
    write_per_image(tmp_path)
    write_image(tmp_path / "train" / "images" / "a.jpg")
    [record] = [r for r in read_split(tmp_path, "train").records if r.path.stem == "a"]
    assert (record.path.name, record.contradiction) == ("a.png", None)
    (tmp_path / "train" / "images" / "a.png").rename(tmp_path / "train" / "images" / "a.webp")
    [record] = [r for r in read_split(tmp_path, "train").records if r.path.stem == "a"]
    assert record.contradiction == "a.json may mean a.jpg or a.webp"


def test_an_annotation_of_another_image_id_is_a_contradiction(tmp_path):
    path = write_per_image(tmp_path) / "train" / "annotations" / "a.json"
    content = json.loads(path.read_text())
    first_annotation(content)["image_id"] = 99
    path.write_text(json.dumps(content))
    records = read_split(tmp_path, "train").records
    assert [record.contradiction for record in records if record.contradiction] == [
        f"'id' is {content['images'][0]['id']} and 'image_id' 99"
    ]


def test_hidden_folders_are_not_counted_and_broken_links_are(tmp_path):
    write_coco(tmp_path)
    write_image(tmp_path / "train" / ".cache" / "a.png")
    (tmp_path / "train" / "gone.png").symlink_to("nowhere.png")
    split = read_split(tmp_path, "train")
    assert [path.name for path in split.unannotated] == ["gone.png"]
