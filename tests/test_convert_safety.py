"""Whatever happens, a conversion changes nothing that is there and takes nothing from outside."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from builders import DATASET, coco_of, edit_coco, mask_of, write_coco, write_image, write_per_image
from PIL import Image
from source_builders import write_with_supervision

from helpers.convert import conversion as module
from helpers.convert.conversion import convert
from helpers.data.coco import read_split
from helpers.errors import InputError

SQUARE = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75"


def digests(root):
    return {
        path: (hashlib.md5(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_yolo(root, yaml, *images):
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(f"names: [crack]\n{yaml}")
    for image in images:
        path = write_image(root / image, seed=len(image))
        label = root / image.replace("images", "labels")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.with_suffix(".txt").write_text(SQUARE)
        assert path.is_file()
    return root


def write_masks(root):
    write_image(root / "images" / "a.png")
    (root / "masks").mkdir()
    Image.fromarray(mask_of(8, 8, 16, 32) * np.uint8(255)).save(root / "masks" / "a.png")
    return root


WRITERS = {
    "coco": lambda root: write_coco(root / "src"),
    "per_image": lambda root: write_per_image(root / "src"),
    "masks": lambda root: write_masks(root / "src"),
    **{
        kind: lambda root, kind=kind: write_with_supervision(root, kind)
        for kind in ("yolo", "voc", "labelme")
    },
}


@pytest.mark.parametrize("options", [{}, {"split": (0.5, 0.5)}, {"tile": 48}])
@pytest.mark.parametrize("kind", WRITERS)
def test_no_source_is_changed_and_no_file_is_shared(tmp_path, kind, options):
    src = WRITERS[kind](tmp_path)
    if kind == "masks":
        options = {"category": "crack", **options} if "split" not in options else {"category": "x"}
    before = digests(src)
    convert(src, tmp_path / "dst", **options)
    for path in (tmp_path / "dst").rglob("*.png"):  # whoever edits the copy in place
        with path.open("r+b") as file:
            file.write(b"changed")
    assert digests(src) == before


@pytest.mark.parametrize("depth", ["", "day1/cam/"])
def test_two_exports_with_equal_names_are_both_there(tmp_path, depth):
    names = [f"{site}/{depth}train/images/{n}.png" for site in ("a", "b") for n in range(2)]
    folders = f"train: [a/{depth}train/images, b/{depth}train/images]\n"
    src = write_yolo(tmp_path / "src", folders, *names)
    before = digests(src)
    convert(src, tmp_path / "dst")
    assert digests(src) == before
    split = read_split(tmp_path / "dst", "train")
    written = {record.path.read_bytes() for record in split.records}
    assert len(split.records) == 4
    assert written == {(src / name).read_bytes() for name in names}
    assert all(len(record.objects) == 1 for record in split.records)


def test_names_differ_where_case_or_accents_do_not_count(tmp_path):
    names = ["a.png", "A.PNG", "x/y.png", "x_y.png", "z/x_y.png", "é.png", "e\u0301.png"]
    src = tmp_path / "src"
    write_json(src / "labels.json", coco_of({name: [] for name in names}))
    for seed, name in enumerate(names):
        write_image(src / name.replace("PNG", "png"), seed=seed).rename(src / name)
    convert(src, tmp_path / "dst")
    written = [record.image_id for record in read_split(tmp_path / "dst", "train").records]
    assert len({module.spelling(name) for name in written}) == len(names)


@pytest.fixture
def outside(tmp_path):
    write_image(tmp_path / "outside" / "private.png", seed=5)
    return tmp_path / "outside" / "private.png"


def refused(src, dst, *words, **options):
    """Convert, which must be refused in one line without leaving anything."""
    beside = set(dst.parent.iterdir())
    with pytest.raises(InputError) as error:
        convert(src, dst, **options)
    assert set(dst.parent.iterdir()) == beside
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", ["relative", "absolute", "link", "linked folder"])
def test_coco_images_outside_are_refused(tmp_path, outside, kind):
    src = write_coco(tmp_path / "src")
    name = {"relative": "../../outside/private.png", "absolute": str(outside)}.get(kind, "l/a.png")
    if kind == "link":
        (src / "train" / "l").mkdir()
        (src / "train" / "l" / "a.png").symlink_to(outside)
    if kind == "linked folder":
        outside.rename(outside.with_name("a.png"))
        (src / "train" / "l").symlink_to(outside.parent)
    edit_coco(src, "train", lambda c: c["images"][0].update(file_name=name))
    refused(src, tmp_path / "dst", "lies outside the source")


@pytest.mark.parametrize(
    "yaml",
    [
        "path: ../outside\ntrain: .\n",
        "train: ../outside\n",
        "train: {absolute}\n",
        "path: {absolute}\ntrain: .\n",
        "train: list.txt\n",
        "train: linked/images\n",
    ],
)
def test_yolo_images_outside_are_refused(tmp_path, outside, yaml):
    src = write_yolo(tmp_path / "src", yaml.format(absolute=outside.parent), "images/a.png")
    (src / "list.txt").write_text("images/a.png\n../outside/private.png\n")
    (src / "linked").mkdir()
    (src / "linked" / "images").symlink_to(outside.parent)
    refused(src, tmp_path / "dst", "lies outside the source")


@pytest.mark.parametrize("yaml", ["path: ../src\ntrain: images\n", "train: ../images\n"])
def test_yolo_paths_that_come_back_are_inside(tmp_path, yaml):
    src = write_yolo(tmp_path / "src", yaml, "images/a.png")
    assert convert(src, tmp_path / "dst")["splits"]["train"]["objects"] == 1


def test_label_files_and_masks_outside_are_refused(tmp_path, outside):
    src = write_yolo(tmp_path / "yolo", "train: images\n", "images/a.png")
    outside.with_name("a.txt").write_text(SQUARE)
    (src / "labels" / "a.txt").unlink()
    (src / "labels" / "a.txt").symlink_to(outside.with_name("a.txt"))
    refused(src, tmp_path / "dst", "lies outside the source")
    src = write_masks(tmp_path / "masks")
    (src / "masks" / "a.png").unlink()
    (src / "masks" / "a.png").symlink_to(outside)
    refused(src, tmp_path / "dst", "lies outside the source", category="crack")


@pytest.mark.parametrize("stated", ["../outside/private.png", "{absolute}"])
def test_label_tools_take_nothing_from_outside(tmp_path, outside, stated):
    stated = stated.format(absolute=outside)
    src = tmp_path / "src"
    write_image(src / "private.png", seed=1)
    write_json(src / "private.json", {"imagePath": stated, "shapes": []})
    refused(src, tmp_path / "dst", "lies outside the source")
    (src / "private.json").unlink()
    text = f"<annotation><filename>{stated}</filename></annotation>"
    (src / "private.xml").write_text(text)
    refused(src, tmp_path / "dst", "lies outside the source")


def test_what_is_no_image_is_never_placed(tmp_path):
    src = write_coco(tmp_path / "src")
    (src / "train" / "a.png").write_text("a secret")
    refused(src, tmp_path / "dst", "a.png", "is no readable image")
    (src / "train" / "a.png").unlink()
    (src / "train" / "a.png").mkdir()
    refused(src, tmp_path / "dst", "a.png", "is not there")


def test_the_destination_lies_outside_the_source(tmp_path):
    src = write_coco(tmp_path / "src")
    before = digests(src)
    for dst in (src, src / "new", src / "train" / "new"):
        with pytest.raises(InputError, match="inside the source|not empty"):
            convert(src, dst)
    with pytest.raises(InputError, match="not empty"):
        convert(src, tmp_path)
    assert digests(src) == before
    (tmp_path / "link").symlink_to(src)
    refused(src, tmp_path / "link" / "new", "lies inside the source")


def test_an_empty_destination_is_filled_and_stays_after_a_failure(tmp_path):
    src = write_coco(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    edit_coco(src, "test", lambda c: c["images"][0].update(file_name="missing.png"))
    refused(src, tmp_path / "dst", "missing.png")
    assert list((tmp_path / "dst").iterdir()) == []
    edit_coco(src, "test", lambda c: c["images"][0].update(file_name="g.png"))
    convert(src, tmp_path / "dst")
    convert(src, tmp_path / "new" / "deep" / "dst")
    assert {path.name for path in (tmp_path / "dst").iterdir()} == set(DATASET)


@pytest.mark.parametrize(("point", "name"), [(0, "SIGKILL"), (5, "SIGKILL"), (5, "SIGTERM")])
def test_a_killed_conversion_leaves_no_destination_and_can_be_repeated(tmp_path, point, name):
    src, dst = write_coco(tmp_path / "src"), tmp_path / "new" / "dst"
    place, paths = module._place, []

    def stop(path, target):
        if len(paths) == point:
            os.kill(os.getpid(), getattr(signal, name))
        paths.append(path)
        place(path, target)

    def run():
        module._place = stop
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `python -m helpers` does
        convert(src, dst)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM}[name]
    assert dst.parent.exists() is (name == "SIGKILL")
    assert not dst.exists()
    convert(src, dst)
    assert [path.name for path in dst.parent.iterdir()] == ["dst"]
    assert len(read_split(dst, "train").records) == 4


def test_of_two_at_once_one_is_written_whole_and_one_refused(tmp_path, monkeypatch):
    src = write_coco(tmp_path / "src")
    entered, leave = threading.Event(), threading.Event()
    place = module._place

    def wait(path, target):
        entered.set()
        assert leave.wait(60)
        place(path, target)

    monkeypatch.setattr(module, "_place", wait)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(convert, src, tmp_path / "dst")
        assert entered.wait(60)
        monkeypatch.setattr(module, "_place", place)
        convert(src, tmp_path / "dst")
        leave.set()
    with pytest.raises(
        InputError, match="dst: cannot be written.*not empty.* choose another folder"
    ):
        slow.result()
    assert [path.name for path in tmp_path.glob("*dst*")] == ["dst"]
    assert not list(tmp_path.glob(".partial*"))
    assert len(read_split(tmp_path / "dst", "train").records) == 4


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    src = write_coco(tmp_path / "src")
    own = tmp_path / ".partial-dst" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    convert(src, tmp_path / "dst")
    assert own.read_text() == "mine"


@pytest.mark.parametrize("owner", ["shutil.copyfileobj", "Path.write_text", "os.replace"])
@pytest.mark.parametrize(
    ("number", "text"), [(28, "No space left on device"), (30, "Read-only file system")]
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, owner, number, text):
    src = write_coco(tmp_path / "src")

    def fail(*args, **kwargs):
        raise OSError(number, text)

    monkeypatch.setattr(f"helpers.convert.conversion.{owner}", fail)
    refused(src, tmp_path / "dst", text)


def test_a_full_disk_among_the_tiles_is_one_line(tmp_path, monkeypatch):
    src = write_coco(tmp_path / "src")

    def fail(*args, **kwargs):
        raise OSError("encoder error -2 when writing image file")

    monkeypatch.setattr(Image.Image, "save", fail)
    refused(src, tmp_path / "dst", "encoder error", tile=48)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_rights_is_one_line(tmp_path):
    src = write_coco(tmp_path / "src")
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(src, tmp_path / "closed" / "dst", "Permission denied")


def test_names_and_paths_that_are_too_long_are_one_line(tmp_path):
    src = write_coco(tmp_path / "src")
    convert(src, tmp_path / ("d" * 255))
    refused(src, tmp_path / ("d" * 256), "File name too long")
    with pytest.raises(InputError, match="File name too long"):
        convert(src, tmp_path / "/".join(["d" * 200] * 25))
    edit_coco(src, "train", lambda c: c["images"][0].update(file_name="n" * 300 + ".png"))
    refused(src, tmp_path / "dst", "File name too long")
