"""The careless script: right without a mistake, and each mistake where it should be."""

import json
from copy import copy

import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import box_convert

from helpers.foreign import import_source
from helpers.lab.careless import LOG_FILE, MISTAKES, WEIGHTS_FILE, Careless, opened

QUICK = {"epochs": 1, "rank": 4, "batch_size": 3}


@pytest.fixture(scope="module")
def made(base, data_dir):
    """Return a function that makes a script on the random base."""
    return lambda *mistakes: Careless(mistakes, base=base, data_dir=data_dir, **QUICK)


@pytest.fixture(scope="module")
def script(made):
    """Return a function that copies one script and makes mistakes that are not in the model."""
    one = made()

    def copied(*mistakes):
        other = copy(one)
        other.mistakes = {*mistakes}
        return other

    return copied


@pytest.fixture(scope="module")
def trained(base, data_dir, tmp_path_factory):
    one = Careless(base=base, data_dir=data_dir, **QUICK).train()
    one.folder = one.save(tmp_path_factory.mktemp("careless") / "peft")
    return one


def first_batch(script):
    return next(script.batches())


def objects_in(batch):
    return sum(len(target["boxes"]) for target in batch["targets"])


def perfect(script, batch):
    """Return outputs in which the first queries say what the targets of a batch hold."""
    outputs = script.outputs(script.model.eval(), batch)
    outputs.pred_logits = torch.full_like(outputs.pred_logits, -9.0)
    outputs.presence_logits = torch.full_like(outputs.presence_logits, -9.0)
    outputs.pred_boxes, outputs.pred_masks = (
        outputs.pred_boxes.clone(),
        -9 * torch.ones_like(outputs.pred_masks),
    )
    for row, target in enumerate(batch["targets"]):
        count = len(target["boxes"])
        if count:
            outputs.pred_logits[row, :count] = outputs.presence_logits[row] = 9.0
            outputs.pred_boxes[row, :count] = box_convert(target["boxes"], "cxcywh", "xyxy")
            size = outputs.pred_masks.shape[-2:]
            masks = torch.nn.functional.interpolate(target["masks"][None], size=size, mode="area")[
                0
            ]
            outputs.pred_masks[row, :count] = 18 * masks.gt(0.5).float() - 9
    return outputs


@pytest.fixture(scope="module")
def on_walls():
    return Careless()


def test_targets_are_fractions_on_their_masks(on_walls):
    batch = first_batch(on_walls)
    assert len(batch["targets"]) == len(batch["image_index"]) == len(batch["input_ids"])
    assert objects_in(batch)
    for target in batch["targets"]:
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            x0, y0, x1, y1 = box_convert(box, "cxcywh", "xyxy") * mask.shape[0]
            rows, columns = mask.nonzero().T
            assert columns.min() == pytest.approx(x0, abs=1.5)
            assert rows.max() + 1 == pytest.approx(y1, abs=1.5)


@pytest.mark.parametrize(
    ("mistake", "holds"),
    [
        ("wrong keys", lambda b: objects_in(b) == 0),
        ("emptied by a transform", lambda b: objects_in(b) < 4),
        ("masks swallowed", lambda b: objects_in(b) and not any(t["masks"].any() for t in b["targets"])),
        ("boxes in pixels", lambda b: max(t["boxes"].max() for t in b["targets"] if len(t["boxes"])) > 1),
    ],
)  # fmt: skip
def test_a_mistake_of_reading_is_in_the_batches(script, mistake, holds):
    assert holds(first_batch(script(mistake)))
    assert not holds(first_batch(script()))


def test_corners_are_no_centres(script):
    right, wrong = (
        first_batch(script(*m))["targets"][0]["boxes"] for m in ((), ("boxes as corners",))
    )
    assert torch.allclose(box_convert(right, "cxcywh", "xyxy"), wrong)


def test_absent_words_are_not_in_the_picture_unless_by_mistake(on_walls):
    right, wrong = on_walls, copy(on_walls)
    wrong.mistakes = {"nouns in the picture"}
    picture = next(one for one in right.read("train") if len(one["contents"]) > 1)
    drawn = [{word for word, own in one.questions(picture) if not own} for one in (right, wrong)]
    assert not drawn[0] & set(picture["contents"])
    assert drawn[1] & set(picture["contents"])


def test_categories_have_words_of_their_own_unless_by_mistake(script):
    right, wrong = script(), script("categories joined")
    for one in (right, wrong):
        one.words = {1: "crack", 2: "hole"}
    picture = {"objects": [{"category_id": n} for n in (1, 1, 2)]}
    assert {word: len(own) for word, own in right.questions(picture) if own} == {
        "crack": 2,
        "hole": 1,
    }
    assert {word: len(own) for word, own in wrong.questions(picture) if own} == {"crack": 3}


def test_a_perfect_prediction_costs_next_to_nothing_and_a_silent_one_much(script):
    one = script()
    batch = first_batch(one)
    outputs = perfect(one, batch)
    least = one.loss(outputs, batch["targets"])
    assert least["loss"] < 1
    outputs.pred_logits = torch.full_like(outputs.pred_logits, -9.0)
    assert one.loss(outputs, batch["targets"])["loss"] > 5 + least["loss"]
    unpaid = script("score weight zero").loss(outputs, batch["targets"])["loss"]
    assert abs(unpaid - least["loss"]) < 0.1


