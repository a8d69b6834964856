"""What reaches the model: queries, boxes, masks, absent prompts."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import (
    HEIGHT,
    WIDTH,
    edit_coco,
    make_processor,
    mask_of,
    segmentation_of,
    write_coco,
    write_image,
)
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset, count_objects
from helpers.data.masks import clip_box, rle_area, rle_box_xyxy
from helpers.data.records import true_objects, true_rle
from helpers.errors import InputError
from notebooks.examples import as_queries

GRID = 16
NOUNS = ("dog", "car", "tree", "moss", "bolt", "tape")


@pytest.fixture
def data_dir(tmp_path):
    return write_coco(tmp_path)


def make_dataset(data_dir, split="train", **settings):
    settings = {"resolution": 128, "mask_size": GRID, **settings}
    return PromptDataset(read_split(data_dir, split), make_processor(), **settings)


def prompts_of(item):
    return [(query["prompt"], query["is_positive"]) for query in item["queries"]]


def test_one_query_per_image_and_category(data_dir):
    dataset = make_dataset(data_dir)
    assert len(dataset) == 4
    assert prompts_of(dataset[1]) == [("crack", True), ("joint", True)]
    crack, joint = dataset[1]["queries"]
    assert crack["image_id"] == "b.png"
    assert crack["category"] == "crack"
    assert len(crack["boxes_cxcywh"]) == len(joint["boxes_cxcywh"]) == 1
    assert len(dataset[3]["queries"][0]["boxes_cxcywh"]) == 2


def test_boxes_and_masks_are_normalised_and_agree(data_dir):
    crack = make_dataset(data_dir)[1]["queries"][0]
    expected = torch.tensor([[46 / WIDTH, 24 / HEIGHT, 12 / WIDTH, 40 / HEIGHT]])
    torch.testing.assert_close(crack["boxes_cxcywh"], expected)
    assert crack["masks"].dtype == torch.uint8
    assert crack["masks"].shape == (1, GRID, GRID)
    assert crack["mask_valid"].tolist() == [True]
    rows, columns = torch.nonzero(crack["masks"][0], as_tuple=True)
    found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / GRID
    box_xyxy = box_convert(crack["boxes_cxcywh"], "cxcywh", "xyxy")[0]
    assert (found - box_xyxy).abs().max() <= 0.5 / GRID + 1e-6


def test_pixels_are_those_of_the_processor(data_dir):
    item = make_dataset(data_dir, resolution=56)[0]
    with Image.open(data_dir / "train" / "a.png") as image:
        size = {"height": 56, "width": 56}
        expected = make_processor().image_processor(images=image, size=size, return_tensors="pt")
    assert item["pixel_values"].shape == (3, 56, 56)
    torch.testing.assert_close(item["pixel_values"], expected["pixel_values"][0])
    assert item["pixel_values"].abs().max() <= 1


def test_boxes_are_clipped_to_the_image(data_dir):
    def stretch(content):
        content["annotations"][0]["bbox"] = [-10, -10, 500, 500]

    edit_coco(data_dir, "train", stretch)
    boxes = make_dataset(data_dir)[0]["queries"][0]["boxes_cxcywh"]
    torch.testing.assert_close(boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("box_xyxy", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((-5, -5, 5, 5), (0, 0, 5, 5)),
        ((9, 9, 30, 30), (9, 9, 10, 20)),
        ((10, 0, 12, 5), None),
        ((3, 3, 3, 8), None),
        ((5, 5, 2, 8), None),
        ((float("nan"), 0, 1, 1), None),
        ((0, 0, float("inf"), 1), None),
    ],
)
def test_clip_box(box_xyxy, expected):
    assert clip_box(box_xyxy, 10, 20) == expected


@pytest.mark.parametrize("bbox", [[200, 8, 16, 32], [8, 8, 0, 32], [8, 8, float("nan"), 32]])
def test_an_emptied_query_is_dropped_and_never_negative(bbox, data_dir):
    edit_coco(data_dir, "train", lambda content: content["annotations"][0].update(bbox=bbox))
    dataset = make_dataset(data_dir, num_negatives=10, negative_prompts=NOUNS)
    item = next(item for item in dataset if item["queries"][0]["image_id"] == "a.png")
    assert ("joint", False) in prompts_of(item)
    assert "crack" not in [prompt for prompt, _ in prompts_of(item)]


@pytest.mark.parametrize("prompt", [None, "object"])
def test_crowds_are_no_targets_and_never_make_a_negative(prompt, data_dir):
    edit_coco(data_dir, "train", lambda content: content["annotations"][0].update(iscrowd=1))
    dataset = make_dataset(data_dir, prompt=prompt)
    assert [record.image_id for record in dataset.skipped] == ["a.png"]
    dataset = make_dataset(data_dir, prompt=prompt, num_negatives=20, negative_prompts=NOUNS)
    item = next(item for item in dataset if item["queries"][0]["image_id"] == "a.png")
    assert all(not is_positive for _, is_positive in prompts_of(item))
    assert not {"crack", "object"} & {prompt for prompt, _ in prompts_of(item)}


def test_a_crowd_beside_an_object_leaves_the_object(data_dir):
    edit_coco(data_dir, "train", lambda content: content["annotations"][3].update(iscrowd=1))
    query = make_dataset(data_dir)[3]["queries"][0]
    assert query["is_positive"]
    assert len(query["boxes_cxcywh"]) == 1


def test_mask_valid_marks_objects_without_a_usable_mask(data_dir):
    def spoil(content):
        first, second = content["annotations"][3:5]
        first["segmentation"] = []
        second["segmentation"] = segmentation_of(mask_of(0, 0, 5, 5, (WIDTH, HEIGHT)), "rle")

    edit_coco(data_dir, "train", spoil)
    query = make_dataset(data_dir)[3]["queries"][0]
    assert query["mask_valid"].tolist() == [False, False]
    assert query["masks"].shape == (2, GRID, GRID)
    assert not query["masks"].any()
    assert len(query["boxes_cxcywh"]) == 2


def test_polygons_and_run_lengths_give_equal_targets(tmp_path):
    items = [make_dataset(write_coco(tmp_path / form, form=form))[3] for form in ("polygon", "rle")]
    for one, other in zip(*(item["queries"] for item in items), strict=True):
        assert torch.equal(one["masks"], other["masks"])
        assert torch.equal(one["boxes_cxcywh"], other["boxes_cxcywh"])


def test_an_image_without_objects_asks_for_an_own_name(data_dir):
    assert prompts_of(make_dataset(data_dir)[2]) in ([("crack", False)], [("joint", False)])
    item = make_dataset(data_dir, num_negatives=3, negative_prompts=NOUNS)[2]
    assert len(item["queries"]) == 3
    assert item["queries"][0]["prompt"] in ("crack", "joint")
    query = item["queries"][0]
    assert query["boxes_cxcywh"].shape == (0, 4)
    assert query["masks"].shape == (0, GRID, GRID)
    assert query["mask_valid"].shape == (0,)


def test_negatives_are_absent_and_counted(data_dir):
    dataset = make_dataset(data_dir, num_negatives=3, negative_prompts=("dog", "cracks", "Joints"))
    for item in dataset:
        present = {prompt for prompt, is_positive in prompts_of(item) if is_positive}
        absent = [prompt for prompt, is_positive in prompts_of(item) if not is_positive]
        assert len(set(absent)) == len(absent) <= 3
        assert not {"cracks"} & set(absent) if "crack" in present else True
        assert "Joints" not in absent or "joint" not in present
    both_present = prompts_of(dataset[1])
    assert both_present == [("crack", True), ("joint", True), ("dog", False)]


def test_contents_are_never_negatives(data_dir):
    def fill(content):
        content["images"][0]["contents"] = ["dogs", "car"]

    edit_coco(data_dir, "train", fill)
    item = make_dataset(data_dir, num_negatives=20, negative_prompts=NOUNS)[0]
    absent = {prompt for prompt, is_positive in prompts_of(item) if not is_positive}
    assert absent == {"joint", *NOUNS} - {"dog", "car"}


def test_draw_depends_on_seed_image_and_epoch_only(data_dir):
    settings = {"num_negatives": 2, "negative_prompts": NOUNS}
    first, second = (make_dataset(data_dir, **settings) for _ in range(2))
    drawn = [prompts_of(first[index]) for index in range(4)]
    assert [prompts_of(second[index]) for index in (3, 2, 1, 0)] == drawn[::-1]
    other_seed = make_dataset(data_dir, **settings, seed=7)
    assert [prompts_of(item) for item in other_seed] != drawn
    first.set_epoch(1)
    assert [prompts_of(first[index]) for index in range(4)] != drawn
    first.set_epoch(0)
    assert [prompts_of(first[index]) for index in range(4)] == drawn


def test_negatives_can_be_held_fixed(data_dir):
    settings = {"num_negatives": 2, "negative_prompts": NOUNS, "resample_negatives": False}
    dataset = make_dataset(data_dir, **settings)
    drawn = [prompts_of(item) for item in dataset]
    dataset.set_epoch(5)
    assert [prompts_of(item) for item in dataset] == drawn


def test_a_prompt_can_replace_the_names(data_dir):
    dataset = make_dataset(
        data_dir, prompt="object", num_negatives=1, negative_prompts=("objects", "dog")
    )
    assert prompts_of(dataset[1]) == [("object", True), ("dog", False)]
    assert len(dataset[1]["queries"][0]["boxes_cxcywh"]) == 2
    assert prompts_of(dataset[2]) == [("object", False)]


def test_objects_that_are_never_read_give_only_negatives(data_dir):
    """The failing pipeline of the seed document: the prompt "object" and no object in any image."""
    split = read_split(data_dir, "train")
    records = tuple(dataclasses.replace(record, objects=()) for record in split.records)
    split = dataclasses.replace(split, records=records)
    dataset = PromptDataset(split, make_processor(), resolution=56, mask_size=GRID, prompt="object")
    assert [prompts_of(item) for item in dataset] == [[("object", False)]] * 4


def test_exif_orientation_is_respected(data_dir):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright; the stored pixels lie on their side
    stored = write_image(data_dir / "train" / "a.png", size=(HEIGHT, WIDTH), exif=exif, seed=1)
    item = make_dataset(data_dir, resolution=56)[0]
    pixels = np.random.default_rng(1).integers(0, 255, (WIDTH, HEIGHT, 3), dtype=np.uint8)
    upright = Image.fromarray(np.rot90(pixels, k=-1))
    assert upright.size == (WIDTH, HEIGHT)
    size = {"height": 56, "width": 56}
    expected = make_processor().image_processor(images=upright, size=size, return_tensors="pt")
    torch.testing.assert_close(item["pixel_values"], expected["pixel_values"][0])
    write_image(stored, size=(HEIGHT, WIDTH))
    with pytest.raises(InputError, match=r"a\.png: the upright image is 64 x 96 pixels"):
        make_dataset(data_dir)[0]


def test_a_resized_copy_of_the_image_is_accepted(data_dir):
    before = make_dataset(data_dir)[0]["queries"][0]
    write_image(data_dir / "train" / "a.png", size=(2 * WIDTH, 2 * HEIGHT))
    after = make_dataset(data_dir)[0]["queries"][0]
    assert torch.equal(before["boxes_cxcywh"], after["boxes_cxcywh"])
    assert torch.equal(before["masks"], after["masks"])


@pytest.mark.parametrize("workers", [0, 2])
def test_collated_batch(workers, data_dir):
    dataset = make_dataset(data_dir, num_negatives=1, negative_prompts=NOUNS)
    collator = PromptCollator(make_processor())
    (batch,) = DataLoader(dataset, batch_size=4, collate_fn=collator, num_workers=workers)
    assert set(batch) == {
        "pixel_values", "input_ids", "attention_mask", "image_index", "targets", "queries"
    }  # fmt: skip
    num_queries = len(batch["queries"])
    assert batch["pixel_values"].shape == (4, 3, 128, 128)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (num_queries, 32)
    assert batch["image_index"].tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    names = ["a.png", "b.png", "c.png", "d.png"]
    for index, query, target in zip(
        batch["image_index"], batch["queries"], batch["targets"], strict=True
    ):
        assert query["image_id"] == names[index]
        assert query["is_positive"] == (len(target["boxes_cxcywh"]) > 0)
        assert set(target) == {"boxes_cxcywh", "masks", "mask_valid"}


def test_a_prompt_beyond_the_context_is_refused(data_dir):
    dataset = make_dataset(data_dir, prompt="crack " * 31)
    with pytest.raises(InputError, match="33 tokens, SAM3 reads 32"):
        PromptCollator(make_processor())([dataset[0]])


def test_count_objects(data_dir):
    dataset = make_dataset(data_dir, num_negatives=1, negative_prompts=NOUNS)
    loader = DataLoader(dataset, batch_size=2, collate_fn=PromptCollator(make_processor()))
    counts = count_objects(loader)
    assert counts.equals(count_objects(dataset))
    assert counts["num_objects"].sum() == counts["num_masks"].sum() == 5
    assert (counts["num_objects"] > 0).tolist() == counts["is_positive"].tolist()
    assert counts.set_index(["image_id", "prompt"]).loc[("d.png", "crack"), "num_objects"] == 2


def test_a_split_without_queries_is_refused(tmp_path):
    write_coco(tmp_path, {"train": {}})
    with pytest.raises(InputError, match="the 0 images of split 'train' give no query"):
        make_dataset(tmp_path)


def test_negatives_that_cannot_be_drawn_are_refused(tmp_path):
    write_coco(tmp_path, {"train": {"a.png": [("crack", 0, 0, 9, 9), ("joint", 20, 0, 9, 9)]}})
    with pytest.raises(InputError, match="num_negatives is 2, but no noun is absent"):
        make_dataset(tmp_path, num_negatives=2, negative_prompts=("cracks",))


def test_a_corrupt_image_is_named(data_dir):
    (data_dir / "train" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png: is no readable image"):
        make_dataset(data_dir)[0]


def test_training_and_evaluation_count_the_same_objects(data_dir):
    """Crowd regions and boxes outside are no objects, an object with a box only is one."""

    def change(content):
        for annotation in content["annotations"]:
            if annotation["image_id"] == 2:
                annotation["segmentation"] = []
        content["annotations"][3]["iscrowd"] = 1
        content["annotations"][0]["bbox"] = [200, 8, 16, 32]

    edit_coco(data_dir, "train", change)
    dataset = make_dataset(data_dir, num_negatives=1, negative_prompts=NOUNS)
    for index, record in enumerate(dataset.records):
        objects = true_objects(record)
        trained = sum(len(query["boxes_cxcywh"]) for query in dataset.targets(index))
        assert len(objects) == trained
        for item in objects:
            rle = true_rle(record, item)
            assert rle["size"] == [record.height, record.width]
            assert rle_box_xyxy(rle) == item.box_xyxy
            assert rle_area(rle) > 0
        [query] = as_queries([_answer(record)], [record])
        assert len(query.gt) == trained
    assert [len(true_objects(record)) for record in dataset.split.records] == [0, 2, 0, 1]


def _answer(record):
    """Return a prediction that finds nothing."""
    return SimpleNamespace(
        image=str(record.path), prompt="crack", detections=[],
        presence_prob=0.0, max_query_prob=0.0, max_score=0.0,
    )  # fmt: skip
