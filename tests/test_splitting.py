import numpy as np
import pytest
from builders import write_image
from PIL import Image

from helpers.convert.division import divide, name_groups, scene_groups, split_source
from helpers.convert.source import SourceImage
from helpers.errors import InputError


def grouped(*stems):
    """Return the sets of stems that share a group."""
    groups, _ = name_groups(stems)
    found = {}
    for stem, group in zip(stems, groups, strict=True):
        found.setdefault(group, set()).add(stem)
    return sorted(found.values(), key=sorted)


def test_augmented_copies_of_roboflow_are_one_scene():
    stems = [
        f"{name}_jpg.rf.{digest}" for name in ("IMG_1", "IMG_2") for digest in ("0a1b", "ffZ9")
    ]
    assert grouped(*stems) == [set(stems[:2]), set(stems[2:])]


def test_numbered_tiles_and_frames_are_one_scene():
    stems = ["a_3_1", "a_3_2", "a_4_1", "tunnel_frame_001", "tunnel_frame_2", "bridge_frame_001"]
    assert grouped(*stems) == [
        {"a_3_1", "a_3_2"},
        {"a_4_1"},
        {"bridge_frame_001"},
        {"tunnel_frame_001", "tunnel_frame_2"},
    ]


def test_running_numbers_alone_say_nothing():
    stems = ["IMG_0001", "IMG_0002", "0003", "wall (4)", "wall (5)", "crack"]
    assert len(grouped(*stems)) == len(stems)


def test_a_clip_that_is_nearly_everything_is_cut_into_runs():
    stems = [f"clip_frame_{number:03d}" for number in range(100)]
    groups, notes = name_groups(stems)
    assert len(set(groups)) == 10
    numbers = [
        [int(s[-3:]) for s, g in zip(stems, groups, strict=True) if g == run] for run in set(groups)
    ]
    assert all(max(run) - min(run) == 9 for run in numbers)
    assert "100 images" in notes[0]


def test_groups_join_by_looks_and_names(tmp_path):
    paths = [write_image(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate("abcd")]
    with Image.open(paths[0]) as image:
        image.save(tmp_path / "copy_1_1.jpg", quality=60)
    paths += [tmp_path / "copy_1_1.jpg", write_image(tmp_path / "copy_1_2.png", seed=9)]
    labels, notes = scene_groups(paths)
    assert labels[0] == labels[4] == labels[5]
    assert len(set(labels)) == 4
    assert "6 images form 4 scenes" in notes[0]


def test_groups_stay_whole_and_shares_are_kept():
    labels = np.repeat(np.arange(60), np.random.default_rng(0).integers(1, 6, 60))
    chosen = divide(labels, (0.8, 0.1, 0.1), seed=0)
    for label in set(labels):
        assert len(set(chosen[labels == label])) == 1
    np.testing.assert_allclose(np.bincount(chosen) / len(labels), (0.8, 0.1, 0.1), atol=0.03)
    assert (divide(labels, (0.8, 0.1, 0.1), seed=0) == chosen).all()
    assert (divide(labels, (0.8, 0.1, 0.1), seed=1) != chosen).any()


def source_of(tmp_path, count):
    paths = [write_image(tmp_path / f"{number}.png", seed=number) for number in range(count)]
    return {"all": [SourceImage(path, 96, 64, ()) for path in paths]}


def test_a_source_is_divided_completely(tmp_path):
    source = source_of(tmp_path, 10)
    splits, notes = split_source(source, (0.6, 0.2, 0.2), seed=3)
    assert [len(images) for images in splits.values()] == [6, 2, 2]
    assert sorted(i.path for images in splits.values() for i in images) == sorted(
        i.path for i in source["all"]
    )
    assert notes == []


@pytest.mark.parametrize("shares", [(0.8,), (0.8, 0.3), (1.2, -0.2), (0, 1), (0.4, 0.3, 0.2, 0.1)])
def test_impossible_shares_are_refused(tmp_path, shares):
    with pytest.raises(InputError, match="add up to 1|not of train"):
        split_source(source_of(tmp_path, 3), shares, seed=0)


def test_a_split_that_would_be_empty_is_refused(tmp_path):
    with pytest.raises(InputError, match="leave none for 'test'"):
        split_source(source_of(tmp_path, 2), (0.5, 0.5 - 1e-9, 1e-9), seed=0)
