"""Image files: opened upright, described by one decoding, compared by their looks."""

import hashlib
import io
import re
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy.fft import dctn

from helpers.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 500_000_000  # larger images are refused: this is 1.5 GB as RGB
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit stops photographs of 179 megapixels
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow clips these to white in RGB
SAME_SHAPE = 0.01  # relative difference of aspects that rounding to whole pixels can make
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
BACKGROUND = (255, 255, 255, 255)  # what shows through transparent pixels, as in a browser


@dataclass(frozen=True)
class Picture:
    """What one decoding of an image file tells."""

    digest: str  # SHA-256 of the file; empty without a file
    size: tuple[int, int] | None = None  # (width, height) in pixels, upright; None if unusable
    orientation: int = 1  # of EXIF, 1 for upright
    look: np.ndarray | None = None  # from `picture_hash`
    num_frames: int = 1  # of an animation, or pages; only the first is used
    is_transparent: bool = False  # whether a pixel is fully transparent
    problem: str | None = None  # why the file cannot be used
    fix: str | None = None


def open_upright(path):
    """Decode an image file fully and turn it upright: a `PIL.Image.Image` of mode RGB."""
    with _opened(path, path) as image:
        return _on_background(ImageOps.exif_transpose(image))[0].convert("RGB")


def _on_background(image):
    """Return an image without transparency, and whether a pixel of it was fully transparent."""
    if not image.has_transparency_data:
        return image, False
    image = image.convert("RGBA")
    is_transparent = image.getextrema()[3][0] == 0
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image), is_transparent


def upright_size(path):
    """Read from the header the (width, height) an image has upright, and its EXIF orientation."""
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
            num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            # A JPEG is decoded at an eighth of its size: its whole stream is read all the same.
            image.draft("L", (4 * SIDE, 4 * SIDE))
            upright, is_transparent = _on_background(ImageOps.exif_transpose(image))
            look = picture_hash(upright)
    except InputError as error:
        return Picture(digest, problem=error.message, fix=error.fix)
    return Picture(digest, size, orientation, look, num_frames, is_transparent)


@contextmanager
def _opened(source, path, any_depth=False):
    """Open an image from a path or stream; whatever goes wrong with it is an InputError."""
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            raw_modes = [str(tile[3]) for tile in image.tile]  # Pillow cuts "RGB;16B" to mode RGB
            is_deep = image.mode in DEEP_MODES or re.search(r";16[BLN]", " ".join(raw_modes))
            if is_deep and not any_depth:
                message = f"holds more than 8 bits per channel ({image.mode}): they would be cut"
                fix = "convert it to 8 bits per channel, spreading its values over 0 to 255"
                raise InputError(message, where=path, fix=fix)
            yield image
    except InputError:
        raise
    except Exception as error:  # Pillow raises a different type for each way a file can be broken
        message, fix = f"is no readable image ({error})", "replace or remove the file"
        if isinstance(error, FileNotFoundError):
            message, fix = "no such image", "check the path, or remove its annotation entry"
        elif isinstance(error, Image.DecompressionBombError):
            message = f"is larger than {MAX_PIXELS / 1e6:.0f} megapixels"
            fix = "cut it into several images, or save it smaller"
        elif isinstance(error, UnidentifiedImageError):
            message, suffix = "is no readable image (of no known format)", Path(path).suffix.lower()
            with Path(path).open("rb") as file:
                if file.read(8)[4:] == b"ftyp" or suffix in (".heic", ".heif"):
                    message, fix = "HEIC cannot be read", "save it as JPEG or PNG"
        raise InputError(message, where=path, fix=fix) from error


def _upright_size(image):
    """Return (width, height) as upright, and the EXIF orientation, of an open image."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    is_swapped = orientation in TURNED and image.format != "TIFF"  # Pillow turns a TIFF itself
    return (image.size[::-1] if is_swapped else image.size), orientation


def same_shape(size, stated):
    """Return whether two (width, height) have the same aspect, up to a difference of 1 %."""
    product = size[0] * stated[1]
    return abs(product - size[1] * stated[0]) <= SAME_SHAPE * product


def near_files(paths):
    """Map paths to the one file beside them whose name differs in case, accents or % encoding."""
    near, beside = {}, {}
    for folder in {path.parent for path in paths if path.parent.is_dir()}:
        for other in folder.iterdir():
            beside.setdefault((folder, spelling(unquote(other.name))), []).append(other)
    for path in paths:
        matches = beside.get((path.parent, spelling(unquote(path.name))), [])
        if len(matches) == 1:
            near[path] = matches[0]
    return near


def spelling(name):
    """Return a name without what systems change on the way: case, and how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def load_pixels(record, processor, resolution):
    """Load the image of a record as float32 (3, resolution, resolution), as the processor says."""
    image = open_upright(record.path)
    if not same_shape(image.size, (record.width, record.height)):
        size, stated = f"{image.width} x {image.height}", f"{record.width} x {record.height}"
        message = f"the upright image is {size} pixels, its annotation says {stated}"
        fix = "annotate the upright image, or save it without an EXIF orientation"
        raise InputError(message, where=record.path, fix=fix)
    size = {"height": resolution, "width": resolution}
    content = processor.image_processor(images=image, size=size, return_tensors="pt")
    return content["pixel_values"][0]


SIDE = 64  # pixels the picture is shrunk to
FREQUENCIES = 16  # lowest ones per axis that are compared
# Differing bits of 255 up to which two pictures are copies of each other. Of 450 pictures of walls
# and roads, 95 % of the copies (recompressed, half the size, brighter, shifted by 1 %) differ in at
# most 26 bits, those cropped by 5 % in 32 to 80, two different pictures in at least 86.
NEAR = 40
_BLOCK = 128  # rows compared at once


def picture_hash(image):
    """Return which of the 255 lowest frequencies are above their median ("pHash"), (32,) uint8."""
    # A reducing gap lets Pillow skip most pixels of a large photograph.
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    spectrum = dctn(np.asarray(small, dtype=np.float64), norm="ortho")
    low = spectrum[:FREQUENCIES, :FREQUENCIES].ravel()[1:]
    return np.packbits(low > np.median(low))


def near_pairs(first, second, limit=NEAR):
    """Find the rows of hashes (n, 32) and (m, 32) that differ in at most `limit` bits: (k, 2) int."""
    words = [np.array(rows, np.uint8).reshape(-1, 32).view(np.uint64) for rows in (first, second)]
    pairs = []
    for start in range(0, len(words[0]), _BLOCK):
        rows = words[0][start : start + _BLOCK]
        bits = np.bitwise_count(rows[:, None] ^ words[1]).sum(-1, dtype=np.uint16)
        pairs.append(np.argwhere(bits <= limit) + [start, 0])
    return np.concatenate([np.empty((0, 2), dtype=int), *pairs])
