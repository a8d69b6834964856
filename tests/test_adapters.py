import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_random import RESOLUTION, save_tiny_base, tiny_model, tiny_processor, token_inputs
from transformers import Sam3Config, Sam3Model

from helpers.config import load_config
from helpers.errors import InputError
from helpers.files import CONFIGS
from helpers.model.audit import adapter_report
from helpers.model.lora import (
    COMPONENTS,
    add_lora,
    load_adapter,
    lora_layers,
    save_adapter,
    target_modules,
)
from helpers.model.prompted import PromptedSam3
from helpers.model.sam3 import base_fingerprint, load_base
from notebooks.examples import prompt_embedding_change

SEED_NAMES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def lora_settings(*components, names=SEED_NAMES, **settings):
    overrides = [f"lora.apply_to_{name}={str(name in components).lower()}" for name in COMPONENTS]
    overrides += [f"lora.{key}={value}" for key, value in settings.items()]
    overrides.append(f"lora.target_modules=[{', '.join(names)}]")
    return load_config(CONFIGS / "crack_detection_config.yaml", overrides=overrides).lora


def full_size_on_meta():
    with torch.device("meta"):
        return PromptedSam3(Sam3Config())


def inputs():
    generator = torch.Generator().manual_seed(3)
    pixel_values = torch.randn(1, 3, RESOLUTION, RESOLUTION, generator=generator)
    return {"pixel_values": pixel_values, **token_inputs(["crack"])}


