"""The token of the geometry encoder behind every prompt: where it is, who has it, who remembers it."""

import json
import shutil

import pytest
import torch
from tiny_random import RESOLUTION, save_tiny_base, tiny_model, tiny_run_config, token_inputs
from transformers import Sam3Config, Sam3Model

from helpers.config import load_config
from helpers.data import read_split
from helpers.data.images import open_upright
from helpers.detect import Predictor
from helpers.detect.queries import predict_split
from helpers.files import CONFIGS, TINY_BASE
from helpers.model.lora import BASE_FILE, add_lora, load_adapter
from helpers.model.prompted import PromptedSam3, base_of
from helpers.model.sam3 import has_native_prompt, load_base
from helpers.train.run import load_run, read_config, state_of
from helpers.train.training import train

TOKEN = {"input_boxes": torch.zeros(1, 1, 4), "input_boxes_labels": torch.full((1, 1), -10)}
INDEX = torch.tensor([0, 1, 1])
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


def images(count):
    return torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_rows_are_those_of_the_plain_model_asked_with_its_token_and_one_vision_pass():
    model, seen, tokens = tiny_model(), [], token_inputs(["crack", "joint", "moss wall"])
    without = model(pixel_values=images(2), **tokens, image_index=INDEX)
    model.config.native_prompt = True
    hook = model.vision_encoder.register_forward_hook(
        lambda _m, args, _o: seen.append(len(args[0]))
    )
    outputs = model(pixel_values=images(2), **tokens, image_index=INDEX)
    hook.remove()
    assert seen == [2]
    states = {
        "backbone_states": model.backbone_states(images(2)),
        "text_states": model.text_states(**tokens),
    }
    kept = model(**states, attention_mask=tokens["attention_mask"], image_index=INDEX)
    for row, image in enumerate(INDEX.tolist()):
        words = {name: tensor[row : row + 1] for name, tensor in tokens.items()}
        alone = Sam3Model.forward(model, pixel_values=images(2)[[image]], **words, **TOKEN)
        for name in OUTPUTS:
            torch.testing.assert_close(outputs[name][row], alone[name][0], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(kept[name][row], alone[name][0], rtol=1e-4, atol=2e-5)
    assert (outputs.pred_logits - without.pred_logits).abs().max() > 0.05


@torch.no_grad()
def test_bfloat16_answers_nearly_the_same():
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        model = PromptedSam3.from_pretrained(TINY_BASE, dtype=dtype).eval()
        model.config.native_prompt = True
        pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        words = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
        answers.append(model(pixel_values=pixels, **words).pred_logits)
    assert (answers[0] - answers[1]).abs().max() < 0.25


def test_lora_of_the_geometry_encoder_learns_only_with_the_token(recwarn):
    config = load_config(CONFIGS / "crack_detection_config.yaml", "tiny")
    flags = {
        f"apply_to_{part}": False for part in ("vision_encoder", "text_encoder", "mask_decoder")
    }
    lora = config.lora.model_copy(update=flags | {"apply_to_geometry_encoder": True})
    moved = {}
    for native in (False, True):
        model = tiny_model()
        model.config.native_prompt = native
        model = add_lora(model, lora)
        logits = model(pixel_values=images(1), **token_inputs(["crack"])).pred_logits
        if logits.requires_grad:
            logits.sum().backward()
        moved[native] = any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert moved == {False: False, True: True}
    assert sum("apply_to_geometry_encoder" in str(warning.message) for warning in recwarn) == 1


def test_facebook_sam3_has_it_and_a_saved_model_says_so(tmp_path):
    assert has_native_prompt(Sam3Config(), "facebook/sam3")
    assert not has_native_prompt(Sam3Config(), TINY_BASE)
    save_tiny_base(tmp_path)
    assert not load_base(tmp_path)[0].native_prompt
    model, _ = load_base(tmp_path, native_prompt=True)
    assert model.native_prompt
    model.save_pretrained(tmp_path)
    assert load_base(tmp_path)[0].native_prompt
    assert not load_base(tmp_path, native_prompt=False)[0].native_prompt


@pytest.fixture(scope="module")
def native_run(base, data_dir, tmp_path_factory):
    """Return a run that was trained with the token."""
    settings = ("scale.num_epochs=0.02", "model.native_prompt=true")
    config = tiny_run_config(base, data_dir, *settings, "evaluation.score_threshold=0.189")
    return train(config, output_dir=tmp_path_factory.mktemp("native") / "run", progress=False)


def test_a_run_records_it_and_answers_with_it(native_run, data_dir):
    assert read_config(native_run.folder).model.native_prompt is True
    assert json.loads((native_run.folder / BASE_FILE).read_text())["native_prompt"] is True
    run = load_run(native_run.folder)
    image = data_dir / "test" / "test_0.png"
    [raw] = Predictor(run.model, run.processor).raw(image, ["crack"])
    pixels = run.processor.image_processor(images=open_upright(image), return_tensors="pt")
    words = dict(run.processor(text="crack", return_tensors="pt"))
    with torch.no_grad():
        plain = Sam3Model.forward(base_of(run.model), **pixels, **words, **TOKEN)
    torch.testing.assert_close(
        torch.from_numpy(raw.query_logits), plain.pred_logits[0], atol=1e-4, rtol=0
    )
    split = read_split(data_dir, "test")
    query = predict_split(run.model, run.processor, split)[0]
    assert query.max_score == pytest.approx(raw.max_score, abs=1e-4)


def test_a_run_from_before_goes_on_without(run_copy):
    path = run_copy / "config.yaml"
    text = path.read_text()
    assert "  native_prompt: false\n" in text  # as the base has it
    path.write_text(
        text.replace("  native_prompt: false\n", "").replace(
            str(load_config(path).model.name), "facebook/sam3"
        )
    )
    assert read_config(run_copy).model.native_prompt is False
    config = load_config(path)
    assert config.model.native_prompt is None
    assert config.fingerprint() == read_config(run_copy).fingerprint()
    assert state_of(run_copy, config, resume=True, overwrite=False) == "finished"


def test_an_adapter_sets_the_prompt_it_was_trained_with(native_run, run_folder, base, tmp_path):
    model, _ = load_base(base)
    assert base_of(load_adapter(model, native_run.folder)).native_prompt
    model, _ = load_base(base, native_prompt=True)
    assert not base_of(load_adapter(model, run_folder)).native_prompt
    plain = shutil.copytree(native_run.folder, tmp_path / "plain")
    (plain / BASE_FILE).unlink()  # as PEFT alone writes it, on transformers' own model
    model, _ = load_base(base, native_prompt=True)
    assert not base_of(load_adapter(model, plain)).native_prompt


def test_it_is_one_of_the_values_that_decide_a_result():
    path = CONFIGS / "crack_detection_config.yaml"
    off, on = (load_config(path, "tiny", {"model.native_prompt": value}) for value in (False, True))
    assert off.fingerprint() == load_config(path, "tiny").fingerprint() != on.fingerprint()
