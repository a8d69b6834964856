import base64
import io
import json

import numpy as np
import pytest
from builders import HEIGHT, WIDTH, write_image
from PIL import Image
from source_builders import TRUTH, blob, mask_in, masks_in, masks_of, write_with_supervision

from helpers.convert.conversion import read_source
from helpers.convert.label_tools import is_labelme, read_labelme
from helpers.errors import InputError

TRIANGLE = [[10.5, 10], [30, 10], [10, 30]]


def shape_of(kind, points, label="crack", **more):
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, **more}


def write_labelme(root, *shapes, **more):
    write_image(root / "a.png")
    content = {"imagePath": "a.png", "imageWidth": WIDTH, "imageHeight": HEIGHT, "shapes": shapes}
    (root / "a.json").write_text(json.dumps({**content, **more}))
    return root


def only_image(root):
    [image] = read_labelme(root).splits["all"]
    return image


def test_what_supervision_writes_is_read_pixel_by_pixel(tmp_path):
    source = read_source(write_with_supervision(tmp_path, "labelme"))
    assert source.format == "labelme"
    assert masks_in(source) == masks_of(TRUTH)


def test_polygon_and_rectangle(tmp_path):
    root = write_labelme(
        tmp_path, shape_of("polygon", TRIANGLE), shape_of("rectangle", [[20, 30], [10, 12]])
    )
    assert only_image(root).objects == (
        {"category": "crack", "iscrowd": 0, "segmentation": [[10.5, 10, 30, 10, 10, 30]]},
        {"category": "crack", "iscrowd": 0, "bbox": [10, 12, 10, 18]},
    )


def test_a_circle_has_the_area_of_a_circle(tmp_path):
    image = only_image(write_labelme(tmp_path, shape_of("circle", [[40, 30], [40, 50]])))
    assert mask_in(image.objects[0], image).sum() == pytest.approx(np.pi * 400, rel=0.02)


@pytest.mark.parametrize("corner", [(30, 20), (90, 60), (-4, -2)])
def test_a_painted_mask_lies_at_its_corner(tmp_path, corner):
    part = blob(0, 0, 12, 10)[:10, :12]
    png = io.BytesIO()
    Image.fromarray(part).save(png, "PNG")
    text = base64.b64encode(png.getvalue()).decode()
    points = [list(corner), [corner[0] + 11, corner[1] + 9]]
    image = only_image(write_labelme(tmp_path, shape_of("mask", points, mask=text)))
    canvas = np.zeros((HEIGHT + 40, WIDTH + 40), dtype=bool)
    canvas[corner[1] + 20 : corner[1] + 30, corner[0] + 20 : corner[0] + 32] = part
    assert (mask_in(image.objects[0], image) == canvas[20:-20, 20:-20]).all()


def test_a_group_of_polygons_is_one_object(tmp_path):
    far = [[50, 40], [60, 40], [50, 55.5]]
    root = write_labelme(
        tmp_path,
        shape_of("polygon", TRIANGLE, group_id=1),
        shape_of("polygon", far, group_id=1),
        shape_of("polygon", far, label="joint", group_id=1),
        shape_of("polygon", far),
    )
    objects = only_image(root).objects
    assert [(item["category"], len(item["segmentation"])) for item in objects] == [
        ("crack", 2),
        ("joint", 1),
        ("crack", 1),
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (shape_of("linestrip", [[1, 1], [9, 9]]), "is a linestrip of 2 points, which has no area"),
        (shape_of("polygon", [[1, 1], [9, 9]]), "is a polygon of 2 points"),
        (shape_of("polygon", TRIANGLE, label=" "), "has no label"),
        (shape_of("polygon", [[1, "x"], [2, 3], [4, 5]]), "not pairs of numbers"),
        (shape_of("mask", [[1, 1]], mask="###"), "no PNG"),
    ],
)
def test_what_cannot_be_an_object_is_refused(tmp_path, shape, message):
    with pytest.raises(InputError, match=message) as error:
        read_labelme(write_labelme(tmp_path, shape))
    assert error.value.where.endswith("a.json, shape 0")


def test_the_image_must_be_there_and_have_the_stated_size(tmp_path):
    write_labelme(tmp_path, imageWidth=WIDTH + 1)
    with pytest.raises(InputError, match="97 x 64 pixels, the upright image has 96 x 64"):
        read_labelme(tmp_path)
    write_labelme(tmp_path, imagePath="..\\pictures\\b.png")
    with pytest.raises(InputError, match="'b.png' is not beside it"):
        read_labelme(tmp_path)


def test_json_without_shapes_is_not_labelme(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    assert not is_labelme(tmp_path)
