"""Read folders of images and mask pictures: binary, one value per class, or one per instance."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from helpers.convert.source import WHOLE, Source, SourceImage, images_in, numbered, split_folders
from helpers.data.images import upright_size
from helpers.data.masks import mask_to_rle
from helpers.errors import InputError

MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ground_truth", "gt")
MASK_ENDINGS = ("", "_mask", "-mask", "_seg", "_label", "_gt")
CLASSES_FILE = "classes.txt"
BACKGROUND = ("background", "_background_")
OBJECTS = ("components", "whole", "values")
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def is_masks(root):
    """Tell whether a folder holds image and mask folders, at its top or per split."""
    return root.is_dir() and bool(_folder_pairs(root))


def read_masks(root, category=None, objects="components"):
    """Read images with a mask picture each.

    Parameters
    ----------
    root : pathlib.Path
        Holds ``images/`` and ``masks/`` (or another of `MASK_FOLDERS`), or those in a folder per
        split, or split folders in both. A mask has its image's stem, or that and one of
        `MASK_ENDINGS`. ``classes.txt``, one name per line, names the values 1, 2, ...; a first
        line ``background`` names 0.
    category : str, optional
        What the foreground shows, where there is no ``classes.txt``.
    objects : {"components", "whole", "values"}
        What is an object: a connected component (8 neighbours) of the pixels of a class, all its
        pixels in the image, or each value of the mask, which then is the number of an instance.

    Returns
    -------
    helpers.convert.source.Source
        Masks as run lengths, every pixel kept. Images without a mask picture are left out, and
        ``notes`` count them.

    Raises
    ------
    InputError
        If the foreground has no name, a value is not named, or a mask has another size than its
        image.
    """
    if objects not in OBJECTS:
        raise InputError(f"objects is {objects!r}", fix=f"use one of {', '.join(OBJECTS)}")
    names = _names(root, category, objects)
    splits, unused = {}, 0
    for split, (image_folder, mask_folder) in _folder_pairs(root).items():
        masks = images_in(mask_folder)
        splits[split] = []
        for stem, path in images_in(image_folder).items():
            mask_file = next(
                (masks[stem + end] for end in MASK_ENDINGS if stem + end in masks), None
            )
            if mask_file is None:
                unused += 1
                continue
            splits[split].append(_image(path, mask_file, names, objects))
    notes = (f"{unused} images have no mask picture and are left out",) if unused else ()
    return Source("masks", splits, numbered(names.values()), notes)


def _folder_pairs(root):
    """Map each split to its folders of images and of masks."""
    pairs = {}
    for split, folder in split_folders(root).items():
        masks = _mask_folder(folder)
        if masks is None:
            continue
        inner = {
            name: split_folders(path) for name, path in (("i", folder / "images"), ("m", masks))
        }
        if split == WHOLE and inner["i"].keys() == inner["m"].keys():
            pairs |= {name: (path, inner["m"][name]) for name, path in inner["i"].items()}
        else:
            pairs[split] = (folder / "images", masks)
    return pairs


def _mask_folder(folder):
    """Return the folder of mask pictures beside ``images/``; None without both."""
    if not (folder / "images").is_dir():
        return None
    for name in MASK_FOLDERS:
        path = folder / name
        if path.is_dir() and any(images_in(inner) for inner in split_folders(path).values()):
            return path
    return None


def _names(root, category, objects):
    """Map mask values to names; a single name under None means any foreground."""
    path = root / CLASSES_FILE
    if category is not None or not path.is_file():
        if category is None or not category.strip():
            raise InputError(
                "mask pictures do not say what they show",
                where=root,
                fix=f"give --category crack, or write {CLASSES_FILE} with a name per line",
            )
        return {None: category.strip()}
    if objects == "values":
        raise InputError(
            "values cannot be classes and instances at once",
            where=path,
            fix="give --category in place of the file, or another --objects",
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    first = 0 if names and names[0].casefold() in BACKGROUND else 1
    named = {value: name for value, name in enumerate(names, first) if value > 0}
    if not named:
        raise InputError("names no class", where=path, fix="write one name per line")
    return named


def _image(path, mask_file, names, objects):
    """Read one image with its mask picture."""
    (width, height), _ = upright_size(path)
    values = _mask_values(mask_file)
    if values.shape != (height, width):
        raise InputError(
            f"is {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}",
            where=mask_file,
            fix="save the mask at the size of the upright image",
        )
    present = [int(value) for value in np.unique(values) if value]
    if None in names and objects != "values" and len(present) > 1:
        raise InputError(
            f"holds {len(present)} values beside 0, which are not named",
            where=mask_file,
            fix=f"write {CLASSES_FILE} if they are classes, or give --objects values if each is an "
            "object",
        )
    unnamed = [value for value in present if None not in names and value not in names]
    if unnamed:
        raise InputError(
            f"holds the value {unnamed[0]}, which {CLASSES_FILE} does not name",
            where=mask_file,
            fix=f"add its name as line {unnamed[0]}",
        )
    entries = [
        {"category": names.get(value, names.get(None)), "segmentation": rle, "iscrowd": 0}
        for value in present
        for rle in _objects_of(values == value, objects)
    ]
    return SourceImage(path, width, height, tuple(entries))


def _mask_values(path):
    """Read a mask picture as whole numbers, 0 for the background.

    A palette keeps its indices. A colour picture must be grey. A JPEG, whose values smear, is
    cut at half.
    """
    try:
        with Image.open(path) as picture:
            is_lossy = picture.format == "JPEG"
            values = np.array(picture.convert("L") if is_lossy else picture)
    except OSError as error:
        raise InputError(
            f"is no readable picture ({error})", where=path, fix="save it as PNG"
        ) from error
    if values.ndim == 3:
        colours = values[..., :3]
        if (colours != colours[..., :1]).any():
            raise InputError(
                "is coloured, so its values name nothing",
                where=path,
                fix="save it as grey values or with a palette",
            )
        values = colours[..., 0]
    return (values > 127).astype(int) if is_lossy else values.astype(int)


def _objects_of(mask, objects):
    """Divide the pixels of one value into the run lengths of its objects."""
    if objects != "components":
        return [mask_to_rle(mask)]
    labels, count = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
    return [mask_to_rle(labels == number) for number in range(1, count + 1)]
