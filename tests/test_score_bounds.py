import pytest
import torch
from tiny_random import tiny_model, tiny_processor, token_inputs

from notebooks.examples import query_logit_bounds

PROMPTS = ["crack", "moss wall", "object"]


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    torch.nn.init.normal_(model.detr_decoder.output_layer_norm.weight, mean=1.0, std=0.3)
    torch.nn.init.normal_(model.detr_decoder.output_layer_norm.bias, std=0.3)
    return model


@torch.no_grad()
def logits_of(model, states):
    """Return (P, n) logits that the scoring head gives n inputs of the decoder's layer norm."""
    tokens = token_inputs(PROMPTS)
    features = model.get_text_features(**tokens).pooler_output
    normed = model.detr_decoder.output_layer_norm(states).expand(1, len(PROMPTS), -1, -1)
    return model.dot_product_scoring(normed, features, tokens["attention_mask"])[0, ..., 0]


def test_no_state_of_the_decoder_gets_beyond_the_bounds(model):
    states = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    logits, bounds = logits_of(model, states), query_logit_bounds(model, tiny_processor(), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert bounds.lowest_logit[prompt] - 1e-4 <= logits[row].min()
        assert logits[row].max() <= bounds.highest_logit[prompt] + 1e-4


def test_a_state_driven_down_arrives_at_the_bound(model):
    bounds = query_logit_bounds(model, tiny_processor(), PROMPTS)
    state = torch.randn(1, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    optimiser = torch.optim.Adam([state], lr=0.1)
    for _ in range(300):
        tokens = token_inputs(["crack"])
        features = model.get_text_features(**tokens).pooler_output.detach()
        normed = model.detr_decoder.output_layer_norm(state)[None, None]
        logit = model.dot_product_scoring(normed, features, tokens["attention_mask"]).sum()
        optimiser.zero_grad()
        logit.backward()
        optimiser.step()
    assert logit.item() == pytest.approx(bounds.lowest_logit["crack"], abs=0.02)


def test_the_clamp_bounds_a_head_that_could_go_further(model):
    scoring = model.dot_product_scoring
    before = scoring.scale
    scoring.scale = 100 * before
    try:
        bounds = query_logit_bounds(model, tiny_processor(), PROMPTS)
    finally:
        scoring.scale = before
    assert (bounds.lowest_dot_product < -12).all()
    assert (bounds.lowest_logit == -12).all()
    assert (bounds.highest_logit == 12).all()
    assert scoring.clamp_logits
