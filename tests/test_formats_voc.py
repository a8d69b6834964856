import pytest
from builders import write_image
from source_builders import TRUTH, write_with_supervision

from helpers.convert.conversion import read_source
from helpers.convert.label_tools import is_voc, read_voc
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.errors import InputError


def xml_of(*boxes, extra=""):
    """Write objects, (name, xmin, ymin, xmax, ymax), as VOC does."""
    objects = "".join(
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in boxes
    )
    return f"<annotation>{objects}</annotation>"


def write_voc(root, files):
    for stem, text in files.items():
        write_image(root / "JPEGImages" / f"{stem}.png")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(text)
    return root


def test_what_supervision_writes_is_read_box_by_box(tmp_path):
    source = read_source(write_with_supervision(tmp_path, "voc"))
    assert source.format == "voc"
    for split, files in TRUTH.items():
        for image in source.splits[split]:
            boxes = [rle_box_xyxy(mask_to_rle(mask)) for _, mask in files[image.path.name]]
            expected = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
            assert [item["bbox"] for item in image.objects] == expected
    assert "4 objects have a <polygon>, of which only the box is read" in source.notes


def test_pixels_are_counted_from_one_and_the_last_belongs_to_the_box(tmp_path):
    write_voc(tmp_path, {"a": xml_of(("crack", 1, 1, 10, 20))})
    [image] = read_voc(tmp_path).splits["all"]
    assert image.objects == ({"category": "crack", "bbox": [0, 0, 10, 20], "iscrowd": 0},)


def test_a_corner_at_0_shows_that_the_files_count_from_0(tmp_path):
    write_voc(
        tmp_path, {"a": xml_of(("crack", 0, 5, 10, 20)), "b": xml_of(("crack", 3, 4, 10, 20))}
    )
    boxes = [image.objects[0]["bbox"] for image in read_voc(tmp_path).splits["all"]]
    assert boxes == [[0, 5, 10, 15], [3, 4, 7, 16]]


@pytest.mark.parametrize("ending", ["", ".png", " 1"])
def test_image_sets_divide_the_images(tmp_path, ending):
    write_voc(tmp_path, {stem: xml_of(("crack", 5, 5, 30, 20)) for stem in "abcd"})
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(f"a{ending}\nb{ending}\n")
    (lists / "val.txt").write_text(f"c{ending}\n")
    (lists / "trainval.txt").write_text("a\nb\nc\n")
    source = read_source(tmp_path)
    stems = {split: [i.path.stem for i in images] for split, images in source.splits.items()}
    assert stems == {"train": ["a", "b"], "valid": ["c"]}
    assert source.unused == {".png": 1, ".txt": 1, ".xml": 1}


def test_images_without_a_file_are_left_out_and_counted(tmp_path):
    write_voc(tmp_path, {"a": xml_of()})
    write_image(tmp_path / "JPEGImages" / "b.png")
    source = read_source(tmp_path)
    assert [image.path.stem for image in source.splits["all"]] == ["a"]
    assert source.unused == {".png": 1}
    assert "JPEGImages/b.png" in source.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "no complete XML"),
        ("<annotation><object><name>crack</name></object></annotation>", "no <bndbox>"),
        (xml_of(("crack", "x", 5, 30, 20)), "<xmin> is no number but .x."),
        (xml_of(("", 5, 5, 30, 20)), "has no <name>"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    write_voc(tmp_path, {"a": text})
    with pytest.raises(InputError, match=message) as error:
        read_voc(tmp_path)
    assert error.value.where.endswith("a.xml")


def test_an_image_must_be_there(tmp_path):
    write_voc(tmp_path, {"a": xml_of()})
    (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(InputError, match="no image 'a'"):
        read_voc(tmp_path)


def test_an_empty_folder_is_not_voc(tmp_path):
    assert not is_voc(tmp_path)
