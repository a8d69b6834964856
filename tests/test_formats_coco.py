import json

import pytest
from builders import coco_of, write_coco, write_image, write_per_image

from helpers.convert.coco import annotation_files, read_coco
from helpers.errors import InputError

FILES = {"a.png": [("crack", 8, 8, 16, 32), ("joint", 60, 0, 8, 64)], "b.png": []}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("form", ["polygon", "runs", "rle"])
@pytest.mark.parametrize("write", [write_coco, write_per_image])
def test_entries_stay_as_they_are_in_the_file(tmp_path, write, form):
    source = read_coco(write(tmp_path, {"train": FILES}, form=form))
    first, second = source.splits["train"]
    expected = coco_of(FILES, form)["annotations"]
    kept = [{k: v for k, v in item.items() if k != "category"} for item in first.objects]
    dropped = ("image_id", "category_id")
    assert kept == [{k: v for k, v in e.items() if k not in dropped} for e in expected]
    assert [item["category"] for item in first.objects] == ["crack", "joint"]
    assert second.objects == ()
    assert [(c.category_id, c.name, c.supercategory) for c in source.categories] == [
        (1, "crack", "defect"),
        (2, "joint", "defect"),
    ]


def test_a_file_of_its_own_with_images_anywhere_below(tmp_path):
    path = write_json(tmp_path / "instances_val2017.json", coco_of(FILES))
    image = write_image(tmp_path / "deep" / "inside" / "a.png")
    write_image(tmp_path / "b.png")
    for root in (path, tmp_path):
        source = read_coco(root)
        assert set(source.splits) == {"valid"}
        assert source.splits["valid"][0].path == image


def test_one_file_per_split_with_equal_image_names(tmp_path):
    for split in ("train", "val"):
        write_json(tmp_path / "annotations" / f"instances_{split}.json", coco_of(FILES))
        write_json(tmp_path / "annotations" / f"captions_{split}.json", {"images": []})
        for name in FILES:
            write_image(tmp_path / split / name)
    source = read_coco(tmp_path)
    folders = {name: {i.path.parent.name for i in images} for name, images in source.splits.items()}
    assert folders == {"train": {"train"}, "valid": {"val"}}


def test_a_file_whose_name_says_no_split_is_the_whole(tmp_path):
    write_json(tmp_path / "labels.json", coco_of({"a.png": []}))
    write_image(tmp_path / "a.png")
    assert set(read_coco(tmp_path).splits) == {"all"}


def test_categories_join_by_name(tmp_path):
    write_coco(tmp_path, {"train": FILES, "valid": FILES})
    content = coco_of(FILES)
    content["categories"] = [{"id": 2, "name": "crack"}, {"id": 1, "name": "moss"}]
    content["annotations"] = []
    write_json(tmp_path / "valid" / "_annotations.coco.json", content)
    table = read_coco(tmp_path).categories
    assert [(entry.category_id, entry.name) for entry in table] == [
        (1, "crack"),
        (2, "joint"),
        (3, "moss"),
    ]


def test_missing_and_ambiguous_images_are_named(tmp_path):
    path = write_json(tmp_path / "train.json", coco_of({"a.png": []}))
    with pytest.raises(InputError, match=r"image 'a.png' is not there"):
        read_coco(path)
    write_image(tmp_path / "one" / "a.png")
    write_image(tmp_path / "two" / "a.png")
    with pytest.raises(InputError, match=r"image 'a.png' is there 2 times"):
        read_coco(path)


def test_two_files_of_one_split_are_refused(tmp_path):
    write_json(tmp_path / "train.json", coco_of({}))
    write_json(tmp_path / "train2.json", coco_of({}))
    with pytest.raises(InputError, match=r"'train.json' and 'train2.json' are both"):
        read_coco(tmp_path)


def test_an_unknown_category_is_named(tmp_path):
    content = coco_of(FILES)
    content["annotations"][1]["category_id"] = 7
    write_json(tmp_path / "train.json", content)
    for name in FILES:
        write_image(tmp_path / name)
    with pytest.raises(InputError, match="annotation 2 has category_id 7"):
        read_coco(tmp_path)


def test_mask_pictures_in_a_folder_called_annotations_are_not_coco(tmp_path):
    write_image(tmp_path / "train" / "annotations" / "a.png")
    assert not annotation_files(tmp_path)
