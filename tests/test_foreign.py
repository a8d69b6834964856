"""What other programs saved is imported exactly, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Sam3Config, Sam3Model

from helpers.__main__ import main
from helpers.errors import InputError
from helpers.files import TINY_BASE
from helpers.foreign import import_source, to_hf, to_native, write_sompote
from helpers.model.lora import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, load_adapter
from helpers.model.prompted import PromptedSam3

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
BASE = FOREIGN / "base"
EXPECTED = load_file(FOREIGN / "expected.safetensors")
INPUTS = load_file(FOREIGN / "inputs.safetensors")
TOLERANCES = {"pred_logits": 2e-4, "pred_boxes_xyxy": 2e-5, "presence_logit": 2e-4}
TOLERANCES |= {"pred_masks_some": 5e-4}
LORA = "best_lora_weights.pt"
CASES = {  # status, kind, rank, alpha, modules, codes
    "full_config_r4_alpha_r": (
        0,
        "sompote_lora",
        4,
        4,
        75,
        "no_counterpart missing_geometry_token",
    ),
    "text_attention_r8": (0, "sompote_lora", 8, 16, 12, ""),
    "twin_orientation": (
        1,
        "twin_lora",
        8,
        16,
        25,
        "adapter_partly_at_zero missing_geometry_token",
    ),
    "trainer_checkpoint": (
        *(0, "meta_full", None, None, None),
        "native_settings weights_not_loaded no_counterpart no_processor",
    ),
}


@torch.no_grad()
def answers(model, native):
    """Ask a plain `Sam3Model` the four questions of `EXPECTED`."""
    token = {"input_boxes": torch.zeros(4, 1, 4), "input_boxes_labels": torch.full((4, 1), -10)}
    outputs = model.eval()(
        pixel_values=INPUTS["pixel_values"].repeat_interleave(2, 0),
        input_ids=INPUTS["input_ids"].repeat(2, 1),
        attention_mask=INPUTS["attention_mask"].repeat(2, 1),
        **(token if native else {}),
    )
    return {
        "pred_logits": outputs.pred_logits,
        "pred_boxes_xyxy": outputs.pred_boxes,
        "presence_logit": outputs.presence_logits,
        "pred_masks_some": outputs.pred_masks[[0, 3]][:, [0, 11]],
    }


def assert_native(model, case):
    for mode in ("native", "nocls"):
        for name, tensor in answers(model, mode == "native").items():
            expected = EXPECTED.get(f"{case}/{mode}.{name}")
            if expected is None:  # masks without the token are left out, for their size
                continue
            expected = expected.clamp(-10, 10) if name == "presence_logit" else expected
            gap = (tensor - expected).abs().max()
            assert gap < TOLERANCES[name], (mode, name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_an_import_answers_as_metas_model_does(case, tmp_path):
    report = import_source(FOREIGN / case, tmp_path / "out", base=BASE)
    codes = [finding.code for finding in report.findings]
    facts = (report.kind, report.rank, report.alpha, report.modules)
    assert (report.status, *facts, " ".join(codes)) == CASES[case]
    if report.rank is None:
        model = Sam3Model.from_pretrained(tmp_path / "out")
    else:
        model = PeftModel.from_pretrained(Sam3Model.from_pretrained(BASE), tmp_path / "out")
    assert_native(model, case)


def test_this_package_asks_an_import_with_the_native_token(tmp_path):
    case = "text_attention_r8"
    import_source(FOREIGN / case, tmp_path / "out", base=BASE)
    model = load_adapter(PromptedSam3.from_pretrained(BASE), tmp_path / "out")
    index = torch.tensor([0, 0, 1, 1])
    prompts = {name: INPUTS[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        outputs = model(pixel_values=INPUTS["pixel_values"], image_index=index, **prompts)
    gap = outputs.pred_logits - EXPECTED[f"{case}/native.pred_logits"]
    assert gap.abs().max() < TOLERANCES["pred_logits"]
    assert EXPECTED[f"{case}/nocls.pred_logits"].sub(outputs.pred_logits).abs().max() > 1


@pytest.fixture
def edited(tmp_path):
    """Return a function that writes a changed copy of text_attention_r8 and returns its folder."""

    def edit(change=lambda tensors: tensors, settings=None, name=LORA):
        folder = tmp_path / "edited"
        folder.mkdir()
        content = change(torch.load(FOREIGN / "text_attention_r8" / LORA))
        torch.save(content, folder / name)
        yaml = YAML().load(FOREIGN / "text_attention_r8" / "config.yaml")
        yaml["lora"] |= settings or {}
        YAML().dump(yaml, folder / "config.yaml")
        return folder

    return edit


def renamed(*pair):
    return lambda tensors: {key.replace(*pair): tensor for key, tensor in tensors.items()}


def prefixed(prefix):
    return lambda tensors: {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def changed(name, function):
    """Return a change of the tensors whose keys end in `name`."""
    return lambda tensors: {
        key: function(tensor.data) if key.endswith(name) else tensor
        for key, tensor in tensors.items()
    }


def without_first(name):
    def change(tensors):
        del tensors[next(key for key in tensors if key.endswith(name))]
        return tensors

    return change


BLOCK = "backbone.language_backbone.encoder.transformer.resblocks.1"
HEAD = "segmentation_head.cross_attend_prompt"
NAN_KEY = f"{BLOCK}.attn.v_proj.lora.lora_B"


@pytest.mark.parametrize(
    ("change", "settings", "expected"),
    [
        (changed(NAN_KEY, lambda B: B * torch.nan), {}, f"{NAN_KEY} holds nan"),
        (changed(NAN_KEY, lambda B: B / 0), {}, NAN_KEY),
        (changed(NAN_KEY, lambda B: B.double() * 1e300), {}, f"{NAN_KEY} holds "),  # inf in float32
        (changed(NAN_KEY, lambda B: B + 1j), {}, f"{NAN_KEY} holds complex64 numbers"),
        (changed(NAN_KEY, lambda B: B.to_sparse()), {}, "float32 numbers (sparse_coo, cpu)"),
        (changed(NAN_KEY, lambda B: B.to("meta")), {}, "float32 numbers (strided, meta)"),
        (changed(NAN_KEY, lambda B: B[:0]), {}, "shape (0, 24), besides LoRA"),
        (without_first("lora_A"), {}, "lora_B has no lora_A beside it"),
        (without_first("lora_B"), {}, "lora_A has no lora_B beside it"),
        (renamed("resblocks.1", "resblocks.7"), {}, f"{BLOCK[:-1]}7.attn"),
        (changed("lora_A", lambda A: torch.cat([A, A])), {}, "the base it was trained on"),
        (renamed("segmentation_head", "lm_head"), {}, "modules that SAM3 has not"),
        (
            lambda tensors: {
                key.replace(f"{HEAD}.q_proj", "geometry_encoder.points_direct_project"): tensor
                for key, tensor in only(f"{HEAD}.q_proj")(tensors).items()
            },
            {},
            "adapts 1 modules that SAM3 has not",
        ),
        (lambda tensors: tensors | fuse(tensors)[0], {}, "twice, in one matrix and apart"),
        (lambda tensors: {}, {}, "holds no tensor"),
        (lambda tensors: [1], {}, "holds no tensor but a list"),
        (lambda tensors: tensors | {"epoch_bias": torch.zeros(3)}, {}, "holds epoch_bias"),
        (lambda tensors: tensors, {"rank": 16}, "the rank is 16 here and 8 in the shapes"),
        (lambda tensors: tensors, {"alpha": None}, "give alpha with --alpha; usual is twice"),
        (lambda tensors: tensors, {"alpha": "high"}, "alpha is 'high'"),
        (lambda tensors: tensors, {"alpha": -16}, "alpha is -16"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(change, settings, expected, edited, tmp_path):
    with pytest.raises(InputError) as caught:
        import_source(edited(change, settings), tmp_path / "out", base=BASE)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ((FOREIGN / "text_attention_r8" / LORA).read_bytes()[:9000], "cut off"),
        (b"<!DOCTYPE html>", "no file of torch"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_named(content, expected, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected):
        import_source(path, tmp_path / "out", base=BASE, alpha=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_safetensors_and_torch_are_told_apart_by_content(edited, legacy, tmp_path):
    folder = edited()
    tensors = {key: tensor.data for key, tensor in torch.load(folder / LORA).items()}
    import_source(folder, tmp_path / "expected", base=BASE)
    if legacy:
        torch.save(tensors, folder / LORA, _use_new_zipfile_serialization=False)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / LORA)
    import_source(folder, tmp_path / "out", base=BASE)
    files = [tmp_path / name / WEIGHTS_FILE for name in ("expected", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_flipped_bit_is_seen(edited, tmp_path):
    folder = edited()
    content = bytearray((folder / LORA).read_bytes())
    value = torch.load(folder / LORA)[NAN_KEY].data.contiguous().numpy().tobytes()
    content[content.index(value) + 3] ^= 1
    (folder / LORA).write_bytes(content)
    with pytest.raises(InputError, match="the checksum of .* differs"):
        import_source(folder, tmp_path / "out", base=BASE)
    assert not (tmp_path / "out").exists()


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_in_a_file_is_executed(is_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, "evil.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match="would run their code"):
        import_source(tmp_path / "evil.pt", tmp_path / "out", base=BASE)
    assert not Path("executed").exists()


def only(*parts):
    return lambda tensors: {k: v for k, v in tensors.items() if any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("case", "change", "status", "code"),
    [
        ("text_attention_r8", prefixed("module."), 1, "wrapped_keys"),
        ("text_attention_r8", prefixed("detector."), 0, "prefix_removed"),
        ("text_attention_r8", changed("lora_B", torch.zeros_like), 1, "adapter_at_zero"),
        ("text_attention_r8", changed(NAN_KEY, torch.zeros_like), 1, "adapter_partly_at_zero"),
        ("text_attention_r8", only(HEAD), 1, "no_word_module"),
        ("full_config_r4_alpha_r", only("mlp.fc"), 1, "lora_elsewhere"),
        # natively they get no gradient
        (
            "full_config_r4_alpha_r",
            changed("geometry_encoder.encode.0.self_attn.q_proj.lora.lora_B", torch.zeros_like),
            0,
            None,
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(case, change, status, code, tmp_path):
    torch.save(change(torch.load(FOREIGN / case / LORA)), tmp_path / LORA)
    config = FOREIGN / case / "config.yaml"
    report = import_source(tmp_path / LORA, tmp_path / "out", config=config, base=BASE)
    assert report.status == status
    codes = {finding.code for finding in report.findings}
    assert code is None or code in codes
    assert (status == 1) == bool(
        codes - {"no_counterpart", "missing_geometry_token", "prefix_removed"}
    )


def test_alpha_of_the_user_takes_the_place_of_a_yaml(edited, tmp_path):
    folder = edited(settings={"rank": 16, "alpha": 32})
    assert import_source(folder, tmp_path / "out", base=BASE, alpha=12).alpha == 12
    with pytest.raises(InputError, match=r"^--alpha: alpha is -1\. "):
        import_source(folder, tmp_path / "other", base=BASE, alpha=-1)


@pytest.mark.parametrize("factor", [0, 1])
def test_a_lora_that_is_zero_is_called_so_even_without_alpha(factor, edited, tmp_path):
    def scale(tensors):
        return {key: t * (factor if key.endswith("lora_B") else 1) for key, t in tensors.items()}

    folder = edited(scale, settings={"alpha": None})
    with pytest.raises(InputError, match="alpha is not in the weights") as caught:
        import_source(folder, tmp_path / "out", base=BASE)
    assert ("every B is zero" in str(caught.value)) == (factor == 0)


def test_an_open_orientation_is_refused_until_it_is_given(edited, tmp_path):
    def widen(tensors):  # rank 24 in layers of 24 x 24
        wide = {key: nn.functional.pad(t.data, (0, 24 - t.shape[1])) for key, t in tensors.items()}
        return {key: nn.functional.pad(t, (0, 0, 0, 24 - len(t))) for key, t in wide.items()}

    folder = edited(lambda tensors: widen(only(BLOCK)(tensors)), {"rank": 24, "alpha": 48})
    with pytest.raises(InputError, match="their orientation is open"):
        import_source(folder, tmp_path / "out", base=BASE)
    written = {}
    for name in ("native", "peft"):
        import_source(folder, tmp_path / name, base=BASE, orientation=name)
        written[name] = load_file(tmp_path / name / WEIGHTS_FILE)
    assert all(tensor.equal(written["peft"][key].T) for key, tensor in written["native"].items())


def fuse(tensors):
    """Return LoRA of q, k and v in one matrix, and the same apart, with one A."""
    apart, whole = dict(tensors), dict(tensors)
    A = tensors[f"{BLOCK}.attn.q_proj.lora.lora_A"].data
    B = [whole.pop(f"{BLOCK}.attn.{name}_proj.lora.lora_B").data for name in "qkv"]
    for name in "qkv":
        apart[f"{BLOCK}.attn.{name}_proj.lora.lora_A"] = A
        del whole[f"{BLOCK}.attn.{name}_proj.lora.lora_A"]
    whole |= {f"{BLOCK}.attn.qkv.lora.lora_A": A, f"{BLOCK}.attn.qkv.lora.lora_B": torch.cat(B, 1)}
    return whole, apart


def test_q_k_and_v_in_one_matrix_are_taken_apart(tmp_path):
    source, results = FOREIGN / "text_attention_r8", []
    for number, tensors in enumerate(fuse(torch.load(source / LORA))):
        torch.save(tensors, tmp_path / f"{number}.pt")
        out, config = tmp_path / f"out{number}", source / "config.yaml"
        import_source(tmp_path / f"{number}.pt", out, config=config, base=BASE)
        results.append(load_file(out / WEIGHTS_FILE))
    assert results[0].keys() == results[1].keys()
    assert all(tensor.equal(results[1][key]) for key, tensor in results[0].items())


def save_peft(folder, tensors, base, **more):
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": base}
    content |= more
    (folder / CONFIG_FILE).write_text(json.dumps(content))


def test_peft_on_metas_model_is_renamed_and_another_base_refused(tmp_path):
    whole, apart = fuse(torch.load(FOREIGN / "text_attention_r8" / LORA))
    # As PEFT names an nn.MultiheadAttention: it carries LoRA itself, and its out_proj lies inside.
    tensors = {
        "base_model.model."
        + key.replace(".qkv", "").replace("out_proj", "base_layer.out_proj").replace(".lora.", ".")
        + ".weight": tensor.data.T
        for key, tensor in whole.items()
    }
    save_peft(tmp_path / "meta", tensors, "somewhere")
    report = import_source(tmp_path / "meta", tmp_path / "out", base=BASE)
    assert (report.kind, report.rank, report.alpha) == ("peft_over_meta", 8, 16)
    written = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for key, tensor in apart.items():
        module, letter = key.split(".lora.")
        [hf] = to_hf(module)
        assert written[f"base_model.model.{hf}.{letter}.weight"].equal(tensor.data.T)
    save_peft(tmp_path / "newer", tensors, "facebook/SAM3.1")
    with pytest.raises(InputError, match="the base is facebook/SAM3.1"):
        import_source(tmp_path / "newer", tmp_path / "other", base=BASE)
    with pytest.raises(InputError, match="the base is facebook/sam3.1"):
        import_source(tmp_path / "meta", tmp_path / "other", base="facebook/sam3.1")
    for number, more in enumerate([{"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}]):
        save_peft(tmp_path / str(number), tensors, "somewhere", **more)
        with pytest.raises(InputError, match="more than LoRA"):
            import_source(tmp_path / str(number), tmp_path / "other", base=BASE)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("shared_A", [False, True])
def test_own_adapter_written_for_metas_model_comes_back_bit_for_bit(shared_A, run_folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE, BASE_FILE):
        shutil.copy(run_folder / name, adapter / name)
    tensors = load_file(adapter / WEIGHTS_FILE)
    if shared_A:
        for key in tensors:
            if "vision" in key and (".k_proj.lora_A" in key or ".v_proj.lora_A" in key):
                tensors[key] = tensors[
                    key.replace(".k_proj", ".q_proj").replace(".v_proj", ".q_proj")
                ].clone()
        save_file(tensors, adapter / WEIGHTS_FILE)
    base = json.loads((adapter / BASE_FILE).read_text())["name"]
    path = write_sompote(adapter, tmp_path / "sompote", {"training": {"num_epochs": 2}})
    assert any(".qkv.lora" in key for key in torch.load(path)) == shared_A
    assert YAML().load(path.with_name("config.yaml"))["training"] == {"num_epochs": 2}
    report = import_source(tmp_path / "sompote", tmp_path / "back", base=base)
    assert report.kind == "sompote_lora"
    back = load_file(tmp_path / "back" / WEIGHTS_FILE)
    assert back.keys() == tensors.keys()
    assert all(tensor.equal(back[key]) for key, tensor in tensors.items())
    again = import_source(adapter, tmp_path / "again")
    assert (again.kind, again.base, again.alpha) == ("peft", base, report.alpha)
    kept = json.loads((tmp_path / "again" / BASE_FILE).read_text())
    assert kept["fingerprint"] == json.loads((adapter / BASE_FILE).read_text())["fingerprint"]


def test_a_folder_of_transformers_is_copied_whole(tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    other = {"detr_decoder.reference_points.weight": torch.ones(2)}
    save_file(other, tmp_path / "base" / "model_old.safetensors")  # transformers reads it not
    report = import_source(tmp_path / "base", tmp_path / "out")
    assert (report.kind, report.findings) == ("hf_full", [])
    before, after = (load_file(f / "model.safetensors") for f in (TINY_BASE, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda model: model.pop("transformer.decoder.norm.bias"),
            "1 missing, such as detr_decoder",
        ),
        (lambda model: model.update(extra=torch.zeros(2)), "1 unexpected, such as extra"),
        (
            lambda model: model.update({"transformer.decoder.norm.bias": torch.zeros(3)}),
            r"output_layer_norm.bias \(3,\) in place of \(16,\)",
        ),
        (
            lambda model: model["transformer.decoder.norm.bias"].fill_(torch.nan),
            "norm.bias holds nan",
        ),
        (
            lambda model: model.update({"transformer.decoder.norm.bias": torch.zeros(16).cfloat()}),
            "norm.bias holds complex64 numbers",
        ),
        (
            lambda model: model.update({f"{BLOCK}.attn.in_proj_bias": torch.tensor(0.5)}),
            "2 missing, such as .*; 1 of another shape",
        ),
        (
            lambda model: model.update({"backbone.vision_backbone.trunk.pos_embed": torch.ones(9)}),
            r"position_embeddings \(9,\) in place of",
        ),
    ],
)
def test_a_checkpoint_is_complete_or_refused(change, expected, tmp_path):
    content = torch.load(FOREIGN / "trainer_checkpoint" / "checkpoint.pt")
    change(content["model"])
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=expected):
        import_source(tmp_path, tmp_path / "out", base=BASE)
    assert not (tmp_path / "out").exists()


def test_tracker_of_the_released_file_is_left_out(tmp_path):
    model = torch.load(FOREIGN / "trainer_checkpoint" / "checkpoint.pt")["model"]
    released = {f"detector.{key}": tensor for key, tensor in model.items()}
    released["detector.backbone.vision_backbone.sam2_convs.0.conv_1x1.bias"] = torch.zeros(16)
    released["tracker.maskmem_tpos_enc"] = torch.zeros(7)
    torch.save(released, tmp_path / "sam3.pt")
    report = import_source(tmp_path / "sam3.pt", tmp_path / "out", base=BASE)
    messages = {finding.code: finding.message for finding in report.findings}
    assert messages["tracker_left_out"].startswith("2 tensors of the tracker")
    assert "'detector.'" in messages["prefix_removed"]
    assert "weights_not_loaded" not in messages
    assert_native(Sam3Model.from_pretrained(tmp_path / "out"), "trainer_checkpoint")


def test_map_of_names_covers_facebook_sam3():
    with torch.device("meta"):
        model = Sam3Model(Sam3Config())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear.remove("text_encoder.text_projection")  # CLIP's own, a parameter in Meta's code
    # All places of LoRA in Meta's model at full size, where q, k and v of 32 blocks count once.
    lora = [name for name in linear if not name.endswith(("layer1", "layer2", "layer3"))]
    lora = [name for name in lora if "mask_embedder" not in name and name != "text_projection"]
    assert len(lora) == 519
    assert all(to_hf(to_native(name)) == (name,) for name in linear)


def test_command_says_what_it_did(tmp_path, capsys):
    source = str(FOREIGN / "text_attention_r8" / LORA)
    arguments = ["import", source, "--base", str(BASE), "--json", "--output"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {key: document[key] for key in ("kind", "rank", "alpha", "modules", "findings")} == {
        "kind": "sompote_lora",
        "rank": 8,
        "alpha": 16,
        "modules": 12,
        "findings": [],
    }
    assert main([*arguments, str(tmp_path / "out")]) == 2  # not empty now
    assert "is not an empty folder" in capsys.readouterr().err
