"""Read folders of images and mask pictures: binary, one value per class, or one per instance."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from helpers.convert import source
from helpers.data.images import IMAGE_SUFFIXES
from helpers.data.masks import mask_to_rle
from helpers.errors import InputError, explain
from helpers.files import progress_bar

IMAGE_FOLDERS = ("images", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ground_truth", "gt")
MASK_FOLDERS += ("segmentationobject", "segmentationclass")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
MASK_NAMES = ("{}", "{}_mask", "{}-mask", "{}_masks", "{}_seg", "{}_segmentation", "{}_label")
MASK_NAMES += ("{}_labels", "{}_labelIds", "{}_instanceIds", "{}_gt")
MASK_NAMES += ("mask_{}", "mask-{}", "seg_{}", "label_{}", "gt_{}")
CLASSES_FILE = "classes.txt"  # a name per line, for the values 1, 2, ...; `BACKGROUND` is for 0
BACKGROUND = ("background", "_background_")
# An object is a connected component of a class, all of it, or the pixels of one value.
OBJECTS = ("components", "whole", "values")
VOID = 255  # of pixels that belong to nothing, in Pascal VOC and others


def read_masks(root, category=None, objects="components"):
    """Read images that have a mask picture; without `CLASSES_FILE` it shows `category`."""
    if objects not in OBJECTS:
        raise InputError(f"objects is {objects!r}", fix=f"use one of {', '.join(OBJECTS)}")
    names = _names(root, category, objects)
    splits, masks, soft, bar = {}, {}, [], progress_bar(None, "reading masks")
    for split, folders in folder_pairs(root).items():
        splits[split] = []
        for path, mask_file in _pairs(*folders):
            bar.update()
            source.refuse_outside(mask_file, root)
            values, is_soft = _mask_values(mask_file)
            size = source.picture_size(path, root)
            if values.shape != size[::-1]:
                sides = f"{values.shape[1]} x {values.shape[0]}"
                message = f"is {sides} pixels, its image {size[0]} x {size[1]}"
                raise InputError(message, where=mask_file, fix="save the mask at the image's size")
            if is_soft and (objects == "values" or len(names) > 1):
                message = "has soft edges, whose values are neither classes nor instances"
                fix = "save it without smoothing, or leave --objects values out"
                raise InputError(message, where=mask_file, fix=fix)
            if is_soft:
                soft.append(mask_file.name)
                values = (values > VOID // 2) * VOID
            present = [int(value) for value in np.unique(values) if value]
            masks[mask_file] = {value: _objects_of(values == value, objects) for value in present}
            splits[split].append(source.SourceImage(path, *size, (), {}, (mask_file,)))
    bar.close()
    notes = source.note_of(soft, "masks have soft edges, cut at half")
    notes += source.note_of_doubles(names.values())
    names = _names_of_values(names, masks, objects, bool(soft), notes)
    for images in splits.values():
        for index, image in enumerate(images):
            objects = [
                {"category": names[value], "segmentation": rle, "iscrowd": 0}
                for value, rles in masks[image.files[0]].items()
                for rle in (rles if value in names else ())
            ]
            images[index] = replace(image, objects=tuple(objects))
    files = [root / CLASSES_FILE] if category is None else []
    return source.Source("masks", splits, source.numbered(names.values()), notes, files)


def folder_pairs(root):
    """Map each split to its folders of images and of masks; without both folders no split."""
    pairs = {}
    for split, folder in source.split_folders(root).items():
        images = source.folder_named(folder, *IMAGE_FOLDERS)
        places = [source.folder_named(folder, name) for name in MASK_FOLDERS]
        masks = [place for place in places if place and source.files_below(place, MASK_SUFFIXES)]
        if images and masks:
            inner_images, inner_masks = source.split_folders(images), source.split_folders(masks[0])
            if split == source.WHOLE and inner_images.keys() == inner_masks.keys():
                pairs |= {name: (path, inner_masks[name]) for name, path in inner_images.items()}
            else:
                pairs[split] = (images, masks[0])
    return pairs


def _pairs(image_folder, mask_folder):
    """List the images that have a mask, with it."""
    images = source.by_stem(image_folder, IMAGE_SUFFIXES)
    masks = source.by_stem(mask_folder, MASK_SUFFIXES)
    pairs = []
    for path in images.values():
        place, names = path.relative_to(image_folder), [n.format(path.stem) for n in MASK_NAMES]
        stems = [place.with_name(name).as_posix() for name in names]
        pairs += [(path, masks[stem]) for stem in stems if stem in masks][:1]
    if images and not pairs:
        message = f"there is no mask for {next(iter(images.values())).name}"
        fix = "give each mask the name of its image, or that with _mask"
        raise InputError(message, where=mask_folder, fix=fix)
    return pairs


def _names(root, category, objects):
    """Map mask values to names; a single name under None means any foreground."""
    path = root / CLASSES_FILE
    if category is not None and category.strip():
        return {None: category.strip()}
    if category is not None or not path.is_file():
        fix = f"give --category crack, or write {CLASSES_FILE} with a name per line"
        raise InputError("mask pictures do not say what they show", where=root, fix=fix)
    if objects == "values":
        fix = "give --category in place of the file, or another --objects"
        raise InputError("values cannot be classes and instances at once", where=path, fix=fix)
    names = [line.strip() for line in source.read_text(path).splitlines()]
    first = 0 if names and names[0].casefold() in BACKGROUND else 1
    names_of_values = {value: name for value, name in enumerate(names, first) if value and name}
    if not names_of_values:
        raise InputError("names no class", where=path, fix="write one name per line")
    return names_of_values


def _names_of_values(names, masks, objects, has_soft, notes):
    """Map each value in the masks that is an object to its name."""
    values, is_named = {value for rles in masks.values() for value in rles}, None not in names
    if len(names) == 1 and values <= ({1, VOID} if has_soft else {VOID}):
        return dict.fromkeys(values | {1}, *names.values())
    if VOID in values and VOID not in names and VOID - 1 not in values:
        alone = [mask_file for mask_file, rles in masks.items() if set(rles) == {VOID}]
        if alone:
            message = f"holds only the value {VOID}, which stands beside others in other masks"
            raise InputError(message, where=alone[0], fix="save all masks with the same values")
        notes.append(f"the value {VOID} is void in mask pictures and belongs to nothing")
        values.remove(VOID)
    for mask_file, rles in masks.items():
        present = sorted(values & rles.keys())
        unnamed = [value for value in present if is_named and value not in names]
        if unnamed:
            message = f"holds the value {unnamed[0]}, which {CLASSES_FILE} does not name"
            raise InputError(message, where=mask_file, fix=f"add its name as line {unnamed[0]}")
        if not is_named and objects != "values" and len(present) > 1:
            message = f"holds {len(present)} values beside 0, which are not named"
            fix = f"name classes in {CLASSES_FILE}, or give --objects values for instances"
            raise InputError(message, where=mask_file, fix=fix)
    return names if is_named else dict.fromkeys(values, names[None])


def _mask_values(path):
    """Read a mask picture as whole numbers, a palette's as indices; and whether edges are soft."""
    # Pillow raises another type for each way a file can be broken.
    broken = explain(Exception, "is no readable picture", where=path, fix="save it as PNG")
    with broken, Image.open(path) as picture:
        is_jpeg, has_alpha = picture.format == "JPEG", picture.mode in ("LA", "RGBA")
        num_frames, picture = getattr(picture, "n_frames", 1), ImageOps.exif_transpose(picture)
        values = np.array(picture.convert("L") if is_jpeg else picture)
    if num_frames > 1:
        message = f"holds {num_frames} frames or pages, and one would be read"
        raise InputError(message, where=path, fix="save what they show as one picture")
    if values.ndim == 3:
        colours = values[..., :-1] if has_alpha else values
        if (colours != colours[..., :1]).any():
            message = "is coloured, so its values name nothing"
            raise InputError(message, where=path, fix="save it as grey values or with a palette")
        values = values[..., -1] if has_alpha and not np.ptp(colours) else colours[..., 0]
    if not np.isfinite(values).all() or values.min() < 0:
        raise InputError("holds values that number nothing", where=path, fix="save it as PNG")
    if (values % 1).any() and values.max() <= 1:  # shares of 255
        return values * VOID, True
    values = np.round(values).astype(int)
    return values, is_jpeg or _is_soft(values)


def _is_soft(values):
    """Return whether values below the largest have others beside them, as on a soft edge."""
    if values.max() <= VOID // 2 or len(np.unique(values)) < 4:
        return False
    is_beside = np.zeros(values.shape, dtype=bool)
    for cells, flags in ((values, is_beside), (values.T, is_beside.T)):
        differ = (cells[1:] != cells[:-1]) & (cells[1:] > 0) & (cells[:-1] > 0)
        flags[1:] |= differ
        flags[:-1] |= differ
    return bool(is_beside[(values > 0) & (values < values.max())].mean() > 0.5)


def _objects_of(mask, objects):
    """Divide the pixels of one value into the run lengths of its objects."""
    if objects != "components":
        return [mask_to_rle(mask)]
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))  # 8 neighbours touch
    return [mask_to_rle(labels == number) for number in range(1, count + 1)]
