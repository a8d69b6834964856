"""Faults of the data: in annotation files and images, and on the way from there to the loss."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torchvision.ops import box_convert

from helpers import annotations, targets, wrong_reader
from helpers.broken_copies import (
    boxes_as_corners,
    boxes_as_fractions,
    mark_as_crowd,
    remove_objects,
    rename_key,
)
from helpers.planting import Fault, replaced, replaced_method
from helpers.spoiled_data import (
    KEEP_EVERY,
    SHRINK,
    cut_image_off,
    halve_masks,
    in_every_file,
    leave_most_out,
    number_from_zero,
    orient_images,
    remove_half,
    rename_images,
    shrink_all,
    thin_boxes,
    turn_images,
)

SHORT = ("scale.num_epochs=0.04",)
"""Two epochs of the 50 that the config asks for: enough for what is counted, not learned."""


def _targets_changed(change):
    """Return a patch that lets ``change`` modify the targets of each query."""

    @contextmanager
    def patch():
        original = targets.object_targets

        def object_targets(*args):
            return change(original(*args))

        with replaced("targets.object_targets", object_targets):
            yield

    return patch


def _without_masks(made):
    lost = {name: torch.zeros_like(made[name]) for name in ("masks", "mask_valid")}
    return made | lost


def _without_objects(made):
    return {name: values[:0] for name, values in made.items()}


def _with_corners(made):
    return made | {"boxes_cxcywh": box_convert(made["boxes_cxcywh"], "cxcywh", "xyxy")}


def _with_nan(made):
    return made | {"boxes_cxcywh": made["boxes_cxcywh"] * float("nan")}


@contextmanager
def _wrong_keys():
    """Put the reader of the failing script in the place of ours, on which it builds."""
    right = annotations.read_split
    with (
        replaced("annotations.read_split", wrong_reader.read_split_wrong_keys),
        replaced_method(wrong_reader, "read_split", right),
    ):
        yield


DATA_FAULTS = {
    "wrong keys": Fault(
        "no_objects",
        "objects are looked up under JSON keys that nobody writes, and a missing key is no error",
        "no error; box and mask terms of the loss are 0; every score falls to 0.000",
        settings=SHORT,
        patch=_wrong_keys,
    ),
    "empty lists": Fault(
        "no_objects",
        "the list of objects is empty in every file",
        "the same, and a look into the files shows it",
        settings=SHORT,
        spoil_data=in_every_file(remove_objects),
    ),
    "masks swallowed": Fault(
        "masks_lost",
        "an error while decoding masks is swallowed: boxes stay, masks are zero",
        "boxes are found, their masks stay empty or shapeless; the mask terms of the loss are 0",
        settings=SHORT,
        patch=_targets_changed(_without_masks),
    ),
    "all crowd": Fault(
        "objects_filtered",
        "iscrowd is 1 on every object, as some tools write for run lengths",
        "the files are full, and no object reaches the loss",
        settings=SHORT,
        spoil_data=in_every_file(mark_as_crowd),
    ),
    "emptied by a transform": Fault(
        "objects_filtered",
        "a transform after loading drops the objects and leaves their prompt in the batch",
        "presence falls on the very images that show the object",
        settings=SHORT,
        patch=_targets_changed(_without_objects),
    ),
    "corners in the file": Fault(
        "boxes_off_masks",
        "boxes are written as [x0, y0, x1, y1] where [x, y, width, height] is read",
        "the loss looks sane, boxes reach too far right and down",
        settings=SHORT,
        spoil_data=in_every_file(boxes_as_corners),
    ),
    "YOLO boxes": Fault(
        "boxes_off_masks",
        "boxes are centres and sizes as fractions of the image, as YOLO writes them",
        "boxes shrink into the upper left corner",
        settings=SHORT,
        spoil_data=in_every_file(boxes_as_fractions),
    ),
    "corners as targets": Fault(
        "wrong_box_targets",
        "the dataset gives corners where the loss expects centre and size, all within [0, 1]",
        "the loss looks sane, boxes deviate, box AP stays low while masks are right",
        settings=SHORT,
        patch=_targets_changed(_with_corners),
    ),
    "images turned": Fault(
        "annotations_off_image",
        "images were turned by 90 degrees after they had been annotated",
        "objects are found where nothing is, or not at all; every number in the files is sane",
        settings=SHORT,
        spoil_data=turn_images,
    ),
    "orientation ignored": Fault(
        "annotations_off_image",
        "images carry an EXIF orientation that the annotation tool ignored",
        "the same; a viewer shows the images turned",
        settings=SHORT,
        spoil_data=orient_images,
    ),
    "thin boxes": Fault(
        "not_finite",
        "every box is a fifth of a pixel wide",
        "GIoU divides by almost nothing; boxes collapse to lines",
        settings=SHORT,
        spoil_data=in_every_file(thin_boxes),
    ),
    "NaN targets": Fault(
        "not_finite",
        "boxes are divided by a width of 0, which gives NaN",
        "the training stops at the first batch, or goes on with a loss of NaN",
        settings=SHORT,
        patch=_targets_changed(_with_nan),
    ),
    "images renamed": Fault(
        "unreadable_data",
        "an upload renamed the images, the annotations name the old files",
        "the training does not start, or every image is skipped silently",
        spoil_data=rename_images,
        trains=False,
    ),
    "image cut off": Fault(
        "unreadable_data",
        "one image file was not copied to its end",
        "the training stops in the middle of an epoch",
        spoil_data=cut_image_off,
        trains=False,
    ),
    "ids from zero": Fault(
        "unreadable_data",
        "objects number the categories from 0, the table from 1",
        "the training does not start, or every object has the name of another category",
        spoil_data=in_every_file(number_from_zero),
        trains=False,
    ),
    "key renamed": Fault(
        "unreadable_data",
        "the list of objects is called 'objects' and not 'annotations'",
        "the training does not start, or sees no object at all",
        spoil_data=in_every_file(rename_key),
        trains=False,
    ),
    "masks at half size": Fault(
        "unreadable_data",
        "masks were drawn on a copy of half the size",
        "no mask fits its image, no outline is learned",
        settings=SHORT,
        spoil_data=in_every_file(halve_masks),
    ),
    "half the labels": Fault(
        "labels_missing",
        "every second object was not annotated, in all splits",
        "scores stay around a half, where the object is annotated and where it is not",
        spoil_data=in_every_file(remove_half),
    ),
    "seen from afar": Fault(
        "tiny_objects",
        f"every picture is {SHRINK} times smaller, on a plain wall",
        "no score rises; the objects are less than two cells of the mask grid wide",
        settings=SHORT,
        spoil_data=shrink_all,
    ),
    "hardly any object": Fault(
        "mostly_empty",
        f"of the training images with objects one in {KEEP_EVERY} is kept, of those without all",
        "presence stays low everywhere",
        spoil_data=leave_most_out,
    ),
}
"""Name to fault."""
