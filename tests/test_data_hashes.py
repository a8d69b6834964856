import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from helpers.data.coco import read_split
from helpers.data.images import NEAR, near_pairs, open_upright, picture_hash
from helpers.files import DATA, ROOT

SETS = [DATA / "wall_cracks", *(ROOT.parent / "shared" / "data").glob("*[0-9]")]


def photograph(seed, size=(96, 64)):
    """Return a picture with structure at several scales, as photographs have."""
    generator = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(generator.uniform(0, 255, (side, side)).astype(np.uint8)).resize(size),
            dtype=float,
        )
        for side in (3, 6, 12)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).convert("RGB")


def saved_anew(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=50)
    return Image.open(stream)


def bits(first, second):
    return int(np.bitwise_count(picture_hash(first) ^ picture_hash(second)).sum())


@pytest.mark.parametrize(
    "copy",
    [
        saved_anew,
        lambda image: image.resize((image.width // 2, image.height // 2)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    ],
    ids=["jpeg", "half", "darker", "flat"],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_copy_is_near_and_another_picture_is_not(copy, seed):
    image = photograph(seed, (384, 256))
    assert bits(image, copy(image)) <= NEAR
    assert bits(image, photograph(seed + 100, (384, 256))) > NEAR


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_the_pictures_of_a_sound_dataset_are_all_different(folder):
    paths = [
        r.path for split in ("train", "valid", "test") for r in read_split(folder, split).records
    ]
    hashes = np.array([picture_hash(open_upright(path)) for path in paths])
    pairs = near_pairs(hashes, hashes, limit=2 * NEAR)
    assert [tuple(pair) for pair in pairs if pair[0] != pair[1]] == []


def test_near_pairs_are_those_a_loop_finds():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, (600, 32), dtype=np.uint8)  # more than one block
    second = first[::7].copy()
    second[:, :4] ^= generator.integers(0, 256, (len(second), 4), dtype=np.uint8)
    expected = {
        (i, j)
        for i in range(len(first))
        for j in range(len(second))
        if np.unpackbits(first[i] ^ second[j]).sum() <= 15
    }
    assert 0 < len(expected) < len(second)
    assert {tuple(pair) for pair in near_pairs(first, second, limit=15).tolist()} == expected


def test_no_pictures_have_no_pairs():
    none, some = np.empty((0, 32), dtype=np.uint8), np.zeros((2, 32), dtype=np.uint8)
    assert near_pairs(none, some).shape == (0, 2)
    assert near_pairs(some, none).shape == (0, 2)
