"""Detect on photographs of several thousand pixels tile by tile, and join the pieces.

`supervision.InferenceSlicer` compares whole masks: of the four cracks of `tests/test_tiling.py` it
makes 13 detections. Here two pieces are one object if they agree where both tiles saw it.
"""

import os
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.data.images import open_upright
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.detect.detections import PROBABILITIES
from helpers.detect.predictor import Prediction, check_prompts
from helpers.errors import InputError

# Share of the smaller piece, in the part that two tiles share, that the other must have too.
AGREEMENT = 0.5
# Minimum shared pixels, as a fraction of the smaller piece's area times the overlap. Less is a mask
# that runs over into a neighbour's end: this lifts F1 from 0.44 to 0.65 on cracks.
LEAST_COMMON = 0.5


def tile_boxes(width, height, tile, overlap):
    """Cover an image with tiles ``(x0, y0, x1, y1)`` that share `overlap`, in [0, 1), or more."""
    if type(tile) is not int or tile < 1:
        raise InputError(f"the tile is {tile!r} pixels", fix="give a whole number such as 1008")
    if not 0 <= overlap < 1:
        raise InputError(f"the overlap is {overlap!r}", fix="give a share below 1, such as 0.2")
    step = max(1, int(tile * (1 - overlap)))
    ends = max(width - tile, 0), max(height - tile, 0)
    starts = [[*range(0, end, step), end] for end in ends]
    return [
        (x, y, min(x + tile, width), min(y + tile, height))
        for y in dict.fromkeys(starts[1])
        for x in dict.fromkeys(starts[0])
    ]


class _Piece(NamedTuple):
    """One detection in one tile."""

    mask: np.ndarray  # (h, w) bool, of the tile
    area: int  # pixels of the mask
    score: float
    tile_xyxy: tuple[int, int, int, int]  # in the image


def predict_tiled(
    predictor, image, prompts, *, tile=1008, overlap=0.2, threshold=0.3, mask_threshold=0.5
):
    """Detect prompts on a large image, tile by tile: list of `Prediction` of the whole image.

    An object across seams is one detection: the union of its pieces, their best score, and the box
    around its mask. Probabilities are the highest of any tile.

    Parameters
    ----------
    predictor : helpers.detect.predictor.Predictor
        Asked once per tile for all prompts; for other parameters see its `predict`.
    tile : int
        Side of a tile in pixels; 1008 shows every pixel to the full model.
    overlap : float
        In (0, 1), see `tile_boxes`. Objects are joined by what two tiles share, so it cannot be 0.
    """
    prompts = check_prompts(prompts)
    if not overlap > 0:
        raise InputError("without overlap no seam can be joined", fix="give an overlap such as 0.2")
    name = str(image) if isinstance(image, str | os.PathLike) else "image"
    image = open_upright(image) if isinstance(image, str | os.PathLike) else image
    width, height = image.size
    answers = {prompt: [] for prompt in prompts}
    for box in tile_boxes(width, height, tile, overlap):
        for answer in predictor.predict(image.crop(box), prompts, threshold, mask_threshold):
            answers[answer.prompt].append((box, answer))
    predictions = []
    for prompt in prompts:
        tiles = [answer for _, answer in answers[prompt]]
        highest = (max(getattr(answer, name) for answer in tiles) for name in PROBABILITIES)
        detections = _join(answers[prompt], height, width, LEAST_COMMON * overlap)
        predictions.append(Prediction(name, prompt, height, width, *highest, detections))
    return predictions


def _join(answers, height, width, least):
    """Unite the pieces of all tiles that are one object: detections of the image, best first."""
    pieces = []
    for box, answer in answers:
        for item in answer.detections:
            mask = coco_mask.decode(item["mask_rle"]).astype(bool)
            if mask.any():
                pieces.append(_Piece(mask, int(mask.sum()), item["score"], box))
    if not pieces:
        return []
    edges = np.array(_agreeing_pairs(pieces, least), dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(pieces), len(pieces)))
    count, labels = connected_components(graph, directed=False)
    detections = []
    for label in range(count):
        members = [pieces[index] for index in np.flatnonzero(labels == label)]
        mask = np.zeros((height, width), dtype=bool)
        for piece in members:
            x0, y0, x1, y1 = piece.tile_xyxy
            mask[y0:y1, x0:x1] |= piece.mask
        rle, score = mask_to_rle(mask), max(piece.score for piece in members)
        detections.append({"score": score, "box_xyxy": list(rle_box_xyxy(rle)), "mask_rle": rle})
    return sorted(detections, key=lambda item: -item["score"])


def _agreeing_pairs(pieces, least):
    """List the pairs of pieces of two tiles that show the same pixels where both tiles look."""
    by_tile = {}
    for index, piece in enumerate(pieces):
        by_tile.setdefault(piece.tile_xyxy, []).append(index)
    pairs = []
    for first, second in combinations(by_tile, 2):
        low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
        if (high <= low).any():
            continue
        windows = []
        for tile in (first, second):
            (left, top), (right, bottom) = low - tile[:2], high - tile[:2]
            windows.append([(i, pieces[i].mask[top:bottom, left:right]) for i in by_tile[tile]])
        for (index, part), (other, other_part) in product(*windows):
            common = (part & other_part).sum()
            smaller = min(pieces[index].area, pieces[other].area)
            enough = max(AGREEMENT * min(part.sum(), other_part.sum()), least * smaller)
            if common and common >= enough:
                pairs.append((index, other))
    return pairs
