"""Image files: opened upright, described by one decoding, compared by their looks."""

from __future__ import annotations

import hashlib
import io
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from scipy.fft import dctn

from helpers.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these to white in RGB
SAME_SHAPE = 0.01  # relative difference of aspects that rounding to whole pixels can make
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Picture:
    """What one decoding of an image file tells.

    Attributes
    ----------
    digest : str
        SHA-256 of the file; empty without a file.
    size : tuple of int or None
        (width, height) in pixels, upright; None for a file that cannot be used.
    orientation : int
        The EXIF orientation, 1 for upright.
    look : numpy.ndarray or None
        From `picture_hash`.
    problem : str or None
        Why the file cannot be used.
    """

    digest: str
    size: tuple[int, int] | None = None
    orientation: int = 1
    look: np.ndarray | None = None
    problem: str | None = None


def open_upright(path):
    """Open an image, decode it fully, and apply its EXIF orientation.

    Parameters
    ----------
    path : os.PathLike
        An image file with 8 bits per channel.

    Returns
    -------
    PIL.Image.Image
        Mode RGB; its ``size`` is (width, height) in pixels after turning.

    Raises
    ------
    InputError
        If the file is missing, corrupt or truncated, or holds more than 8 bits per channel.
    """
    with _opened(path, path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def upright_size(path):
    """Read from the header the (width, height) an image has upright, and its EXIF orientation.

    Raises
    ------
    InputError
        If the header cannot be read.
    """
    with _opened(path, path, any_depth=True) as image:
        return _upright_size(image)


def look_at(path):
    """Read, hash and decode an image file once; what is wrong with it is part of the `Picture`."""
    path = Path(path)
    if not path.is_file():
        return Picture("", problem="no such image")
    try:
        content = path.read_bytes()
    except OSError as error:
        return Picture("", problem=f"cannot be read ({error.strerror or error})")
    digest = hashlib.sha256(content).hexdigest()
    try:
        with _opened(io.BytesIO(content), path) as image:
            size, orientation = _upright_size(image)
            # A JPEG is decoded at an eighth of its size: its whole stream is read all the same.
            image.draft("L", (4 * SIDE, 4 * SIDE))
            look = picture_hash(ImageOps.exif_transpose(image))
    except InputError as error:
        return Picture(digest, problem=error.message)
    return Picture(digest, size, orientation, look)


@contextmanager
def _opened(source, path, any_depth=False):
    """Open an image from a path or stream; whatever goes wrong with it is an InputError."""
    try:
        with Image.open(source) as image:
            if image.mode in DEEP_MODES and not any_depth:
                raise InputError(
                    f"has mode {image.mode}, which a conversion to 8 bits would clip to white",
                    where=path,
                    fix="convert the image to 8 bits per channel",
                )
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            "no such image", where=path, fix="restore the file or remove its annotation entry"
        ) from error
    except Exception as error:  # Pillow raises a different type for each way a file can be broken
        reason = str(error).removesuffix(f" {source!r}")
        raise InputError(
            f"is no readable image ({reason})", where=path, fix="replace or remove the file"
        ) from error


def _upright_size(image):
    """Return (width, height) as upright, and the EXIF orientation, of an open image."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = image.size
    return ((height, width) if orientation in TURNED else (width, height)), orientation


def same_shape(size, stated):
    """Tell whether two sizes have the same aspect, so that one may be a resized copy of the other.

    Parameters
    ----------
    size, stated : tuple of int
        (width, height) in pixels.

    Returns
    -------
    bool
        True up to a relative difference of 1 %.
    """
    (width, height), (stated_width, stated_height) = size, stated
    product = width * stated_height
    return abs(product - height * stated_width) <= SAME_SHAPE * product


def load_pixels(record, processor, resolution):
    """Load the picture of a record as the model sees it.

    Parameters
    ----------
    record : helpers.data.records.ImageRecord
    processor : transformers.Sam3Processor
        Its ``image_processor`` resizes to a square, rescales and normalises.
    resolution : int
        Side of the square in pixels.

    Returns
    -------
    torch.Tensor
        float32 ``(3, resolution, resolution)``, normalised.

    Raises
    ------
    InputError
        If the image cannot be opened or its shape is not the annotated one.
    """
    image = open_upright(record.path)
    if not same_shape(image.size, (record.width, record.height)):
        raise InputError(
            f"the upright image is {image.width} x {image.height} pixels, its annotation says "
            f"{record.width} x {record.height}",
            where=record.path,
            fix="annotate the upright image, or save the image without an EXIF orientation",
        )
    return processor.image_processor(
        images=image, size={"height": resolution, "width": resolution}, return_tensors="pt"
    )["pixel_values"][0]


SIDE = 64  # pixels the picture is shrunk to
FREQUENCIES = 16  # lowest ones per axis that are compared
NEAR = 40
"""Differing bits of 255 up to which two pictures are copies of each other.

Measured on 450 pictures of walls, masonry and roads: a copy saved as JPEG of quality 50, at half the
size, brighter, of less contrast or shifted by 1 % differs in at most 44 bits (95 % of them in at
most 26), one cropped by 5 % in 32 to 80, two different pictures in at least 86.
"""
_BLOCK = 512  # rows compared at once


def picture_hash(image):
    """Reduce a picture to the signs of its low frequencies.

    Parameters
    ----------
    image : PIL.Image.Image

    Returns
    -------
    numpy.ndarray
        (32,) uint8, 255 bits: whether each of the 16 x 16 lowest coefficients of the cosine
        transform, but for the mean, is above their median ("pHash").
    """
    # A reducing gap lets the decoder and Pillow skip most pixels of a large photograph.
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    spectrum = dctn(np.asarray(small, dtype=np.float64), norm="ortho")
    low = spectrum[:FREQUENCIES, :FREQUENCIES].ravel()[1:]
    return np.packbits(low > np.median(low))


def near_pairs(first, second, limit=NEAR):
    """Find the pairs of pictures that look the same.

    Parameters
    ----------
    first, second : numpy.ndarray
        (n, 32) and (m, 32) uint8, from `picture_hash`.
    limit : int
        Bits that may differ.

    Returns
    -------
    numpy.ndarray
        (k, 2) int: rows of `first` and of `second`.
    """
    words = [np.ascontiguousarray(one).reshape(-1, 32).view(np.uint64) for one in (first, second)]
    found = []
    for start in range(0, len(words[0]), _BLOCK):
        rows = words[0][start : start + _BLOCK]
        bits = sum(
            np.bitwise_count(rows[:, None, word] ^ words[1][None, :, word]).astype(np.uint16)
            for word in range(words[0].shape[1])
        )
        found.append(np.argwhere(bits <= limit) + [start, 0])
    return np.concatenate(found) if found else np.empty((0, 2), dtype=int)
