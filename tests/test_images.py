"""Photographs open upright, or are refused by name."""

import numpy as np
import pytest
from builders import write_image
from PIL import Image

from helpers.data.images import open_upright, same_shape, upright_size
from helpers.errors import InputError


def test_images_open_upright(tmp_path):
    turned = write_image(tmp_path / "a.jpg", size=(30, 20), exif=orientation(6))
    assert open_upright(turned).size == (20, 30)
    assert upright_size(turned) == ((20, 30), 6)
    assert upright_size(write_image(tmp_path / "b.jpg", size=(30, 20))) == ((30, 20), 1)


def orientation(value):
    """Return EXIF data with an orientation for Pillow's save."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_unusable_images_are_refused(tmp_path):
    whole = write_image(tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image", encoding="utf-8")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for name, expected in [
        ("cut.png", "no readable image"),
        ("text.jpg", "no readable image"),
        ("deep.png", "8 bits"),
        ("nowhere.png", "no such image"),
    ]:
        with pytest.raises(InputError, match=expected) as error:
            open_upright(tmp_path / name)
        assert name in str(error.value)


def test_same_shape_allows_for_rounding():
    assert same_shape((640, 480), (320, 240))
    assert same_shape((641, 480), (640, 480))
    assert not same_shape((640, 480), (480, 640))
