"""Read folders of images and mask pictures: binary, one value per class, or one per instance."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from scipy import ndimage

from helpers.convert.source import (
    WHOLE,
    Source,
    SourceImage,
    by_stem,
    examples,
    files_below,
    folder_named,
    numbered,
    picture_size,
    read_text,
    refuse_outside,
    split_folders,
)
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.masks import mask_to_rle
from helpers.errors import InputError

IMAGE_FOLDERS = ("images", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ground_truth", "gt")
MASK_FOLDERS += ("SegmentationObject", "SegmentationClass")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
MASK_ENDINGS = ("", "_mask", "-mask", "_masks", "_seg", "_label", "_labels", "_gt", "_segmentation")
MASK_ENDINGS += ("_labelIds", "_instanceIds", "_mask_0")
MASK_PREFIXES = ("mask_", "mask-", "seg_", "label_", "gt_")
CLASSES_FILE = "classes.txt"
BACKGROUND = ("background", "_background_")
OBJECTS = ("components", "whole", "values")
VOID = 255  # of pixels that belong to nothing, in Pascal VOC and others
HALF = 127  # grey values above are foreground where a mask has soft edges
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def is_masks(root):
    """Return whether a folder holds image and mask folders, at its top or per split."""
    return root.is_dir() and bool(_folder_pairs(root))


def read_masks(root, category=None, objects="components"):
    """Read images with a mask picture each.

    Parameters
    ----------
    root : pathlib.Path
        Holds ``images/`` and ``masks/`` (or another of `MASK_FOLDERS`), or those in a folder per
        split, or split folders in both. A mask has its image's stem, with one of `MASK_ENDINGS` or
        `MASK_PREFIXES`. ``classes.txt``, one name per line, names the values 1, 2, ...; a first
        line ``background`` names 0.
    category : str, optional
        What the foreground shows, where there is no ``classes.txt``.
    objects : {"components", "whole", "values"}
        What is an object: a connected component (8 neighbours) of the pixels of a class, all its
        pixels in the image, or each value of the mask, which then is the number of an instance.

    Returns
    -------
    helpers.convert.source.Source
        Masks as run lengths, every pixel kept. Soft edges of a binary mask are cut at half, and 255
        beside other values is void; ``notes`` say so.

    Raises
    ------
    InputError
        If the foreground has no name, a value is not named, or a mask has another size than its
        image.
    """
    if objects not in OBJECTS:
        raise InputError(f"objects is {objects!r}", fix=f"use one of {', '.join(OBJECTS)}")
    names = _names(root, category, objects)
    is_binary = None in names or len(names) == 1
    read, soft = {}, []
    for split, (image_folder, mask_folder) in _folder_pairs(root).items():
        read[split] = []
        for path, mask_file in _pairs(image_folder, mask_folder):
            refuse_outside(mask_file, root)
            values, is_soft = _mask_values(mask_file)
            size = picture_size(path, root)
            if values.shape != size[::-1]:
                raise InputError(
                    f"is {values.shape[1]} x {values.shape[0]} pixels, its image {size[0]} x {size[1]}",
                    where=mask_file,
                    fix="save the mask at the size of the upright image",
                )
            if is_soft:
                if objects == "values" or not is_binary:
                    raise InputError(
                        "has soft edges, whose values are neither classes nor instances",
                        where=mask_file,
                        fix="save it without smoothing, or leave --objects values out",
                    )
                soft.append(mask_file.name)
                values = (values > HALF) * VOID
            rles = {
                int(value): _objects_of(values == value, objects)
                for value in np.unique(values)
                if value
            }
            read[split].append((path, mask_file, size, rles))
    notes = [f"{len(soft)} masks have soft edges, cut at half: {examples(soft)}"] if soft else []
    masks = [(mask_file, rles) for rows in read.values() for _, mask_file, _, rles in rows]
    names = _names_of_values(names, masks, objects, bool(soft), notes)
    splits = {
        split: [
            SourceImage(
                path,
                *size,
                tuple(
                    {"category": names[value], "segmentation": rle, "iscrowd": 0}
                    for value in rles
                    if value in names
                    for rle in rles[value]
                ),
                {},
                (mask_file,),
            )
            for path, mask_file, size, rles in rows
        ]
        for split, rows in read.items()
    }
    files = tuple(path for path in [root / CLASSES_FILE] if path.is_file() and category is None)
    return Source("masks", splits, numbered(names.values()), tuple(notes), {}, files)


def _folder_pairs(root):
    """Map each split to its folders of images and of masks."""
    pairs = {}
    for split, folder in split_folders(root).items():
        images, masks = folder_named(folder, *IMAGE_FOLDERS), _mask_folder(folder)
        if images is None or masks is None:
            continue
        inner_images, inner_masks = split_folders(images), split_folders(masks)
        if split == WHOLE and inner_images.keys() == inner_masks.keys():
            pairs |= {name: (path, inner_masks[name]) for name, path in inner_images.items()}
        else:
            pairs[split] = (images, masks)
    return pairs


def _mask_folder(folder):
    """Return the first folder of mask pictures, or None."""
    for name in MASK_FOLDERS:
        path = folder_named(folder, name)
        if path is not None and files_below(path, MASK_SUFFIXES):
            return path
    return None


def _pairs(image_folder, mask_folder):
    """List the images that have a mask, with it."""
    images = by_stem(files_below(image_folder, IMAGE_SUFFIXES), image_folder)
    masks = by_stem(files_below(mask_folder, MASK_SUFFIXES), mask_folder)
    pairs = []
    for stem, path in images.items():
        folder, name = PurePosixPath(stem).parent, PurePosixPath(stem).name
        candidates = [name + ending for ending in MASK_ENDINGS]
        candidates += [prefix + name for prefix in MASK_PREFIXES]
        stems = [(folder / candidate).as_posix() for candidate in candidates]
        pairs += [(path, masks[stem]) for stem in stems if stem in masks][:1]
    if images and not pairs:
        raise InputError(
            f"there is no mask for {next(iter(images.values())).name}",
            where=mask_folder,
            fix="give each mask the name of its image, or that with _mask",
        )
    return pairs


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
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    first = 0 if names and names[0].casefold() in BACKGROUND else 1
    by_value = {value: name for value, name in enumerate(names, first) if value > 0}
    if not by_value:
        raise InputError("names no class", where=path, fix="write one name per line")
    return by_value


def _names_of_values(names, masks, objects, has_soft, notes):
    """Map each value in the masks that is an object to its name."""
    values = {value for _, rles in masks for value in rles}
    is_named = None not in names
    if values <= ({1, VOID} if has_soft else {VOID}) and len(names) == 1:
        return dict.fromkeys(values | {1}, *names.values())
    if VOID in values and VOID not in names and VOID - 1 not in values:
        for mask_file, rles in masks:
            if set(rles) == {VOID}:
                raise InputError(
                    f"holds only the value {VOID}, which stands beside others in other masks",
                    where=mask_file,
                    fix="save all masks with the same values",
                )
        notes.append(f"the value {VOID} is void in mask pictures and belongs to nothing")
        values.remove(VOID)
    for mask_file, rles in masks:
        present = sorted(values & rles.keys())
        unnamed = [value for value in present if is_named and value not in names]
        if unnamed:
            raise InputError(
                f"holds the value {unnamed[0]}, which {CLASSES_FILE} does not name",
                where=mask_file,
                fix=f"add its name as line {unnamed[0]}",
            )
        if not is_named and objects != "values" and len(present) > 1:
            raise InputError(
                f"holds {len(present)} values beside 0, which are not named",
                where=mask_file,
                fix=f"write {CLASSES_FILE} if they are classes, or give --objects values if each "
                "is an object",
            )
    return names if is_named else dict.fromkeys(values, names[None])


def _mask_values(path):
    """Read a mask picture as whole numbers, 0 for the background, and whether its edges are soft.

    A palette keeps its indices. A colour picture must be grey. Fractions are shares of 255.
    """
    try:
        with Image.open(path) as picture:
            is_jpeg = picture.format == "JPEG"
            values = np.array(picture.convert("L") if is_jpeg else picture)
            has_alpha = picture.mode in ("LA", "RGBA")
    except Exception as error:  # Pillow raises another type for each way a file can be broken
        raise InputError(
            f"is no readable picture ({error})", where=path, fix="save it as PNG"
        ) from error
    if values.ndim == 3:
        colours = values[..., :-1] if has_alpha else values
        if (colours != colours[..., :1]).any():
            raise InputError(
                "is coloured, so its values name nothing",
                where=path,
                fix="save it as grey values or with a palette",
            )
        values = colours[..., 0] if not has_alpha or np.ptp(colours) else values[..., -1]
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise InputError("holds values that are no numbers", where=path, fix="save it again")
        if (values % 1).any() and 0 <= values.min() and values.max() <= 1:
            return values * VOID, True
        values = np.round(values)
    values = values.astype(int)
    return values, is_jpeg or _is_soft(values)


def _is_soft(values):
    """Return whether values between 0 and the largest change from pixel to pixel, as on edges."""
    between = (values > 0) & (values < values.max())
    if len(np.unique(values)) < 4 or values.max() <= HALF:
        return False
    same = np.zeros(values.shape, dtype=bool)
    same[:, 1:] |= values[:, 1:] == values[:, :-1]
    same[1:] |= values[1:] == values[:-1]
    return bool(same[between].mean() < 0.5)


def _objects_of(mask, objects):
    """Divide the pixels of one value into the run lengths of its objects."""
    if objects != "components":
        return [mask_to_rle(mask)]
    labels, count = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
    return [mask_to_rle(labels == number) for number in range(1, count + 1)]
