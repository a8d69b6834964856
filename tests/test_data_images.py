"""Photographs open upright, or are refused by name."""

import cv2
import numpy as np
import pytest
from builders import write_image
from PIL import Image

from helpers.data.images import look_at, open_upright, same_shape, upright_size
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


@pytest.mark.parametrize("name", ["rgb.png", "rgb.tif", "grey.png", "grey.tif", "rgba.png"])
def test_more_than_8_bits_are_refused_in_any_mode(name, tmp_path):
    """Pillow keeps the high byte of 12-bit data: a picture that is nearly black."""
    shape = {"rgb": (8, 8, 3), "grey": (8, 8), "rgba": (8, 8, 4)}[name.split(".")[0]]
    cv2.imwrite(str(tmp_path / name), np.full(shape, 4000, np.uint16))
    with pytest.raises(InputError, match="more than 8 bits per channel"):
        open_upright(tmp_path / name)
    assert "8 bits" in look_at(tmp_path / name).problem
    assert upright_size(tmp_path / name)[0] == (8, 8)


def test_a_photograph_of_200_megapixels_is_read(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (20_000, 10_000)).save(path)
    assert upright_size(path)[0] == (20_000, 10_000)
    picture = look_at(path)
    assert picture.problem is None
    assert picture.size == (20_000, 10_000)


def test_sizes_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.data.images.MAX_PIXELS", 100)
    path = write_image(tmp_path / "a.png", size=(30, 20))
    for read in (open_upright, upright_size):
        with pytest.raises(InputError, match="larger than 0 megapixels"):
            read(path)
    assert "megapixels" in look_at(path).problem


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_background(mode, tmp_path):
    pixels = np.full((8, 8, 4), (200, 50, 50, 255), np.uint8)
    pixels[:4] = (0, 255, 0, 0)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).convert(mode).save(path)
    upright = np.asarray(open_upright(path))
    assert (upright[:4] == 255).all()
    assert (upright[4:] != 255).all()
    assert look_at(path).is_transparent
    Image.fromarray(pixels[4:]).save(path)
    assert not look_at(path).is_transparent
    assert np.asarray(open_upright(path))[0, 0].tolist() == [200, 50, 50]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_one_look_tells_what_opening_tells(name, tmp_path):
    path = write_image(tmp_path / name, size=(300, 200), exif=orientation(6))
    picture = look_at(path)
    assert picture.size == open_upright(path).size == (200, 300)
    assert (picture.orientation, picture.num_frames, picture.problem) == (6, 1, None)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "no readable image" in look_at(path).problem
    path.unlink()
    assert look_at(path).digest == ""


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_frames_are_counted(name, tmp_path):
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("black", "white"))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    assert look_at(tmp_path / name).num_frames == 2
