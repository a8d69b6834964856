import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_random import MASK_SIZE, RESOLUTION, save_tiny_base, tiny_config, tiny_model, token_inputs
from torchvision.ops import box_convert
from transformers import Sam3Model, Sam3VideoConfig

from helpers.errors import InputError
from helpers.model.prompted import PromptedSam3, checkpoint_activations
from helpers.model.sam3 import base_fingerprint, load_base

OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied_base(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def images(count, seed=0):
    return torch.randn(
        count, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def test_each_row_equals_a_pass_of_its_own_through_the_plain_model():
    model, pixel_values = tiny_model(), images(2)
    tokens = token_inputs(["crack", "joint", "moss wall", "dog"])
    image_index = torch.tensor([0, 1, 1, 0])
    outputs = model(pixel_values=pixel_values, **tokens, image_index=image_index)
    assert outputs.pred_logits.std() > 0.1  # the comparison below is not one of zeros
    for row, image in enumerate(image_index.tolist()):
        alone = Sam3Model.forward(
            model,
            pixel_values=pixel_values[image : image + 1],
            **{name: tensor[row : row + 1] for name, tensor in tokens.items()},
        )
        for name in OUTPUTS:
            torch.testing.assert_close(outputs[name][row], alone[name][0], rtol=1e-4, atol=2e-5)


def test_vision_encoder_runs_once_per_image():
    model, seen = tiny_model(), []
    model.vision_encoder.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    tokens = token_inputs(["crack"] * 5)
    model(pixel_values=images(2), **tokens, image_index=torch.tensor([0, 0, 0, 1, 1]))
    assert seen == [2]


@torch.no_grad()
def test_aux_layers_are_what_the_heads_make_of_each_decoder_layer():
    model, tokens = tiny_model(), token_inputs(["crack", "joint"])
    outputs = model(pixel_values=images(2), **tokens)
    assert len(outputs.aux) == model.config.detr_decoder_config.num_layers - 1
    boxes_xyxy = box_convert(outputs.pred_boxes_cxcywh, "cxcywh", "xyxy")
    torch.testing.assert_close(boxes_xyxy, outputs.pred_boxes)
    shallow = tiny_model()
    shallow.detr_decoder.layers = shallow.detr_decoder.layers[:1]
    first = shallow(pixel_values=images(2), **tokens)
    for name, value in outputs.aux[0].items():
        torch.testing.assert_close(value, first[name])


def test_dropout_of_the_scoring_head_is_drawn_once_for_all_layers():
    model = tiny_model()
    scored = []
    model.dot_product_scoring.register_forward_hook(lambda _m, _a, out: scored.append(out))
    model.dot_product_scoring.train()
    outputs = model(pixel_values=images(1), **token_inputs(["crack"]))
    assert len(scored) == 1
    torch.testing.assert_close(scored[0][0, ..., 0], outputs.aux[0]["pred_logits"])


def test_one_image_serves_all_prompts_without_an_index():
    outputs = tiny_model()(pixel_values=images(1), **token_inputs(["crack", "dog", "moss"]))
    assert outputs.pred_masks.shape == (3, 10, MASK_SIZE, MASK_SIZE)


@torch.no_grad()
def test_vision_features_can_be_reused():
    model, tokens = tiny_model(), token_inputs(["crack", "dog"])
    index = torch.tensor([1, 1])
    features = model.get_vision_features(pixel_values=images(2))
    again = model(vision_embeds=features, **tokens, image_index=index)
    direct = model(pixel_values=images(2), **tokens, image_index=index)
    torch.testing.assert_close(again.pred_masks, direct.pred_masks)


def test_padding_is_never_read_silently():
    tokens = token_inputs(["crack"])
    with pytest.raises(ValueError, match="attention_mask"):
        tiny_model()(pixel_values=images(1), input_ids=tokens["input_ids"])


@pytest.mark.parametrize("index", [None, torch.tensor([0, 2, 1]), torch.tensor([0, 1])])
def test_images_and_prompts_that_cannot_be_paired_are_refused(index):
    tokens = token_inputs(["crack", "dog", "moss"])
    with pytest.raises(ValueError, match="image_index"):
        tiny_model()(pixel_values=images(2), **tokens, image_index=index)


def test_keys_are_those_of_the_plain_model():
    assert list(tiny_model().state_dict()) == list(Sam3Model(tiny_config()).state_dict())


def test_activation_checkpointing_keeps_less_and_leaves_the_gradients_as_they_are():
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            checkpoint_activations(model)
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        torch.manual_seed(1)  # dropout is drawn once, and as without checkpoints
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs = model(pixel_values=images(1), **token_inputs(["crack", "dog"]))
        (outputs.pred_logits.sum() + outputs.pred_masks.mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    compared = [name for name, gradient in gradients[0].items() if gradient is not None]
    assert {name.partition(".")[0] for name in compared} >= {
        "vision_encoder",
        "text_encoder",
        "detr_encoder",
        "detr_decoder",
        "mask_decoder",
    }
    for name in compared:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5)
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("part", ["detr_encoder", "detr_decoder"])
def test_layers_of_the_detr_are_checkpointed(part):
    model, runs = tiny_model().train(), []
    checkpoint_activations(model)
    model.get_submodule(f"{part}.layers.0.mlp").register_forward_hook(lambda *_: runs.append(1))
    outputs = model(pixel_values=images(1), **token_inputs(["crack"]))
    assert len(runs) == 1
    outputs.pred_masks.mean().backward()
    assert len(runs) == 2
    with torch.no_grad():
        model(pixel_values=images(1), **token_inputs(["crack"]))
    assert len(runs) == 3


def test_load_base_is_exact_and_in_float32(base):
    model, processor = load_base(base)
    assert isinstance(model, PromptedSam3)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, tensor in tiny_model().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    assert processor.image_processor.size["height"] == RESOLUTION


def test_resolution_can_be_chosen(base):
    model, processor = load_base(base, resolution=112)
    pixel_values = processor.image_processor(
        images=torch.zeros(3, 30, 50, dtype=torch.uint8), return_tensors="pt"
    )["pixel_values"]
    assert pixel_values.shape[-2:] == (112, 112)
    outputs = model(pixel_values=pixel_values, **token_inputs(["crack"]))
    assert outputs.pred_masks.shape[-1] == model.mask_size == 56


def test_resolution_that_the_patches_do_not_divide_is_refused(base):
    with pytest.raises(InputError, match=r"100 is not a multiple.*8 pixels.*use 96"):
        load_base(base, resolution=100)


def test_checkpoint_of_the_video_model_loads(base, tmp_path):
    # facebook/sam3 is published in this form: prefixed keys, tracker beside the detector.
    weights = load_file(base / "model.safetensors")
    prefixed = {f"detector_model.{name}": tensor for name, tensor in weights.items()}
    prefixed["tracker_model.memory"] = torch.zeros(3)
    folder = shutil.copytree(base, tmp_path / "video")
    save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    Sam3VideoConfig(detector_config=tiny_config().to_dict()).save_pretrained(folder)
    model, _ = load_base(folder)
    assert base_fingerprint(model) == base_fingerprint(tiny_model())


def test_fingerprint_tells_bases_of_one_shape_apart():
    assert base_fingerprint(tiny_model(0)) == base_fingerprint(tiny_model(0))
    assert base_fingerprint(tiny_model(0)) != base_fingerprint(tiny_model(1))


def test_missing_folder_and_folder_without_model(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_base(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"config\.json"):
        load_base(tmp_path)


def test_gated_base_without_access_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        load_base("facebook/sam3-no-such-model")
    for part in ("ask for access", "hf auth login", "tiny"):
        assert part in str(caught.value)


def test_other_model_types_are_refused(copied_base):
    config = json.loads((copied_base / "config.json").read_text())
    (copied_base / "config.json").write_text(json.dumps(config | {"model_type": "sam"}))
    with pytest.raises(InputError, match="'sam'"):
        load_base(copied_base)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(copied_base, damage):
    path = copied_base / "model.safetensors"
    weights = load_file(path)
    name = "detr_decoder.box_head.layer1.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["detr_decoder.box_head.layer9.weight"] = torch.zeros(2)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"box_head\.layer"):
        load_base(copied_base)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_truncated_files_are_one_line(copied_base, name):
    path = copied_base / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError) as caught:
        load_base(copied_base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_absent_files_are_refused(copied_base, name):
    (copied_base / name).unlink()
    with pytest.raises(InputError):
        load_base(copied_base)