def moved(model, seed=5):
    """Give every B a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        for matrix in layer.lora_B.values():
            matrix.weight.data = 0.1 * torch.randn(matrix.weight.shape, generator=generator)
    return model


@pytest.fixture
def saved(tmp_path):
    model = moved(add_lora(tiny_model(), lora_settings("vision_encoder", "text_encoder", rank=4)))
    save_adapter(model, tmp_path / "adapter", "data/some_base")
    return tmp_path / "adapter"


def test_seed_config_on_the_full_size_model():
    model = add_lora(
        full_size_on_meta(), lora_settings("vision_encoder", "text_encoder", "mask_decoder")
    )
    report = adapter_report(model)
    assert report["modules"].to_dict() == {
        "vision_encoder": 192,
        "text_encoder": 144,
        "geometry_encoder": 0,
        "detr_encoder": 0,
        "detr_decoder": 0,
        "mask_decoder": 4,
        "total": 340,
    }
    assert report.loc["total", "parameters"] == 17_203_200
    assert report.loc["total", "share"] == pytest.approx(0.0200, abs=5e-4)
    assert report.loc["vision_encoder", "parameters"] == 4_194_304 + 5_898_240
    assert report.loc["text_encoder", "parameters"] == 7_077_888
    assert report["B_norm"].isna().all()


@pytest.mark.filterwarnings("ignore:apply_to_geometry_encoder")
@pytest.mark.parametrize(
    ("component", "names", "modules", "parameters"),
    [
        ("vision_encoder", ["q_proj", "v_proj"], 64, 2_097_152),
        ("vision_encoder", ["q_proj", "k_proj", "v_proj", "out_proj"], 128, 4_194_304),
        ("vision_encoder", ["fc1", "fc2"], 64, 5_898_240),
        ("text_encoder", ["q_proj", "k_proj", "v_proj", "o_proj"], 96, 3_145_728),
        ("detr_encoder", SEED_NAMES, 60, 835_584),
        ("detr_decoder", SEED_NAMES, 84, 1_032_192),
        ("mask_decoder", ["q_proj", "k_proj", "v_proj", "out_proj"], 4, 32_768),
        ("geometry_encoder", SEED_NAMES, 30, 417_792),
    ],
)
def test_counts_of_each_component_at_rank_16(component, names, modules, parameters):
    report = adapter_report(add_lora(full_size_on_meta(), lora_settings(component, names=names)))
    assert report.loc[component, ["modules", "parameters"]].tolist() == [modules, parameters]
    assert report.loc["total", "modules"] == modules


def test_a_component_whose_flag_is_false_is_frozen():
    model = add_lora(tiny_model(), lora_settings("vision_encoder"))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".vision_encoder." in name and ".lora_" in name for name in trainable)


@pytest.mark.filterwarnings("ignore:apply_to_geometry_encoder")
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_flag_changes_the_count(component):
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    others = [name for name in ("vision_encoder", "text_encoder") if name != component]
    without = target_modules(tiny_model(), lora_settings(*others, names=names))
    with_it = target_modules(tiny_model(), lora_settings(*others, component, names=names))
    assert len(with_it[component]) > 0
    assert set(with_it) - set(without) == {component}


def test_unused_projection_of_the_text_tower_is_left_alone():
    names = [*SEED_NAMES, "text_projection"]
    found = target_modules(tiny_model(), lora_settings("text_encoder", names=names))
    assert "text_projection" in found["text_encoder"]
    assert "text_encoder.text_projection" not in found["text_encoder"]
    model = add_lora(tiny_model(), lora_settings("text_encoder", names=names))
    assert {name for name, _ in lora_layers(model)} == set(found["text_encoder"])


def test_both_spellings_of_the_output_projection_may_be_listed():
    lora = lora_settings("vision_encoder", names=["out_proj", "o_proj"])
    assert len(target_modules(tiny_model(), lora)["vision_encoder"]) == 2


def test_name_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match=r"'qkv' matches no linear layer.*q_proj"):
        add_lora(tiny_model(), lora_settings("vision_encoder", names=["q_proj", "qkv"]))


def test_name_that_occurs_only_elsewhere_is_refused_with_the_place():
    with pytest.raises(InputError, match=r"'fc1' matches no linear layer in mask_decoder.*vision"):
        add_lora(tiny_model(), lora_settings("mask_decoder", names=["q_proj", "fc1"]))


def test_enabled_component_without_any_module_is_refused():
    lora = lora_settings("vision_encoder", "mask_decoder", names=["fc1", "fc2"])
    with pytest.raises(InputError, match="occurs in mask_decoder"):
        add_lora(tiny_model(), lora)


def test_geometry_encoder_warns_and_gets_no_gradient():
    with pytest.warns(UserWarning, match="geometry"):
        model = add_lora(tiny_model(), lora_settings("vision_encoder", "geometry_encoder"))
    model(**inputs()).pred_logits.sum().backward()
    report = adapter_report(model)
    assert report.loc["vision_encoder", "grad_norm"] > 0
    assert torch.isnan(torch.tensor(report.loc["geometry_encoder", "grad_norm"]))


def test_second_adapter_on_one_model_is_refused():
    model = add_lora(tiny_model(), lora_settings("vision_encoder"))
    with pytest.raises(InputError, match="already carries"):
        add_lora(model.get_base_model(), lora_settings("vision_encoder"))


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing():
    before = tiny_model()(**inputs())
    after = add_lora(tiny_model(), lora_settings("vision_encoder", "text_encoder")).eval()(
        **inputs()
    )
    for name in ("pred_logits", "pred_masks", "pred_boxes", "presence_logits"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_equal_seeds_draw_equal_adapters():
    drawn = []
    for seed in (1, 1, 2):
        model = tiny_model()
        torch.manual_seed(seed)
        model = add_lora(model, lora_settings("vision_encoder"))
        drawn.append(lora_layers(model)[0][1].lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_adapter_of_a_half_precision_base_is_float32():
    model = add_lora(tiny_model().to(torch.bfloat16), lora_settings("vision_encoder"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_report_sees_which_matrices_moved():
    model = add_lora(tiny_model(), lora_settings("vision_encoder", "mask_decoder"))
    assert adapter_report(model).loc["total", "B_nonzero"] == 0
    _, layer = lora_layers(model)[0]
    layer.lora_B["default"].weight.data.fill_(2.0)
    report = adapter_report(model)
    count = report.loc["vision_encoder", "modules"]
    assert report.loc["vision_encoder", "B_nonzero"] == pytest.approx(1 / count)
    size = layer.lora_B["default"].weight.numel()
    assert report.loc["vision_encoder", "B_norm"] == pytest.approx(2 * size**0.5)
    assert report.loc["mask_decoder", "B_nonzero"] == 0


@torch.no_grad()
def test_loaded_adapter_equals_the_live_one(saved):
    live = moved(add_lora(tiny_model(), lora_settings("vision_encoder", "text_encoder", rank=4)))
    expected = live.eval()(**inputs())
    loaded = load_adapter(tiny_model(), saved)(**inputs())
    assert (expected.pred_logits - tiny_model()(**inputs()).pred_logits).abs().max() > 0.01
    for name in ("pred_logits", "pred_masks", "pred_boxes", "presence_logits"):
        torch.testing.assert_close(loaded[name], expected[name], rtol=0, atol=0)


# PEFT itself asks transformers for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@torch.no_grad()
def test_plain_peft_loads_it_on_the_plain_model(saved, tmp_path):
    save_tiny_base(tmp_path / "base")
    plain = PeftModel.from_pretrained(Sam3Model.from_pretrained(tmp_path / "base").eval(), saved)
    ours = load_adapter(tiny_model(), saved)
    torch.testing.assert_close(plain(**inputs()).pred_logits, ours(**inputs()).pred_logits)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "Sam3Model"
    assert config["base_model_name_or_path"] == "data/some_base"


def test_nothing_else_is_in_the_folder(saved):
    names = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    assert {path.name for path in saved.iterdir()} == names


def test_fingerprint_does_not_see_the_adapter():
    model = moved(add_lora(tiny_model(), lora_settings("vision_encoder")))
    assert base_fingerprint(model) == base_fingerprint(tiny_model())


def edit_weights(folder, edit):
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("with_notes", [True, False], ids=["ours", "bare"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "holds nan in 1 of"),
        (float("inf"), "holds inf in 1 of"),
        (-float("inf"), "holds -inf in 1 of"),
    ],
)
def test_numbers_that_are_none_are_refused_by_file_and_key(saved, value, words, with_notes):
    if not with_notes:
        (saved / "base.json").unlink()

    def edit(weights):
        sorted(weights.items())[3][1].view(-1)[2] = value

    edit_weights(saved, edit)
    key = sorted(load_file(saved / "adapter_model.safetensors"))[3]
    with pytest.raises(InputError, match=words) as caught:
        load_adapter(tiny_model(), saved)
    assert caught.value.where == str(saved / "adapter_model.safetensors")
    assert key in caught.value.message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_whole_numbers_are_refused(saved, dtype):
    def edit(weights):
        name = min(weights)
        weights[name] = weights[name].to(dtype)

    edit_weights(saved, edit)
    with pytest.raises(InputError, match=f"{str(dtype).removeprefix('torch.')} numbers"):
        load_adapter(tiny_model(), saved)


def test_flipped_bits_are_noticed_and_old_adapters_without_a_checksum_load(saved):
    path = saved / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # the lowest bit of a mantissa
    path.write_bytes(content)
    with pytest.raises(InputError, match="bytes are not those that were saved") as caught:
        load_adapter(tiny_model(), saved)
    assert caught.value.where == str(path)
    notes = json.loads((saved / "base.json").read_text())
    for key in ("weights_sha256", "r", "lora_alpha"):
        del notes[key]
    (saved / "base.json").write_text(json.dumps(notes))
    assert lora_layers(load_adapter(tiny_model(), saved))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 1e300),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", "32"),
        ("lora_alpha", None),
        ("r", 0),
        ("r", 4.5),
        ("r", True),
        ("target_modules", "("),
        ("target_modules", 7),
        ("target_modules", [["q_proj"]]),
        ("layers_to_transform", "x"),
        ("layers_to_transform", [0, "x"]),
        ("layers_to_transform", {"a": 1}),
        ("peft_type", "IA3"),
        ("lora_dropout", "x"),
        ("bias", 7),
        ("rank_pattern", 7),
    ],
)
def test_a_damaged_setting_is_refused_by_file(saved, key, value):
    (saved / "base.json").unlink()
    edit_config(saved, **{key: value})
    with pytest.raises(InputError) as caught:
        load_adapter(tiny_model(), saved)
    assert caught.value.where == str(saved / "adapter_config.json")


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_setting_that_differs_from_the_training_is_refused(saved, key):
    trained = json.loads((saved / "adapter_config.json").read_text())[key]
    edit_config(saved, **{key: 2 * trained})
    words = f"{key} is {2 * trained}, but the adapter was trained with {trained:g}"
    with pytest.raises(InputError, match=words):
        load_adapter(tiny_model(), saved)
    (saved / "base.json").unlink()  # a run says it in its config, too
    lora = lora_settings("vision_encoder", "text_encoder", rank=4)
    with pytest.raises(InputError, match=words):
        load_adapter(tiny_model(), saved, lora=lora)


def test_a_git_lfs_pointer_is_named(saved, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (saved / "adapter_model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match=r"Git LFS pointer.*git lfs pull"):
        load_adapter(tiny_model(), saved)
    base = save_tiny_base(tmp_path / "base")
    (base / "model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match=r"Git LFS pointer.*git lfs pull"):
        load_base(base)


def test_a_full_disk_is_one_line_and_leaves_the_old_adapter(saved, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("helpers.model.lora.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_adapter(add_lora(tiny_model(), lora_settings("vision_encoder")), saved, "other")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_missing_key_is_refused(saved):
    edit_weights(saved, lambda weights: weights.pop(next(iter(weights))))
    with pytest.raises(InputError, match="1 of 48 keys missing"):
        load_adapter(tiny_model(), saved)


def test_unexpected_key_is_refused(saved):
    edit_weights(saved, lambda weights: weights.update(extra=torch.zeros(1)))
    with pytest.raises(InputError, match="1 keys unexpected, such as extra"):
        load_adapter(tiny_model(), saved)


def test_adapter_of_another_rank_is_refused(saved):
    (saved / "base.json").unlink()
    edit_config(saved, r=8)
    with pytest.raises(InputError, match="has shape"):
        load_adapter(tiny_model(), saved)


def test_adapter_of_a_base_with_other_weights_is_refused(saved):
    with pytest.raises(InputError, match="made for data/some_base"):
        load_adapter(tiny_model(seed=1), saved)


def test_adapter_of_a_wider_base_is_refused_without_our_notes(saved):
    (saved / "base.json").unlink()
    edit_weights(
        saved,
        lambda weights: weights.update(
            {name: torch.cat([tensor, tensor], 1) for name, tensor in weights.items()}
        ),
    )
    with pytest.raises(InputError, match="another base"):
        load_adapter(tiny_model(), saved)


def test_adapter_for_another_kind_of_model_is_refused(saved):
    (saved / "base.json").unlink()
    edit_config(saved, target_modules=["c_attn"])
    with pytest.raises(InputError, match="another base"):
        load_adapter(tiny_model(), saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base.json"])
def test_truncated_files_are_refused_by_name(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=name):
        load_adapter(tiny_model(), saved)


def test_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_adapter(tiny_model(), tmp_path / "nothing")
    with pytest.raises(InputError, match="adapter_config"):
        load_adapter(tiny_model(), tmp_path)


def test_failed_save_leaves_the_old_adapter(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = add_lora(tiny_model(), lora_settings("vision_encoder"))
    monkeypatch.setattr("helpers.model.lora.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(model, saved, "other")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_prompt_embeddings_move_only_with_text_lora():
    processor = tiny_processor()
    vision = moved(add_lora(tiny_model(), lora_settings("vision_encoder"))).eval()
    text = moved(add_lora(tiny_model(), lora_settings("text_encoder"))).eval()
    assert (
        prompt_embedding_change(vision, processor, ["crack", "dog"])["relative_change"] == 0
    ).all()
    table = prompt_embedding_change(text, processor, ["crack", "dog"])
    assert (table["relative_change"] > 0.01).all()
    assert table.loc["crack", "nearest"] == "dog"


def test_copy_of_an_adapter_folder_still_loads(saved, tmp_path):
    copied = shutil.copytree(saved, tmp_path / "elsewhere")
    assert len(lora_layers(load_adapter(tiny_model(), copied))) == 24
