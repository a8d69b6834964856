import numpy as np
import pytest
from builders import HEIGHT, WIDTH, write_image
from PIL import Image
from source_builders import blob, mask_in

from helpers.convert.conversion import read_source
from helpers.convert.mask_pictures import folder_pairs, read_masks
from helpers.errors import InputError

FIRST, SECOND = blob(8, 8, 16, 32), blob(50, 10, 20, 30)


def write_masks(root, values, name="a.png", split="", folder="masks", image="a.png"):
    write_image(root / split / "images" / image)
    path = root / split / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return root


def only_image(root, **options):
    [image] = read_masks(root, **options).splits["all"]
    return image


def test_connected_components_are_the_objects(tmp_path):
    image = only_image(write_masks(tmp_path, 255 * (FIRST | SECOND)), category="crack")
    assert {item["category"] for item in image.objects} == {"crack"}
    masks = [mask_in(item, image) for item in image.objects]
    assert len(masks) == 2
    assert (masks[0] == FIRST).all()
    assert (masks[1] == SECOND).all()


def test_pixels_that_touch_at_a_corner_are_one_object(tmp_path):
    diagonal = np.eye(HEIGHT, WIDTH, dtype=bool)
    image = only_image(write_masks(tmp_path, diagonal), category="crack")
    assert len(image.objects) == 1


def test_all_pixels_can_be_one_object(tmp_path):
    root = write_masks(tmp_path, FIRST | SECOND)
    image = only_image(root, category="crack", objects="whole")
    [item] = image.objects
    assert (mask_in(item, image) == (FIRST | SECOND)).all()


def test_values_can_be_instances_that_touch(tmp_path):
    values = np.zeros((HEIGHT, WIDTH))
    values[10:20, 10:20], values[10:20, 20:30] = 3, 7
    image = only_image(write_masks(tmp_path, values), category="crack", objects="values")
    assert [mask_in(item, image).sum() for item in image.objects] == [100, 100]


@pytest.mark.parametrize("text", ["crack\njoint\n", "_background_\ncrack\njoint\n"])
def test_values_can_be_classes(tmp_path, text):
    root = write_masks(tmp_path, FIRST + 2 * SECOND.astype(int))
    (root / "classes.txt").write_text(text)
    image = only_image(root)
    found = {item["category"]: mask_in(item, image) for item in image.objects}
    assert (found["crack"] == FIRST).all()
    assert (found["joint"] == SECOND).all()
    assert [entry.name for entry in read_masks(root).categories] == ["crack", "joint"]


def test_a_palette_keeps_its_indices(tmp_path):
    root = write_masks(tmp_path, FIRST)
    picture = Image.fromarray(FIRST.astype(np.uint8))
    picture.putpalette([0, 0, 0, 0, 0, 0] + [9] * 762)  # both colours are black
    picture.save(root / "masks" / "a.png")
    image = only_image(root, category="crack")
    assert (mask_in(image.objects[0], image) == FIRST).all()


def test_a_jpeg_mask_is_cut_at_half(tmp_path):
    root = write_masks(tmp_path, FIRST)
    (root / "masks" / "a.png").unlink()
    Image.fromarray(FIRST.astype(np.uint8) * 255).save(root / "masks" / "a.jpg", quality=95)
    image = only_image(root, category="crack", objects="whole")
    assert (mask_in(image.objects[0], image) == FIRST).mean() > 0.99


def test_an_empty_mask_is_an_image_without_objects(tmp_path):
    image = only_image(write_masks(tmp_path, np.zeros((HEIGHT, WIDTH))), category="crack")
    assert image.objects == ()


@pytest.mark.parametrize("name", ["a.png", "a_mask.png", "a_label.png"])
@pytest.mark.parametrize("folder", ["masks", "annotations", "ground_truth"])
def test_names_of_masks_and_folders(tmp_path, name, folder):
    assert only_image(write_masks(tmp_path, FIRST, name, folder=folder), category="crack").objects


def test_splits_inside_and_outside(tmp_path):
    for split in ("train", "val"):
        write_masks(tmp_path / "inside", FIRST, split=split)
    write_masks(tmp_path / "outside", FIRST, "train/a.png", image="train/a.png")
    write_masks(tmp_path / "outside", FIRST, "test/b.png", image="test/b.png")
    assert set(read_masks(tmp_path / "inside", category="crack").splits) == {"train", "valid"}
    assert set(read_masks(tmp_path / "outside", category="crack").splits) == {"train", "test"}


def test_images_without_a_mask_are_left_out_and_counted(tmp_path):
    root = write_masks(tmp_path, FIRST)
    write_image(root / "images" / "b.png")
    source = read_source(root, category="crack")
    assert len(source.splits["all"]) == 1
    assert source.unused == {".png": 1}
    assert "1 images have no annotation" in source.notes[0]
    assert "images/b.png" in source.notes[0]


def test_what_cannot_be_meant_is_refused(tmp_path):
    two = FIRST + 2 * SECOND.astype(int)
    root = write_masks(tmp_path, two)
    with pytest.raises(InputError, match="do not say what they show"):
        read_masks(root)
    with pytest.raises(InputError, match="holds 2 values beside 0"):
        read_masks(root, category="crack")
    with pytest.raises(InputError, match="objects is 'pieces'"):
        read_masks(root, category="crack", objects="pieces")
    (root / "classes.txt").write_text("crack\n")
    with pytest.raises(InputError, match="the value 2, which"):
        read_masks(root)
    with pytest.raises(InputError, match="classes and instances at once"):
        read_masks(root, objects="values")
    write_masks(root, two[:, :-1])
    with pytest.raises(InputError, match="95 x 64 pixels, its image 96 x 64"):
        read_masks(root)
    write_masks(root, np.stack([two, 0 * two, two], axis=-1))
    with pytest.raises(InputError, match="is coloured"):
        read_masks(root)


def test_images_alone_are_no_masks(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    assert not folder_pairs(tmp_path)
