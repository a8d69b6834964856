"""The course's data: committed as generated, and one truth in two layouts."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data.wall_cracks.make import DEFAULT_SEED, SPLITS, annotation_entry, polygons_of, write_split
from data.wall_cracks.make_painters import RENDER_SIZE
from helpers.data.coco import read_split
from helpers.files import WALL_CRACKS


def disc(radius):
    rows, columns = np.ogrid[:RENDER_SIZE, :RENDER_SIZE]
    return (rows - 90) ** 2 + (columns - 120) ** 2 <= radius**2


@pytest.mark.parametrize("split", SPLITS)
def test_both_layouts_hold_the_same_objects(split):
    per_image = read_split(WALL_CRACKS, split, layout="per_image")
    whole = read_split(WALL_CRACKS, split, layout="coco")
    assert len(whole.records) == SPLITS[split]
    by_path = {record.path: record for record in per_image.records}
    for record in whole.records:
        other = by_path[record.path]
        assert record.contents == other.contents
        assert [(o.box_xyxy, o.rle) for o in record.objects] == [
            (o.box_xyxy, o.rle) for o in other.objects
        ]


@pytest.mark.parametrize("split", SPLITS)
def test_a_fifth_of_the_images_has_no_crack(split):
    records = read_split(WALL_CRACKS, split).records
    empty = sum(not record.objects for record in records)
    assert empty == SPLITS[split] // 5


def test_rle_and_polygon_both_occur():
    entries = json.loads((WALL_CRACKS / "train" / "_annotations.coco.json").read_text())
    kinds = {type(entry["segmentation"]) for entry in entries["annotations"]}
    assert kinds == {dict, list}


def test_committed_annotations_are_what_the_seed_generates(tmp_path):
    number = list(SPLITS).index("valid")
    write_split(tmp_path / "valid", 6, np.random.default_rng((DEFAULT_SEED, number)))
    for path in sorted((tmp_path / "valid" / "annotations").iterdir()):
        committed = json.loads((WALL_CRACKS / "valid" / "annotations" / path.name).read_text())
        assert json.loads(path.read_text()) == committed


def test_polygon_rasterises_back_to_its_mask():
    mask = disc(30)
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons_of(mask), *mask.shape))
    assert (coco_mask.decode(rle).astype(bool) & mask).sum() / mask.sum() > 0.99


def test_a_mask_with_a_hole_is_not_written_as_polygon():
    mask = disc(30) & ~disc(12)
    assert polygons_of(mask) is None
    assert isinstance(annotation_entry(mask, as_polygon=True)["segmentation"], dict)


def test_box_and_area_are_those_of_the_segmentation():
    entry = annotation_entry(disc(20), as_polygon=False)
    assert entry["bbox"] == [100.0, 70.0, 41.0, 41.0]
    assert entry["area"] == float(disc(20).sum())
