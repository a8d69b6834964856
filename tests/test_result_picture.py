"""The picture of the README is made from two run folders, by a rule and not by hand."""

import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny_random import save_tiny_base, tiny_run_config, write_dataset

from helpers import result_picture
from helpers.annotations import read_split
from helpers.errors import InputError
from helpers.paths import WALL_CRACKS
from helpers.result_picture import FAILING_RUN, FIXED_RUN, choose_record, main, save_small_png
from helpers.training import train


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    root = tmp_path_factory.mktemp("course")
    base, data = save_tiny_base(root / "base"), write_dataset(root / "data")
    train(tiny_run_config(base, data), output_dir=root / FIXED_RUN, progress=False)
    shutil.copytree(root / FIXED_RUN, root / FAILING_RUN)
    return root


def test_draws_annotation_and_both_runs(course, tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(
        result_picture, "save_small_png", lambda figure, path: figures.append((figure, path)) or 7
    )
    assert main(["--course", str(course), "--output", str(tmp_path / "out.png")]) == 0
    [(figure, path)] = figures
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert path == tmp_path / "out.png"
    assert len(titles) == 3
    assert titles[0].startswith("annotated: ")
    assert titles[1].startswith("failing run: ")
    assert "max score" in titles[2]
    assert "test_0.png, 7 bytes" in capsys.readouterr().out


def test_unfinished_course_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["--course", str(tmp_path), "--output", str(tmp_path / "out.png")]) == 2
    assert "failing_run" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_image_with_something_else_on_it_is_preferred():
    split = read_split(WALL_CRACKS, "test")
    chosen = choose_record(split)
    assert chosen.objects
    assert chosen.contents
    earlier = split.records[: split.records.index(chosen)]
    assert not any(record.objects and record.contents for record in earlier)


def test_split_without_objects_is_refused(tmp_path):
    split = read_split(write_dataset(tmp_path, sizes=(("test", 1),)), "test")
    with pytest.raises(InputError, match="no image has an object"):
        choose_record(split)


def test_file_keeps_to_its_size_and_its_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    figure = Figure(figsize=(3, 3))
    figure.add_axes((0, 0, 1, 1)).imshow(noise)
    size = save_small_png(figure, tmp_path / "folder" / "out.png", max_bytes=90_000)
    written = tmp_path / "folder" / "out.png"
    assert size == written.stat().st_size <= 90_000
    with Image.open(written) as picture:
        assert picture.size == (300, 300)
    with pytest.raises(InputError, match="bytes"):
        save_small_png(figure, tmp_path / "never.png", max_bytes=1_000)
    assert not (tmp_path / "never.png").exists()