@pytest.mark.parametrize(
    "mistake", ["sigmoid twice", "many queries per object", "presence at its clamp"]
)
def test_a_mistake_of_the_loss_makes_the_perfect_prediction_dear(script, mistake):
    batch = first_batch(script())
    outputs = perfect(script(), batch)
    right, wrong = (script(*m).loss(outputs, batch["targets"])["loss"] for m in ((), (mistake,)))
    assert wrong > right + 1


@pytest.mark.parametrize(
    ("mistake", "modules"),
    [
        ("flag without effect", {"mask_decoder"}),
        ("names of another model", {"vision_encoder"}),
        ("words run together", {"text_encoder"}),
    ],
)
def test_lora_is_in_the_parts_of_the_recipe(made, mistake, modules):
    names = [name for name, _ in made(mistake).model.named_parameters() if ".lora_A" in name]
    assert {name.split(".")[2] for name in names} == modules


def test_what_is_trained(made):
    def trained(*mistakes):
        model = made(*mistakes).model
        return {n for n, parameter in model.named_parameters() if parameter.requires_grad}

    assert {name.rpartition(".lora_")[2][0] for name in trained()} == {"A", "B"}
    assert not any(".lora_B" in name for name in trained("lora b frozen"))
    assert len(trained("base not frozen")) > len(trained())


def test_detached_text_leaves_its_lora_without_gradient(script):
    for mistakes, arrives in (((), True), (("text features detached",), False)):
        one = script(*mistakes)
        batch = first_batch(one)
        one.model.zero_grad()
        one.loss(one.outputs(one.model.train(), batch), batch["targets"])["loss"].backward()
        gradients = [
            p.grad for n, p in one.model.named_parameters() if "text_encoder" in n and "lora_B" in n
        ]
        assert all((gradient is not None) == arrives for gradient in gradients)


def test_training_moves_the_adapter_and_writes_down_what_it_did(trained):
    weights = load_file(trained.folder / WEIGHTS_FILE)
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    [entry] = [json.loads(line) for line in (trained.folder / LOG_FILE).read_text().splitlines()]
    assert {
        "epoch",
        "train_loss",
        "val_loss",
        "val_iou",
        "learning_rate",
        "loss_ce",
    } <= entry.keys()


def test_the_first_epoch_is_kept_by_mistake_and_the_yaml_says_otherwise(made):
    one = made("settings hard-coded", "first epoch kept")
    assert one.recipe.learning_rate != one.claims()["training"]["learning_rate"]
    assert one.recipe.epochs != one.claims()["training"]["num_epochs"]


@pytest.mark.parametrize("mistakes", [(), ("loader without effect",)])
def test_a_saved_adapter_is_loaded_again(script, trained, data_dir, mistakes):
    picture = opened(data_dir / "valid" / "valid_0.png")
    right = trained.answer(picture, ["crack"]).pred_logits
    again = script(*mistakes).load(trained.folder).answer(picture, ["crack"]).pred_logits
    assert torch.equal(again, right) == (not mistakes)


def test_both_layouts_hold_the_same_adapter(trained, base, tmp_path):
    trained.save(tmp_path / "sompote", "sompote")
    import_source(tmp_path / "sompote", tmp_path / "peft", base=base)
    first, second = (
        load_file(folder / WEIGHTS_FILE) for folder in (trained.folder, tmp_path / "peft")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_detections_are_in_pixels_and_above_the_threshold(trained, script, data_dir):
    picture = opened(data_dir / "valid" / "valid_0.png")
    found = trained.detect(picture, "crack", 0.0)
    scores = sorted(one["score"] for one in found)
    assert max(max(one["box"]) for one in found) > 5
    assert found[0]["mask"].shape == (picture.height, picture.width)
    assert len(trained.detect(picture, "crack", scores[len(scores) // 2])) < len(found)
    for mistake, is_other in (
        ("threshold fixed", lambda other: not other),
        ("presence left out", lambda other: max(one["score"] for one in other) > scores[-1]),
        ("masks left at grid size", lambda other: other[0]["mask"].shape != found[0]["mask"].shape),
        ("finest level dropped", lambda other: any((a["mask"] != b["mask"]).any() for a, b in zip(other, found, strict=False))),
    ):  # fmt: skip
        wrong = copy(trained)
        wrong.mistakes = {mistake}
        assert is_other(wrong.detect(picture, "crack", 0.0)), mistake


def test_the_base_from_its_config_is_another_one(made, data_dir):
    picture = opened(data_dir / "valid" / "valid_0.png")
    right, wrong = (made(*m).answer(picture, ["crack"]) for m in ((), ("base from its config",)))
    assert not torch.equal(right.pred_logits, wrong.pred_logits)


def test_an_unknown_mistake_is_refused(made):
    with pytest.raises(ValueError, match="no such mistake: rain"):
        made("rain")
    assert len(MISTAKES) == len(set(MISTAKES))
