"""The renderer: what it paints is what it says it painted."""

import numpy as np
import pytest

from data.wall_cracks.make_painters import PAINTERS, RENDER_SIZE
from data.wall_cracks.make_scenes import (
    BASE_CONCEPTS,
    MIN_VISIBLE_SHARE,
    draw_concepts,
    render_scene,
)


def test_base_concepts_leave_out_the_crack():
    assert "crack" in PAINTERS
    assert set(BASE_CONCEPTS) == set(PAINTERS) - {"crack"}


@pytest.mark.parametrize("concept", PAINTERS)
def test_painting_changes_the_picture_where_the_mask_is(concept):
    bare = render_scene(np.random.default_rng(3), [])
    scene = render_scene(np.random.default_rng(3), [concept])
    (item,) = scene.objects
    changed = np.abs(scene.image.astype(int) - bare.image).sum(-1)
    assert item.concept == concept
    assert item.mask.shape == (RENDER_SIZE, RENDER_SIZE)
    assert changed[item.mask].mean() > 4 * changed[~item.mask].mean()


def test_same_seed_same_scene():
    names = ["stain", "bolt", "crack"]
    first, second = (render_scene(np.random.default_rng(5), names) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert all(
        np.array_equal(a.mask, b.mask) for a, b in zip(first.objects, second.objects, strict=True)
    )


def test_empty_wall_has_no_objects():
    scene = render_scene(np.random.default_rng(0), [])
    assert scene.objects == ()
    assert scene.concepts == frozenset()


def test_visible_masks_never_overlap_and_boxes_are_tight():
    rng = np.random.default_rng(11)
    for _ in range(12):
        scene = render_scene(rng, draw_concepts(rng, BASE_CONCEPTS, (3, 5)))
        assert sum(item.mask.astype(int) for item in scene.objects).max() <= 1
        for item in scene.objects:
            x0, y0, x1, y1 = item.box_xyxy
            assert item.mask[y0:y1, x0:x1].sum() == item.mask.sum()
            assert item.mask[y0].any()
            assert item.mask[:, x1 - 1].any()


def test_a_covered_object_is_taken_off_the_list():
    counts = []
    for seed in range(30):
        names = ["hole"] * 3 + ["crack"] * 4
        scene = render_scene(np.random.default_rng(seed), names)
        counts.append(len(scene.objects))
        assert all(item.mask.sum() > 0 for item in scene.objects)
    assert 0 < MIN_VISIBLE_SHARE < 1
    assert min(counts) < 7


def test_draw_concepts_keeps_painting_order_and_bounds():
    rng = np.random.default_rng(2)
    order = list(PAINTERS)
    for _ in range(50):
        names = draw_concepts(rng, BASE_CONCEPTS, (1, 4))
        assert names == sorted(names, key=order.index)
        assert 1 <= len(set(names)) <= 4
        assert max(names.count(noun) for noun in names) <= 3
        assert names.count("joint") <= 1
