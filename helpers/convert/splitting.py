"""Divide images into training, validation and test so that no scene is in two of them."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.data.images import near_pairs, open_upright, picture_hash
from helpers.errors import InputError
from helpers.files import progress_bar

NAMES = ("train", "valid", "test")
ROBOFLOW = re.compile(r"(?:_(?:jpe?g|png|bmp|webp|tiff?))?\.rf\.[0-9A-Za-z]+$")
LAST_NUMBER = re.compile(r"^(.*?)[ _.\-()]*(\d+)\D*$")
LARGEST = 0.5  # share of the images from which a group is cut into runs of neighbours
RUNS = 10  # that such a group is cut into, in the order of its last number


def name_groups(stems):
    """Give names of one scene equal groups; return (list of str, notes on scenes that were cut).

    Roboflow's ``.rf.<hash>`` is what tells augmented copies apart and is ignored. Of names that keep
    a number or the word "frame" without their last number, as ``wall_3_17`` or ``bridge_frame_0040``
    do, the rest is the scene. Names such as ``IMG_0040`` say nothing. A scene of more than half of
    all images is cut into runs of neighbouring numbers, whose borders may still be alike.
    """
    plain = [ROBOFLOW.sub("", stem) for stem in stems]
    matches = [LAST_NUMBER.match(stem) for stem in plain]
    groups = [
        match[1]
        if match and (re.search(r"\d", match[1]) or "frame" in match[1].casefold())
        else stem
        for match, stem in zip(matches, plain, strict=True)
    ]
    notes = []
    for name, count in Counter(groups).items():
        if count > LARGEST * len(stems) and len(set(plain)) > 1:
            members = [index for index, group in enumerate(groups) if group == name]
            order = sorted({plain[index] for index in members}, key=lambda s: _last_number(s))
            run_of = {stem: rank * RUNS // len(order) for rank, stem in enumerate(order)}
            for index in members:
                groups[index] = f"{name}, run {run_of[plain[index]]}"
            notes.append(f"'{name}' names {count} images and was cut into {RUNS} runs")
    return groups, notes


def _last_number(stem):
    """Return the last number in a name, 0 without one."""
    match = LAST_NUMBER.match(stem)
    return int(match[2]) if match else 0


def scene_groups(paths):
    """Label images (n,) int so that those of one name group or alike share a label, and say how many.

    Each image is opened. Images linked by others share a label, too.
    """
    groups, notes = name_groups([path.stem for path in paths])
    hashes = np.empty((len(paths), 32), dtype=np.uint8)
    with progress_bar(len(paths), "comparing images") as bar:
        for index, path in enumerate(paths):
            hashes[index] = picture_hash(open_upright(path))
            bar.update()
    first_of = {}
    by_name = [(index, first_of.setdefault(group, index)) for index, group in enumerate(groups)]
    by_look = near_pairs(hashes, hashes)
    edges = np.concatenate([np.array(by_name).reshape(-1, 2), by_look])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(paths), len(paths)))
    count, labels = connected_components(graph, directed=False)
    if count < len(paths):
        notes.append(f"{len(paths)} images form {count} scenes, each kept in one split")
    return labels, notes


def divide(labels, shares, seed):
    """Return the split (n,) int of each image, so that whole groups come close to the shares.

    Large groups are placed first, each into the split that lacks most; `seed` orders equal ones.
    """
    sizes = np.bincount(labels)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    lacking = np.array(shares, dtype=float) * len(labels)
    split_of_group = np.empty(len(sizes), dtype=int)
    for group in order:
        split_of_group[group] = np.argmax(lacking)
        lacking[split_of_group[group]] -= sizes[group]
    return split_of_group[labels]


def split_source(splits, shares, seed):
    """Divide the images of all splits anew by shares of train, valid and, if there are three, test.

    Return the new splits (one of share 0 is left out) and notes. Equal seeds give equal splits. Shares
    that do not add up to 1, or leave a split empty, raise InputError.
    """
    shares = list(shares)
    if (
        len(shares) not in (2, 3)
        or min(shares) < 0
        or not abs(sum(shares) - 1) <= 1e-6
        or not shares[0]
    ):
        raise InputError(
            f"the shares {shares} are not of train, valid and test",
            fix="give numbers that add up to 1, for example --split 0.8 0.1 0.1",
        )
    images = [image for name in splits for image in splits[name]]
    labels, notes = scene_groups([image.path for image in images])
    split_indices = divide(labels, shares, seed)
    result = {}
    for index, (name, share) in enumerate(zip(NAMES, shares, strict=False)):
        members = [
            image for image, split in zip(images, split_indices, strict=True) if split == index
        ]
        if share and not members:
            raise InputError(
                f"{len(images)} images in {labels.max() + 1} scenes leave none for '{name}'",
                fix="give a larger share, or divide the images by hand",
            )
        if members:
            result[name] = members
    return result, notes
