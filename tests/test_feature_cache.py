import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_random import tiny_run_config

from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.errors import InputError
from helpers.files import CONFIGS, ROOT
from helpers.model.cache import BackboneCache, text_states
from helpers.model.sam3 import load_base
from helpers.train.training import train

FROZEN_VISION = ("lora.apply_to_vision_encoder=false", "lora.apply_to_text_encoder=true")


@pytest.fixture
def records(data_dir):
    return read_split(data_dir, "train").records


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_kept_states_are_what_the_backbone_says(base, records, tmp_path, dtype):
    model, processor = load_base(base, dtype=dtype)
    cache = BackboneCache(tmp_path, model, processor)
    cache.fill(records, batch_size=4)
    dataset = PromptDataset(
        read_split(records[0].path.parent.parent, "train"),
        processor,
        resolution=model.resolution,
        mask_size=model.mask_size,
    )
    record = dataset.records[1]
    direct = model.backbone_states(dataset[1]["pixel_values"][None])[0]
    assert cache.states(record).dtype == dtype
    assert cache.bytes_per_image == direct.numel() * dtype.itemsize
    torch.testing.assert_close(cache.states(record), direct, rtol=1e-5, atol=1e-5)
    assert direct.std() > 0.1


@torch.no_grad()
def test_model_answers_the_same_from_kept_features(base, records):
    model, processor = load_base(base)
    pixels = processor.image_processor(
        images=[torch.zeros(3, 56, 56), torch.ones(3, 56, 56) * 200], return_tensors="pt"
    )["pixel_values"]
    prompts = ["crack", "moss", "dog"]
    tokens = PromptCollator(processor).tokenize(prompts)
    index = torch.tensor([0, 1, 1])
    direct = model(pixel_values=pixels, image_index=index, **tokens)
    states = text_states(model, processor, prompts)
    kept = model(
        backbone_states=model.backbone_states(pixels),
        text_states=torch.stack([states[prompt] for prompt in prompts]),
        attention_mask=tokens["attention_mask"],
        image_index=index,
    )
    for name in ("pred_logits", "presence_logits", "pred_boxes", "pred_masks", "semantic_logits"):
        torch.testing.assert_close(kept[name], direct[name], rtol=1e-4, atol=1e-5)
    assert direct.pred_logits.std() > 0.1


def test_training_from_kept_features_gives_the_same_losses(base, data_dir, tmp_path):
    plain = train(tiny_run_config(base, data_dir, *FROZEN_VISION), output_dir=tmp_path / "plain")
    cache = f"training.feature_cache={tmp_path / 'features'}"
    config = tiny_run_config(base, data_dir, *FROZEN_VISION, cache)
    first = train(config, output_dir=tmp_path / "first")
    second = train(config, output_dir=tmp_path / "second")  # finds the features
    assert losses(first) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(second) == losses(first)
    assert len(losses(plain)) == 6
    assert first.metrics["valid"] == pytest.approx(plain.metrics["valid"], abs=1e-4, nan_ok=True)


def test_frozen_text_is_kept_in_memory_while_vision_is_trained(base, data_dir, tmp_path):
    settings = ("lora.apply_to_vision_encoder=true", "lora.apply_to_text_encoder=false")
    plain = train(tiny_run_config(base, data_dir, *settings), output_dir=tmp_path / "plain")
    cache = f"training.feature_cache={tmp_path / 'features'}"
    config = tiny_run_config(base, data_dir, *settings, cache)
    kept = train(config, output_dir=tmp_path / "kept")
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-4)
    assert not (tmp_path / "features").exists()


def test_backbone_runs_once_per_image(base, data_dir, tmp_path, monkeypatch):
    from transformers.models.sam3.modeling_sam3 import Sam3ViTModel

    seen, forward = [], Sam3ViTModel.forward

    def counting(self, pixel_values, **kwargs):
        seen.append(len(pixel_values))
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(Sam3ViTModel, "forward", counting)
    cache = f"training.feature_cache={tmp_path / 'features'}"
    config = tiny_run_config(base, data_dir, *FROZEN_VISION, cache)
    train(config, output_dir=tmp_path / "run")
    assert sum(seen) == 6 + 3  # train and valid, over two epochs with a validation each
    seen.clear()
    train(config, output_dir=tmp_path / "again")
    assert not seen


def test_files_are_named_by_what_decides_their_content(base, records, tmp_path):
    model, processor = load_base(base)
    cache = BackboneCache(tmp_path / "a", model, processor)
    assert BackboneCache(tmp_path / "a", *load_base(base)).folder == cache.folder
    with torch.no_grad():
        model.vision_encoder.backbone.layers[1].mlp.fc1.bias[3] += 1e-3
    changed = [
        BackboneCache(tmp_path / "a", model, processor),
        BackboneCache(tmp_path / "a", *load_base(base, resolution=112)),
        BackboneCache(tmp_path / "a", *load_base(base, dtype=torch.bfloat16)),
    ]
    processor = load_base(base)[1]
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    changed.append(BackboneCache(tmp_path / "a", load_base(base)[0], processor))
    assert len({one.folder for one in (cache, *changed)}) == 5


def test_equal_pictures_share_a_file_and_a_changed_one_is_computed_anew(base, data_dir, tmp_path):
    copied = shutil.copytree(data_dir, tmp_path / "data")
    pictures = sorted((copied / "train").glob("*.png"))
    shutil.copy(pictures[0], pictures[1])
    cache = BackboneCache(tmp_path / "cache", *load_base(base))
    records = read_split(copied, "train").records
    assert len(cache.missing(records)) == 5
    cache.fill(records)
    assert len(files_of(cache.folder)) == 5
    assert not cache.missing(records)
    shutil.copy(pictures[3], pictures[1])
    os.remove(pictures[2])
    shutil.copy(copied / "valid" / "valid_0.png", pictures[2])
    fresh = BackboneCache(tmp_path / "cache", *load_base(base))
    assert [record.path for record in fresh.missing(records)] == [pictures[2]]


