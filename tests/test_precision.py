"""What a base kept in bfloat16 costs, on the embedded base and a picture with many objects."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3SinePositionEmbedding

from helpers.detect.predictor import Predictor
from helpers.files import TINY_BASE, WALL_CRACKS
from helpers.model.prompted import Float32Positions
from helpers.model.sam3 import base_fingerprint, load_base

PROMPTS = ("moss", "joint", "dog", "tile")


@pytest.fixture(scope="module")
def exact():
    return load_base(TINY_BASE)


@pytest.fixture(scope="module")
def half():
    return load_base(TINY_BASE, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pictures():
    paths = sorted((WALL_CRACKS / "valid" / "images").iterdir())[:4]
    return [Image.open(path).convert("RGB") for path in paths]


def largest_error(answers, reference, name):
    pairs = zip(answers, reference, strict=True)
    return max(np.abs(getattr(one, name) - getattr(other, name)).max() for one, other in pairs)


def answers_of(predictor, pictures):
    return [raw for picture in pictures for raw in predictor.raw(picture, PROMPTS)]


def test_encoders_are_kept_in_bfloat16_and_the_rest_in_float32(half):
    model, _ = half
    types = {}
    for name, parameter in model.named_parameters():
        types.setdefault(name.partition(".")[0], set()).add(parameter.dtype)
    encoders = {name for name, kinds in types.items() if kinds == {torch.bfloat16}}
    assert encoders == {"vision_encoder", "text_encoder"}
    assert all(types[name] == {torch.float32} for name in types.keys() - encoders)


def test_float32_parts_are_few_at_full_size():
    with torch.device("meta"):
        from transformers import Sam3Config

        full = Sam3Model(Sam3Config())
    count = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in full.named_children()
    }
    encoders = count["vision_encoder"] + count["text_encoder"]
    assert encoders / sum(count.values()) == pytest.approx(0.961, abs=5e-4)


def test_boxes_are_closer_to_float32_than_those_of_a_model_wholly_in_bfloat16(
    exact, half, pictures
):
    reference = answers_of(Predictor(*exact), pictures)
    kept = answers_of(Predictor(*half), pictures)
    whole, processor = load_base(TINY_BASE)
    whole = answers_of(Predictor(whole.to(torch.bfloat16), processor), pictures)
    error = {
        name: (largest_error(kept, reference, name), largest_error(whole, reference, name))
        for name in ("boxes_xyxy", "query_logits", "presence_logit", "mask_logits")
    }
    assert all(ours > 0 for ours, _ in error.values())
    assert error["boxes_xyxy"][0] < error["boxes_xyxy"][1] / 2, error
    side = pictures[0].width
    assert error["boxes_xyxy"][0] / side < 0.02, error


def test_no_detection_of_a_known_concept_is_won_or_lost(exact, half, pictures):
    for one, other in zip(
        answers_of(Predictor(*half), pictures), answers_of(Predictor(*exact), pictures), strict=True
    ):
        assert (one.scores > 0.5).sum() == (other.scores > 0.5).sum()
        assert one.presence_prob == pytest.approx(other.presence_prob, abs=0.05)


def test_both_types_have_one_fingerprint(exact, half):
    assert base_fingerprint(exact[0]) == base_fingerprint(half[0])


def test_the_model_switches_autocast_on_only_for_itself(half):
    model, processor = half
    seen = []
    handle = model.detr_encoder.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    Predictor(model, processor).raw(Image.new("RGB", (64, 64)), "moss")
    handle.remove()
    assert seen == [True]
    assert not torch.is_autocast_enabled("cpu")


def test_position_codes_are_exact_in_either_type():
    shape = torch.Size((2, 256, 72, 72))
    ported = Sam3SinePositionEmbedding(num_position_features=128, normalize=True)
    ours = Float32Positions(num_position_features=128, normalize=True)
    exact = ported(shape, "cpu", torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        codes = ours(shape, "cpu", dtype)
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes, exact, rtol=0, atol=0)
    error = (ported(shape, "cpu", torch.bfloat16).float() - exact).abs().max().item()
    rounding = (exact.bfloat16().float() - exact).abs().max().item()
    assert error == pytest.approx(0.034, abs=5e-4)
    assert rounding == pytest.approx(0.002, abs=5e-4)
