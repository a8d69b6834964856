"""Run lengths are read exactly, and thin objects survive on the model's grid."""

import numpy as np
import pytest
from builders import segmentation_of

from helpers.data.masks import compressed_runs, masks_on_grid


def test_compressed_runs_equal_pycocotools():
    masks = (
        np.random.default_rng(0).random((20, 40, 30)) < np.linspace(0.02, 0.98, 20)[:, None, None]
    )
    for mask in masks.astype(np.uint8):
        counts = segmentation_of(mask, "rle")["counts"]
        assert compressed_runs(counts) == segmentation_of(mask, "runs")["counts"]


def test_thin_objects_survive_on_the_grid():
    line, disc = np.zeros((200, 300), np.uint8), np.zeros((200, 300), np.uint8)
    line[100:102] = 1  # two pixels high, a cell is 5 pixels high
    disc[50:150, 100:200] = 1
    rles = [segmentation_of(mask, "rle") for mask in (line, disc, np.zeros_like(line))]
    masks = masks_on_grid(rles, 40)
    assert masks.shape == (3, 40, 40)
    assert masks[0].any(dim=0).all()
    assert masks[0].sum(dim=0).max() <= 2
    assert masks[1].sum() / 1600 == pytest.approx(100 * 100 / (200 * 300), abs=0.02)
    assert not masks[2].any()
    assert masks_on_grid([], 16).shape == (0, 16, 16)
