import numpy as np
import pytest
from builders import mask_of
from PIL import Image
from source_builders import mask_in

from helpers.convert.conversion import convert
from helpers.convert.division import MIN_PIECE, tile_images
from helpers.convert.source import SourceImage
from helpers.data.coco import read_split
from helpers.data.masks import mask_to_rle
from helpers.data.records import absent_candidates, present_prompts
from helpers.errors import InputError

SIZE = (200, 300)  # rows, columns
TILE = 100


def source_image(folder, *objects, extra=None, suffix=".png"):
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    path = folder / f"wall{suffix}"
    Image.fromarray(pixels).save(path)
    return SourceImage(path, SIZE[1], SIZE[0], objects, extra or {})


def crack(*rectangle, **more):
    mask = mask_of(*rectangle, size=SIZE)
    return {"category": "crack", "segmentation": mask_to_rle(mask), "iscrowd": 0, **more}


def cut(tmp_path, *objects, overlap=0.0, **more):
    image = source_image(tmp_path, *objects, **more)
    (tmp_path / "tiles").mkdir()
    return image, tile_images([image], tmp_path / "tiles", TILE, overlap)


def test_tiles_show_the_pixels_of_the_image_and_of_its_objects(tmp_path):
    mask = mask_of(30, 40, 230, 100, size=SIZE)
    image, tiles = cut(tmp_path, crack(30, 40, 230, 100), overlap=0.2)
    pixels = np.asarray(Image.open(image.path))
    assert len(tiles) == 4 * 3
    seen = np.zeros(SIZE, dtype=int)
    for tile in tiles:
        x, y = (int(part[1:]) for part in tile.path.stem.split("_")[1:])
        window = np.s_[y : y + TILE, x : x + TILE]
        assert (np.asarray(Image.open(tile.path)) == pixels[window]).all()
        [item] = tile.objects
        assert (mask_in(item, tile) == mask[window]).all()
        seen[window] += 1
    assert seen.min() == 1


def test_a_tile_without_the_object_is_kept_and_asks_it_as_absent(tmp_path):
    _, tiles = cut(tmp_path, crack(10, 10, 30, 30))
    assert [len(tile.objects) for tile in tiles] == [1, 0, 0, 0, 0, 0]
    assert all("contents" not in tile.extra for tile in tiles)


@pytest.mark.parametrize(("width", "is_object"), [(1, False), (2, True)])
def test_a_tiny_remainder_is_neither_object_nor_absent(tmp_path, monkeypatch, width, is_object):
    monkeypatch.setattr("helpers.convert.division.MIN_PIECE", 0.02)  # two pixels of these tiles
    _, tiles = cut(tmp_path, crack(60, 50, 40 + width, 1))
    assert len(tiles[0].objects) == 1
    assert len(tiles[1].objects) == is_object
    assert tiles[1].extra == ({} if is_object else {"contents": ["crack"]})
    assert tiles[2].extra == {}


def test_a_small_object_that_is_whole_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.convert.division.MIN_PIECE", 0.02)
    _, tiles = cut(tmp_path, crack(50, 50, 1, 1))
    assert len(tiles[0].objects) == 1


def test_the_limit_is_two_cells_of_the_grid_of_sam3():
    assert MIN_PIECE * 1008 == pytest.approx(7)


def test_boxes_without_masks_and_crowds_are_cut_too(tmp_path):
    box = {"category": "joint", "bbox": [90.5, 10, 20, 30], "iscrowd": 0}
    _, tiles = cut(tmp_path, box, crack(150, 20, 100, 10, iscrowd=1))
    assert tiles[0].objects == ({"category": "joint", "iscrowd": 0, "bbox": [90.5, 10, 9.5, 30]},)
    joint, crowd = tiles[1].objects
    assert joint["bbox"] == [0, 10, 10.5, 30]
    assert crowd["iscrowd"] == 1


def test_small_images_and_contents_are_kept(tmp_path):
    image, tiles = cut(tmp_path, crack(10, 10, 30, 30), extra={"contents": ["moss"], "id": 4})
    assert all(tile.extra == {"contents": ["moss"]} for tile in tiles)
    assert tile_images([image], tmp_path, 300, 0.2) == [image]


def test_a_wrong_size_is_refused(tmp_path):
    image = source_image(tmp_path)
    wrong = SourceImage(image.path, 310, 200, ())
    with pytest.raises(InputError, match="300 x 200 pixels, its annotation says 310 x 200"):
        tile_images([wrong], tmp_path, TILE, 0.2)


def test_a_converted_tile_asks_the_truth(tmp_path):
    mask = mask_of(60, 50, 140, 3, size=SIZE)
    root = tmp_path / "src"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    source_image(root / "images", suffix=".jpg")
    Image.fromarray(mask).save(root / "masks" / "wall.png")
    convert(root, tmp_path / "dst", category="crack", tile=TILE, overlap=0.2)
    split = read_split(tmp_path / "dst", "train")
    assert len(split.records) == 12
    for record in split.records:
        x, y = (int(part[1:]) for part in record.path.stem.split("_")[1:])
        visible = mask[y : y + TILE, x : x + TILE].any()
        assert bool(present_prompts(record, split.categories)) == visible
        assert (absent_candidates(record, ["crack"]) == []) == visible