def test_a_full_disk_is_refused_before_anything_is_computed(base, records, tmp_path, monkeypatch):
    cache = BackboneCache(tmp_path / "cache", *load_base(base))
    needed = len(records) * cache.bytes_per_image
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=f"{len(records)} images need"):
        cache.fill(records)
    assert not cache.folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    cache.fill(records)
    assert len(files_of(cache.folder)) == len(records)


def test_a_kill_leaves_whole_files_only(base, data_dir, records, tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "from helpers.model import cache as f; from helpers.model.sam3 import load_base\n"
        "from helpers.data.coco import read_split\n"
        "written, save = [], f.write_tensors\n"
        "def dying(path, tensors, metadata):\n"
        "    if len(written) == 2:\n"
        "        path.write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "    written.append(path); save(path, tensors, metadata)\n"
        "f.write_tensors = dying\n"
        f"cache = f.BackboneCache({str(tmp_path)!r}, *load_base({str(base)!r}))\n"
        f"cache.fill(read_split({str(data_dir)!r}, 'train').records)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == -9
    cache = BackboneCache(tmp_path, *load_base(base))
    assert len(cache.missing(records)) == len(records) - 2
    assert list(cache.folder.glob(".partial-*"))
    cache.fill(records)
    assert not list(cache.folder.glob(".partial-*"))
    for record in records:
        assert cache.states(record).isfinite().all()


def test_two_processes_may_fill_one_cache_at_once(base, data_dir, records, tmp_path):
    script = (
        "import sys; from helpers.model.cache import BackboneCache\n"
        "from helpers.data.coco import read_split; from helpers.model.sam3 import load_base\n"
        f"cache = BackboneCache({str(tmp_path)!r}, *load_base({str(base)!r}))\n"
        f"records = read_split({str(data_dir)!r}, 'train').records\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "cache.fill(records)\n"
        "for record in records: assert cache.states(record).isfinite().all()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    cache = BackboneCache(tmp_path, *load_base(base))
    assert not cache.missing(records)
    assert len(files_of(tmp_path)) == len(records)
    assert not list(cache.folder.glob(".partial-*"))


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-400] ^= 1
    file.write_bytes(content)


def _rewrite(change):
    def damage(file):
        with safe_open(file, framework="pt") as content:
            tensor, metadata = content.get_tensor("backbone_states"), content.metadata()
        save_file({"backbone_states": change(tensor)}, file, metadata=metadata)

    return damage


def _with_nan(tensor):
    tensor[3, 5] = torch.nan
    return tensor


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "one bit": _flip,
    "NaN": _rewrite(_with_nan),
    "whole numbers": _rewrite(lambda tensor: tensor.to(torch.int64)),
    "half precision": _rewrite(lambda tensor: tensor.to(torch.bfloat16)),
    "turned": _rewrite(lambda tensor: tensor.T.contiguous()),
    "swapped rows": _rewrite(lambda tensor: tensor.flip(0)),
    "without checksum": lambda file: save_file(load_file(file), file),
    "another tensor": lambda file: save_file({"x": torch.zeros(1)}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(base, records, tmp_path, damage):
    cache = BackboneCache(tmp_path, *load_base(base))
    cache.fill(records[:1])
    [file] = cache.folder.glob("*.safetensors")
    cache.states(records[0])
    DAMAGES[damage](file)
    with pytest.raises(InputError, match=r"cannot be read.*delete it") as caught:
        cache.states(records[0])
    assert caught.value.where == str(file)


def test_a_folder_that_cannot_be_written_is_one_line(base, records, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cache = BackboneCache(tmp_path / "file", *load_base(base))
    with pytest.raises(InputError, match=r"cannot be written.*training\.feature_cache"):
        cache.fill(records)
    assert (tmp_path / "file").read_text() == ""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "features")

    monkeypatch.setattr("helpers.files.tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=r"Permission denied.*training\.feature_cache"):
        BackboneCache(tmp_path / "cache", *load_base(base)).fill(records)


def test_a_backbone_that_gives_nan_blames_the_image_before_anything_is_kept(
    base, records, tmp_path
):
    model, processor = load_base(base)
    cache = BackboneCache(tmp_path, model, processor)
    with torch.no_grad():
        model.vision_encoder.backbone.layers[1].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        cache.fill(records[:1])
    assert caught.value.where == str(records[0].path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_to_keep_is_refused(base, data_dir, tmp_path):
    config = tiny_run_config(base, data_dir, f"training.feature_cache={tmp_path}")
    with pytest.raises(InputError, match="both encoders are trained"):
        train(config, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_cache_is_no_part_of_what_decides_a_run(base, data_dir, tmp_path):
    plain = tiny_run_config(base, data_dir)
    kept = tiny_run_config(base, data_dir, f"training.feature_cache={tmp_path}")
    assert plain.fingerprint() == kept.fingerprint()


def test_the_config_for_it_freezes_the_vision_encoder_only():
    from helpers.config import load_config

    config = load_config(CONFIGS / "text_and_decoder_lora.yaml")
    reference = load_config(CONFIGS / "crack_detection_config.yaml")
    assert config.training.feature_cache is not None
    flags = {key: on for key, on in config.lora.model_dump().items() if key.startswith("apply")}
    assert [key for key, on in flags.items() if not on] == [
        "apply_to_vision_encoder",
        "apply_to_geometry_encoder",
    ]
    assert config.data == reference.data
    assert config.loss == reference.loss
