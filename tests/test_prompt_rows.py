import numpy as np
import pytest
import torch
from PIL import Image
from tiny_random import save_tiny_base, tiny_run_config, write_dataset
from torch.utils.data import DataLoader

from helpers.data import PromptCollator, PromptDataset, read_split
from helpers.detect.predictor import Predictor
from helpers.model import add_lora, sam3_losses
from helpers.model import prompted as prompt_rows
from helpers.model.prompted import ROWS_AT_ONCE, loss_inputs, model_inputs, rows_with_objects
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


@pytest.fixture
def trained_rows(base, data_dir):
    """Return an adapted model without dropout, and a batch of which some rows show nothing."""
    config = tiny_run_config(base, data_dir, "data.num_negatives=2")
    model, processor = load_base(base)
    torch.manual_seed(0)
    adapted = add_lora(model, config.lora).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    dataset = PromptDataset.from_config(config, read_split(data_dir, "train"), model, processor)
    batch = next(iter(DataLoader(dataset, 3, collate_fn=PromptCollator(processor))))
    assert 0 < rows_with_objects(batch["targets"]).sum() < len(batch["targets"])
    return adapted, batch


def test_loss_and_gradients_need_no_mask_of_what_is_absent(trained_rows):
    model, batch = trained_rows
    decoded, results = [], []
    prompt_rows.base_of(model).mask_decoder.register_forward_hook(
        lambda _m, _a, output: decoded.append(len(output.pred_masks))
    )
    present = rows_with_objects(batch["targets"])
    for wanted in ({}, {"mask_rows": present}):
        model.zero_grad()
        outputs = model(**model_inputs(batch, "cpu"), **wanted)
        terms = sam3_losses(loss_inputs(outputs), batch["targets"])
        terms["total"].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((terms, gradients, outputs.pred_masks.detach()))
    assert decoded == [len(present), int(present.sum())]
    (terms, gradients, masks), (few_terms, few_gradients, few_masks) = results
    for name, value in terms.items():
        torch.testing.assert_close(few_terms[name], value, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(few_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(few_masks[present], masks[present], rtol=1e-4, atol=1e-4)
    assert not few_masks[~present].any()


def test_a_batch_without_objects_gives_every_parameter_a_gradient(trained_rows):
    """Several processes wait for each other's gradients, also for those of a mask that nobody reads."""
    model, batch = trained_rows
    nothing = torch.zeros(len(batch["targets"]), dtype=torch.bool)
    targets = [{n: value[:0] for n, value in t.items()} for t in batch["targets"]]
    outputs = model(**model_inputs(batch, "cpu"), mask_rows=nothing)
    sam3_losses(loss_inputs(outputs), targets)["total"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_every_row_that_reaches_the_floor_has_its_masks(trained_rows):
    model, batch = trained_rows
    with torch.no_grad():
        outputs = model(**model_inputs(batch, "cpu"))
        scores = outputs.pred_logits.sigmoid().amax(1) * outputs.presence_logits.sigmoid()[:, 0]
        floor = float(scores.sort().values[-2])
        few = model(**model_inputs(batch, "cpu"), mask_floor=floor)
    reached = scores >= floor
    assert reached.sum() >= 2
    torch.testing.assert_close(few.pred_masks[reached], outputs.pred_masks[reached])
    below = scores < floor / 2
    assert not few.pred_masks[below].any()
    torch.testing.assert_close(few.pred_logits, outputs.pred_logits)
