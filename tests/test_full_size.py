"""One training step of a base with all 840 million parameters, on a CPU.

Not part of ``make test``: it needs 10 GB of memory, 2 GB of disk and some minutes. Run it with
``pytest -m full_size -s``.
"""

import json
import resource
import time

import pytest
import torch
from tiny_random import write_dataset

from data.benchmarks.measure import NUM_PARAMETERS, write_random_base
from helpers.config import load_config
from helpers.detect.predictor import Predictor
from helpers.files import CONFIGS
from helpers.model.lora import read_adapter_weights
from helpers.train.run import load_run
from helpers.train.training import train

pytestmark = pytest.mark.full_size

MEMORY_GB = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_base(tmp_path_factory.mktemp("base"))


def one_picture_per_split(folder):
    """Write a dataset whose splits have one picture with a crack in it."""
    write_dataset(folder, sizes=(("train", 2), ("valid", 2), ("test", 2)))
    for file in folder.rglob("*.coco.json"):
        content = json.loads(file.read_text())
        content["images"] = content["images"][:1]
        file.write_text(json.dumps(content))
    for picture in folder.rglob("*_1.png"):
        picture.unlink()
    return folder


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def test_one_step_with_the_fixed_config(base, tmp_path):
    data_dir = one_picture_per_split(tmp_path / "data")
    pictures = sorted(data_dir.rglob("*.png"))
    config = load_config(
        CONFIGS / "crack_detection_config.yaml",
        profile="sam3",
        overrides=(
            f"model.name={base}",
            f"data.data_dir={data_dir}",
            "data.num_negatives=1",
            "evaluation.absent_prompts=[dog]",
            "scale.num_epochs=0.02",
            "training.gradient_accumulation_steps=1",
            "training.warmup_steps=0",
        ),
    )
    before, start = peak_gb(), time.perf_counter()
    result = train(config, output_dir=tmp_path / "run")
    seconds, peak = time.perf_counter() - start, peak_gb()
    steps = [entry for entry in result.history if "loss" in entry]
    print(
        f"\none step, {torch.get_num_threads()} threads, with validation: {seconds:.0f} s, peak {peak:.1f} GB ({before:.1f} before)"
    )
    print(result.adapter.to_string())
    assert len(steps) == 1
    assert peak < MEMORY_GB

    model = result.model.get_base_model()
    own = [p for name, p in model.named_parameters() if ".lora_" not in name]
    assert sum(parameter.numel() for parameter in own) == NUM_PARAMETERS
    assert model.vision_encoder.dtype == torch.bfloat16
    trained = result.adapter.drop("total")
    trained = trained[trained["modules"] > 0]
    assert set(trained.index) == {"vision_encoder", "text_encoder", "mask_decoder"}
    assert trained["modules"].sum() == 340
    assert (trained["grad_norm"] > 0).all()
    assert (trained["B_nonzero"] == 1).all()
    weights = read_adapter_weights(tmp_path / "run")
    assert len(weights) == 680
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    answer = Predictor(result.model, result.processor).raw(pictures[0], ["crack", "dog"])
    assert answer[0].query_logits.shape == (200,)
    assert answer[0].mask_logits.shape == (200, 288, 288)
    place = model.device  # a GPU computes other digits than the CPU
    del result, model, own
    again = load_run(tmp_path / "run")
    again.model.to(place)
    loaded = Predictor(again.model, again.processor).raw(pictures[0], ["crack", "dog"])
    for one, other in zip(answer, loaded, strict=True):
        torch.testing.assert_close(one.query_logits, other.query_logits)
        torch.testing.assert_close(one.mask_logits, other.mask_logits)
