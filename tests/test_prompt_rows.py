import numpy as np
import pytest
import torch
from PIL import Image
from tiny_random import save_tiny_base, tiny_run_config, write_dataset

from helpers.detect.predictor import Predictor
from helpers.model import prompted as prompt_rows
from helpers.model.prompted import ROWS_AT_ONCE
from helpers.model.sam3 import load_base
from helpers.train.training import train

NOUNS = ["crack", "joint", "moss", "dog", "object", "hole", "wall"]
PROMPTS = [*NOUNS, *(f"{one} {other}" for one, other in zip(NOUNS, NOUNS[1:], strict=False))] * 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def many_rows(monkeypatch):
    """Ask at most three prompts at once."""
    monkeypatch.setattr(prompt_rows, "ROWS_AT_ONCE", 3)


def test_many_prompts_are_asked_in_parts_and_the_image_is_encoded_once(base):
    model, processor = load_base(base)
    encoded, decoded = [], []
    model.vision_encoder.register_forward_hook(lambda _m, args, _o: encoded.append(len(args[0])))
    model.mask_decoder.register_forward_hook(
        lambda _m, _a, output: decoded.append(len(output.pred_masks))
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    answers = Predictor(model, processor).raw(image, PROMPTS)
    assert len(PROMPTS) > 2 * ROWS_AT_ONCE
    assert encoded == [1]
    assert decoded == [16, 16, len(PROMPTS) - 32]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.prompt == prompt
        alone = Predictor(model, processor).raw(image, prompt)[0]
        np.testing.assert_allclose(answer.query_logits, alone.query_logits, atol=1e-4)
        np.testing.assert_allclose(answer.mask_logits, alone.mask_logits, atol=1e-3)
    assert len({round(answer.max_score, 4) for answer in answers}) > 8


@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_in_parts_gives_the_same_loss_and_metrics(
    base, tmp_path, monkeypatch, batch_size
):
    data_dir = write_dataset(tmp_path / "data")
    config = tiny_run_config(base, data_dir, f"training.batch_size={batch_size}")
    whole = train(config, output_dir=tmp_path / "whole")
    monkeypatch.setattr(prompt_rows, "ROWS_AT_ONCE", 2)
    parts = train(config, output_dir=tmp_path / "parts")
    names = {name for entry in whole.history for name in entry if name.startswith("eval_")}
    assert "eval_loss" in names
    for one, other in zip(whole.history, parts.history, strict=True):
        for name in names & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def test_no_prompt_is_lost_at_the_seam(base, many_rows):
    model, processor = load_base(base)
    for count in (2, 3, 4, 6, 7):
        with torch.no_grad():
            answers = Predictor(model, processor).raw(Image.new("RGB", (60, 40)), PROMPTS[:count])
        assert [answer.prompt for answer in answers] == PROMPTS[:count]
