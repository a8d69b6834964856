"""From a foreign folder to splits, and from small pictures to a large one: nothing is lost on the way."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from builders import edit_coco, write_coco, write_image
from PIL import Image
from pycocotools import mask as coco_mask
from source_builders import write_with_supervision
from tiny_random import write_dataset

from data.wall_cracks.make_export import EXAMPLE_NOUNS, TWICE, source_of, write_export
from helpers.convert.conversion import read_source
from helpers.data.coco import read_split
from helpers.data.images import near_pairs, open_upright, picture_hash
from helpers.data.masks import segmentation_to_rle
from helpers.detect.predictor import Prediction
from helpers.errors import InputError
from helpers.files import WALL_CRACKS
from notebooks.examples import (
    absent_words,
    import_dataset,
    lay_out,
    open_photograph,
    queries_by_category,
)

SHARES = (0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("example") / "yolo")


def all_records(data_dir, names=("train", "valid", "test")):
    return [record for name in names for record in read_split(data_dir, name).records]


def test_a_named_source_comes_first_then_another_dataset_then_the_example(tmp_path):
    other = write_dataset(tmp_path / "bars")
    assert source_of(str(other), WALL_CRACKS, tmp_path / "example") == (other, {})
    assert source_of("", other, tmp_path / "example") == (other, {})
    assert not (tmp_path / "example").exists()
    path, nouns = source_of("", WALL_CRACKS, tmp_path / "example")
    assert (path, nouns) == (tmp_path / "example", EXAMPLE_NOUNS)
    assert read_source(path).format == "yolo"


def test_the_example_holds_every_crack_and_hides_names_and_splits(example):
    source = read_source(example)
    records = all_records(WALL_CRACKS)
    again = -(-len(records) // TWICE)
    [(name, images)] = source.splits.items()
    assert name == "all"
    assert len(images) == len(records) + again
    assert {entry.name for entry in source.categories} == set(EXAMPLE_NOUNS)
    objects = sum(len(image.objects) for image in images[: len(records)])
    assert objects == sum(len(record.objects) for record in records)


def test_the_outlines_of_the_example_are_the_masks_but_for_holes(example):
    """Matched by the bytes of the pictures, since their names are new."""
    truth = {record.path.read_bytes(): record for record in all_records(WALL_CRACKS)}
    [images] = read_source(example).splits.values()
    ious = []
    for image in images:
        record = truth.get(image.path.read_bytes())
        for item, own in zip(image.objects, record.objects if record else (), strict=False):
            mask = coco_mask.decode(
                segmentation_to_rle(item["segmentation"], image.height, image.width)
            )
            true = coco_mask.decode(own.rle)
            ious.append((mask & true).sum() / (mask | true).sum())
    assert len(ious) == 109
    assert np.mean(ious) > 0.99
    assert min(ious) > 0.85


def test_pictures_taken_twice_stay_in_one_split(example, tmp_path):
    import_dataset(example, tmp_path / "data", shares=SHARES, seed=0)
    records = all_records(tmp_path / "data")
    hashes = np.array([picture_hash(open_upright(record.path)) for record in records])
    pairs = [(a, b) for a, b in near_pairs(hashes, hashes) if a < b]
    assert len(pairs) == 10
    for first, second in pairs:
        assert records[first].path.parent == records[second].path.parent


def test_the_example_is_the_same_every_time(example, tmp_path):
    other = write_export(tmp_path / "again")
    for path in sorted(example.rglob("*.*")):
        assert (other / path.relative_to(example)).read_bytes() == path.read_bytes()


def test_three_splits_of_the_source_are_kept_and_two_are_divided_anew(tmp_path):
    whole = write_dataset(tmp_path / "bars", (("train", 8), ("valid", 6), ("test", 4)))
    kept = import_dataset(whole, tmp_path / "kept", shares=SHARES, seed=0)
    assert {name: row["images"] for name, row in kept["splits"].items()} == {
        "train": 8,
        "valid": 6,
        "test": 4,
    }
    shutil.rmtree(whole / "test")
    anew = import_dataset(whole, tmp_path / "anew", shares=SHARES, seed=0)
    assert list(anew["splits"]) == ["train", "valid", "test"]
    assert sum(row["images"] for row in anew["splits"].values()) == 14


def test_an_earlier_conversion_is_replaced_but_never_its_own_source(tmp_path):
    source = write_dataset(tmp_path / "work" / "bars")
    output = tmp_path / "data"
    output.mkdir()
    (output / "old.txt").write_text("old")
    import_dataset(source, output, shares=SHARES, seed=0)
    assert not (output / "old.txt").exists()
    before = sorted(path.name for path in source.rglob("*"))
    for folder in (source, source.parent):
        with pytest.raises(InputError, match="source lies in the folder"):
            import_dataset(source, folder, shares=SHARES, seed=0)
    assert sorted(path.name for path in source.rglob("*")) == before


def test_an_unreadable_source_leaves_the_earlier_conversion(tmp_path):
    output = tmp_path / "data"
    import_dataset(write_dataset(tmp_path / "bars"), output, shares=SHARES, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no annotations of a known format"):
        import_dataset(tmp_path / "empty", output, shares=SHARES, seed=0)
    assert (output / "train").is_dir()


@pytest.mark.parametrize("kind", ["yolo", "voc", "labelme"])
def test_other_formats_need_no_option(tmp_path, kind):
    source = write_with_supervision(tmp_path, kind)
    (source / "test").mkdir(exist_ok=True)
    summary = import_dataset(source, tmp_path / "data", shares=(0.5, 0.25, 0.25), seed=0)
    assert summary["format"] == kind
    assert sum(row["objects"] for row in summary["splits"].values()) == 4


# -- one large photograph --------------------------------------------------------------------


def test_a_large_photograph_has_the_pixels_and_masks_of_its_pictures(tmp_path):
    records = read_split(write_dataset(tmp_path / "bars", (("train", 9),)), "train").records
    large = lay_out(records, tmp_path / "new" / "large.png", columns=2)
    assert (large.width, large.height) == (120, 80)
    pixels = np.asarray(Image.open(large.path))
    found, true = np.zeros((80, 120), dtype=bool), np.zeros((80, 120), dtype=bool)
    for number, record in enumerate([one for one in records if one.objects][:4]):
        y, x = 40 * (number // 2), 60 * (number % 2)
        place = (slice(y, y + 40), slice(x, x + 60))
        assert (pixels[place] == np.asarray(open_upright(record.path))).all()
        for item in record.objects:
            true[place] |= coco_mask.decode(item.rle).astype(bool)
    for item in large.objects:
        mask = coco_mask.decode(item.rle).astype(bool)
        found |= mask
        rows, columns = np.nonzero(mask)
        assert item.box_xyxy == (
            columns.min(),
            rows.min(),
            columns.max() + 1,
            rows.max() + 1,
        )
    assert true.any()
    assert (found == true).all()


@pytest.mark.parametrize(("count", "size"), [(1, (60, 40)), (3, (60, 40)), (4, (120, 80))])
def test_few_pictures_make_a_smaller_photograph(tmp_path, count, size):
    records = read_split(write_dataset(tmp_path / "bars", (("train", count),)), "train").records
    large = lay_out(records, tmp_path / "large.png")
    assert (large.width, large.height) == size


def test_pictures_of_another_size_are_left_out(tmp_path):
    root = write_coco(tmp_path / "data")
    write_image(root / "train" / "wide.png", (300, 20))
    wide = {"id": 99, "file_name": "wide.png", "width": 300, "height": 20}
    edit_coco(root, "train", lambda content: content["images"].append(wide))
    records = read_split(root, "train").records
    usual = next(one for one in records if one.image_id != "wide.png")
    large = lay_out(records, tmp_path / "large.png", columns=1)
    assert (large.width, large.height) == (usual.width, usual.height)


def test_a_photograph_of_ones_own_has_its_upright_size_and_no_objects(tmp_path):
    turned = Image.new("RGB", (30, 20))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    record = open_photograph(tmp_path / "turned.jpg")
    assert (record.width, record.height, record.objects) == (20, 30, ())
    with pytest.raises(InputError, match="no such image"):
        open_photograph(tmp_path / "nothing.jpg")


def test_each_prompt_is_judged_by_the_objects_of_its_category(tmp_path):
    split = read_split(write_coco(tmp_path / "data"), "train")
    record = max(split.records, key=lambda one: len({item.category for item in one.objects}))
    names = sorted({item.category for item in record.objects})
    assert len(names) > 1
    answers = [
        Prediction(str(record.path), name, record.height, record.width, 1.0, 1.0, 1.0, [])
        for name in [*names, "dog"]
    ]
    queries = queries_by_category(answers, record)
    counted = {query.prompt: len(query.gt) for query in queries}
    expected = {
        name: sum(item.category == name and item.rle is not None for item in record.objects)
        for name in names
    }
    assert counted == expected | {"dog": 0}


def test_absent_words_warn_where_nothing_is_listed(capsys):
    split = read_split(WALL_CRACKS, "test")
    assert absent_words(["dog"], split) == ["dog"]
    assert capsys.readouterr().out == ""
    bare = replace(split, records=tuple(replace(r, contents=frozenset()) for r in split.records))
    absent_words(["dog", "car"], bare)
    text = capsys.readouterr().out
    assert text.startswith("The annotations of test do not say what else is in a picture")
    assert "dog, car" in text
