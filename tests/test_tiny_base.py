"""The embedded base: its recipe learns, resumes, and what ships is what was recorded."""

import json
from dataclasses import replace
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Sam3Model, Sam3Processor

from data.tiny_sam3.make import BaseTrainer, Recipe, learning_rate_factor, make_batch
from data.tiny_sam3.make_examples import (
    augment,
    draw_prompts,
    make_example,
    make_examples,
    unrelated_prompt,
)
from data.tiny_sam3.make_losses import decode, encode, score_loss
from data.tiny_sam3.make_model import NUM_QUERIES, build_tiny_model
from data.tiny_sam3.make_vocabulary import ABSENT_NOUNS, HELD_OUT_NOUNS, build_tokenizer
from helpers.errors import InputError
from helpers.files import TINY_BASE

SMALL = Recipe(walls=8, steps=4, warmup_steps=1, decay_steps=2, images=2, prompts=2, extra_groups=1)
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def examples():
    return [make_example(index, SMALL.seed) for index in range(SMALL.walls)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_walls_rendered_in_other_processes_are_the_same(examples):
    first, *_ = make_examples(2, SMALL.seed)
    assert first.concepts == examples[0].concepts
    assert np.array_equal(first.image, examples[0].image)


def test_no_training_word_contains_crack():
    assert not any("crack" in noun for noun in ABSENT_NOUNS)
    assert HELD_OUT_NOUNS[0] == "crack"
    assert not set(HELD_OUT_NOUNS) & set(ABSENT_NOUNS)


def test_made_up_prompts_never_say_crack():
    rng = np.random.default_rng(0)
    assert not any("crack" in unrelated_prompt(rng) for _ in range(20_000))


def test_tokenizer_takes_any_text(tokenizer):
    for text in ("crack", "brick", "Straße", "漢字", "a-b_c 42!", "🧱"):
        ids = tokenizer(text).input_ids
        assert len(ids) > 2
        assert max(ids) < len(tokenizer)
    assert len(tokenizer.tokenize("brick")) == 1
    assert len(tokenizer.tokenize("crack")) > 1


def test_draw_prompts_are_half_present():
    rng = np.random.default_rng(1)
    prompts = draw_prompts(rng, ["moss", "moss", "bolt", "tile"], 4)
    assert sum(concept is not None for _, concept in prompts) == 2
    assert all(concept is None for _, concept in draw_prompts(rng, [], 4))


def test_augment_keeps_boxes_on_their_masks(examples):
    rng = np.random.default_rng(3)
    for example in examples:
        changed = augment(rng, example)
        for mask, box in zip(changed.masks, changed.boxes_xyxy, strict=True):
            columns = np.flatnonzero(mask.any(0)) / mask.shape[1]
            assert box[0] - 0.04 <= columns[0]
            assert columns[-1] <= box[2] + 0.04


def test_queries_start_apart_and_differ_in_what_they_see(tokenizer, examples):
    model = build_tiny_model(len(tokenizer), seed=0).eval()
    batch = make_batch(examples, tokenizer, SMALL, step=0)
    with torch.no_grad():
        decoded = decode(model, encode(model, batch), torch.arange(len(batch["targets"])))
    assert decoded["logits"].shape[-1] == NUM_QUERIES
    assert decoded["hidden"][-1].std(1).mean() > 0.1


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, examples):
    whole = BaseTrainer(SMALL, tmp_path / "whole")
    losses = [whole.train_step(examples)["loss"] for _ in range(SMALL.steps)]
    copytree(tmp_path / "whole" / "tokenizer", tmp_path / "parts" / "tokenizer")
    first = BaseTrainer(SMALL, tmp_path / "parts")
    for _ in range(2):
        first.train_step(examples)
    first.save()
    second = BaseTrainer(SMALL, tmp_path / "parts")
    assert second.resume()
    assert [second.train_step(examples)["loss"] for _ in range(2)] == pytest.approx(losses[2:])


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    BaseTrainer(SMALL, tmp_path).save()
    with pytest.raises(InputError, match="another recipe"):
        BaseTrainer(replace(SMALL, images=3), tmp_path).resume()


def test_learning_rate_plateau_does_not_depend_on_the_number_of_steps():
    short, long = Recipe(steps=4000), Recipe(steps=9000)
    for step in (0, 100, 199, 2000, 2399):
        assert learning_rate_factor(step, short) == learning_rate_factor(step, long)
    assert learning_rate_factor(3999, short) < 0.03
    assert learning_rate_factor(299, Recipe(steps=300, decay_steps=0)) == 1


def test_score_loss_gradient_pushes_the_matched_query_up_and_others_down():
    logits = torch.zeros(1, 3, requires_grad=True)
    matches = [(torch.tensor([1]), torch.tensor([0]))]
    score_loss(logits, matches, torch.tensor([0.9]), 1.0).backward()
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0]


def test_shipped_base_is_small_and_loads_with_the_plain_classes():
    size = sum(path.stat().st_size for path in TINY_BASE.rglob("*") if path.is_file())
    assert size < 12 * MEGABYTE
    model, info = Sam3Model.from_pretrained(TINY_BASE, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.float32
    processor = Sam3Processor.from_pretrained(TINY_BASE)
    pixels = processor(images=np.zeros((50, 70, 3), np.uint8), text="crack", return_tensors="pt")
    with torch.no_grad():
        assert model(**pixels).pred_logits.shape == (1, NUM_QUERIES)


def test_shipped_record_belongs_to_the_shipped_weights_and_meets_the_bar():
    record = json.loads((TINY_BASE / "training_record.json").read_text())
    model = Sam3Model.from_pretrained(TINY_BASE)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["recipe"] == {**record["recipe"], **Recipe(**record["recipe"]).__dict__}
    curves = pd.read_csv(TINY_BASE / "training_curves.csv")
    assert curves["step"].iloc[-1] == record["recipe"]["steps"]
    scores = record["scores"]
    assert scores["walls"] >= 300
    assert scores["f1"] >= 0.80
    assert scores["IL_MCC"] >= 0.80
    assert scores["crack_rejected"] >= 0.95
