import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_random import RESOLUTION, tiny_config, tiny_run_config
from transformers import Sam3VideoConfig

from helpers.detect.predictor import Predictor
from helpers.train.run import read_run
from helpers.train.share import is_on_hub, model_card
from helpers.train.training import train

SAVE = """
import sys
assert not any(name.split(".")[0] == "helpers" for name in sys.modules)
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def run_asked_otherwise(base, data_dir, tmp_path_factory):
    settings = ("scale.num_epochs=0.02", "evaluation.score_threshold=0.153")
    settings += ("model.native_prompt=true",)
    config = tiny_run_config(base, data_dir, *settings, f"model.resolution={2 * RESOLUTION}")
    return train(config, output_dir=tmp_path_factory.mktemp("larger") / "run")


def code_of(card):
    """Return the code block of a card."""
    [block] = [part for part in card.split("```") if part.startswith("python\n")]
    return block.removeprefix("python\n")


def with_model(run, **values):
    model = run.config.model.model_copy(update=values)
    return replace(read_run(run.folder), config=run.config.model_copy(update={"model": model}))


@pytest.mark.parametrize("which", ["run", "run_asked_otherwise"])
def test_code_of_the_card_detects_the_same_without_this_package(which, request, tmp_path):
    run = request.getfixturevalue(which)
    image = Path(run.config.data.data_dir) / "test" / "test_0.png"
    for path in [*run.folder.glob("*.*"), image]:
        name = "photo.jpg" if path == image else path.name  # a PNG, whatever its name says
        (tmp_path / name).write_bytes(path.read_bytes())
    script = code_of((tmp_path / "README.md").read_text(encoding="utf-8")) + SAVE
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")

    predictor, threshold = (
        Predictor(run.model, run.processor),
        run.config.evaluation.score_threshold,
    )
    [raw] = predictor.raw(image, ["crack"])
    [ours] = predictor.predict(image, ["crack"], threshold)
    kept = raw.scores > threshold
    assert 0 < kept.sum() < len(kept)
    assert len(ours.detections) == kept.sum()
    np.testing.assert_allclose(found["scores"], raw.scores[kept], atol=1e-5)
    np.testing.assert_allclose(found["boxes"], raw.boxes_xyxy[kept], atol=1e-3)
    # The library takes the sigmoid before it enlarges a mask, this package after.
    prob = torch.from_numpy(raw.mask_logits[kept]).sigmoid()[None]
    size = (raw.height, raw.width)
    masks = torch.nn.functional.interpolate(prob, size=size, mode="bilinear")[0] > 0.5
    assert (found["masks"].bool() == masks).float().mean() > 0.999


def test_resolution_is_set_on_the_published_video_configuration_too(run, tmp_path):
    Sam3VideoConfig(detector_config=tiny_config().to_dict()).save_pretrained(tmp_path)
    changed = with_model(run, name=str(tmp_path), resolution=112)
    code = code_of(model_card(changed, RESOLUTION))
    lines = [
        line for line in code.splitlines() if re.match("(from transformers|base|size|config)", line)
    ]
    assert len(lines) == 7
    namespace = {}
    exec("\n".join(lines), namespace)
    assert namespace["config"].image_size == 112
    assert namespace["config"].vision_config.backbone_config.hidden_size == 32


def test_metadata_of_a_local_base_names_no_base(run):
    data = ModelCard((run.folder / "README.md").read_text(encoding="utf-8")).data
    assert data.library_name == "peft"
    assert {"sam3", "lora"} <= set(data.tags)
    assert data.license == "unknown"
    assert data.base_model is None
    assert not is_on_hub("data/tiny_sam3")


def test_metadata_and_code_of_a_base_on_the_hub(run):
    card = model_card(with_model(run, name="facebook/sam3", revision="abc"), RESOLUTION)
    data = ModelCard(card).data
    assert data.base_model == "facebook/sam3"
    assert (data.license, data.license_name) == ("other", "sam-license")
    assert code_of(card).count('base, revision="abc"') == 2
    assert "SAM License" in card
    merged = model_card(
        with_model(run, name="facebook/sam3"),
        RESOLUTION,
        merge={"dtype": "bfloat16", "num_images": 4, "merged": {"max_logit_difference": 1e-5}},
    )
    assert ModelCard(merged).data.to_dict()["base_model_relation"] == "finetune"
    assert "peft" not in code_of(merged)
    compile(code_of(merged), "card", "exec")


def test_every_number_of_the_table_is_from_the_metrics(run):
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([-\d.e]+) \|", card, flags=re.M)
    assert {"AP50", "cgF1", "max_score_present", "score_threshold"} <= {name for name, _ in rows}
    for name, value in rows:
        assert float(value) == pytest.approx(run.metrics["valid"][name], rel=1e-3), name
    assert run.metrics["data_fingerprint"] in card
    assert run.config.fingerprint() in card
    for note in run.metrics["notes"]:
        assert note[1:] in card


def test_a_card_says_what_was_kept_or_how_to_measure_it(run):
    files, says = read_run(run.folder), "was not measured"
    kept = {"objects": 7, "AP": 0.5, "AP50": 0.625}
    measured = replace(files, metrics=files.metrics | {"retention": kept})
    assert "average precision 0.500, at an IoU of 0.5 0.625" in model_card(measured, RESOLUTION)
    assert says not in model_card(measured, RESOLUTION)
    assert says in model_card(
        replace(files, metrics=files.metrics | {"retention": None}), RESOLUTION
    )


def test_metric_without_a_value_and_run_without_objects_still_give_a_card(run):
    files = read_run(run.folder)
    valid = {name: v for name, v in files.metrics["valid"].items() if name != "cgF1"}
    bare = replace(
        files,
        metrics=files.metrics | {"valid": valid},
        prompts={"prompts": {}, "negatives": {}, "negatives_per_image": 0},
    )
    card = model_card(bare, RESOLUTION)
    assert "| cgF1 |" not in card
    assert 'text="object"' in code_of(card)
    compile(code_of(card), "card", "exec")


@pytest.mark.parametrize(
    "word",
    [
        "a\n# b",
        "```",
        "x```\n<script>alert(1)</script>",
        "\x1b[31mred",
        "[a](b)",
        "*a*",
        "a|b",
        "a_b",
        "{{ 7*7 }}",
        "{% raw %}",
    ],
)
def test_a_prompt_cannot_become_markup(run, word):
    prompts = {"prompts": {word: 5}, "negatives": {word + "2": 1}, "negatives_per_image": 1}
    card = model_card(replace(read_run(run.folder), prompts=prompts), RESOLUTION)
    plain = model_card(read_run(run.folder), RESOLUTION)
    assert card.count("\n") == plain.count("\n")
    assert card.count("```") == plain.count("```") == 2
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "49" not in card.splitlines()[-1]
    compile(code_of(card), "card", "exec")
    assert json.loads(re.search(r"text=(\".*?\")(, size|, return)", code_of(card))[1]) == word
