import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Sam3Model, Sam3Processor

import helpers.train.share
from helpers.__main__ import main
from helpers.config import load_config
from helpers.detect.detections import RawPrediction
from helpers.detect.predictor import Predictor
from helpers.errors import InputError
from helpers.files import CONFIGS
from helpers.model.sam3 import load_base
from helpers.train.run import load_run
from helpers.train.share import CAST, EXACT, MergeDiffers, compare, is_same, merge
from helpers.train.training import train


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Train the embedded base for an epoch: the masks of a random one are noise at its threshold."""
    config = load_config(
        CONFIGS / "crack_detection_config.yaml",
        profile="tiny",
        overrides=(
            "scale.num_epochs=0.02",
            "training.batch_size=4",
            "training.gradient_accumulation_steps=1",
            "evaluation.score_threshold=0.1",
        ),
    )
    return train(config, output_dir=tmp_path_factory.mktemp("detector") / "run")


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    return folder, merge(run.folder, folder)


def image_of(run):
    return Path(run.config.data.data_dir) / "test" / "test_0.png"


def raw_of(scores, mask_logits=None, presence_logit=40.0):
    """Return an answer with given scores; its presence is 1."""
    scores = np.asarray(scores, dtype=np.float64)
    masks = np.full((len(scores), 4, 4), 3.0) if mask_logits is None else mask_logits
    return RawPrediction(
        image="i",
        prompt="p",
        height=4,
        width=4,
        query_logits=np.log(scores / (1 - scores)),
        presence_logit=presence_logit,
        boxes_xyxy=np.zeros((len(scores), 4)),
        mask_logits=masks.astype(np.float32),
        semantic_logits=np.zeros((4, 4)),
    )


def test_merged_model_answers_as_base_and_adapter(run, merged):
    folder, document = merged
    assert document["same"]
    assert document["dtype"] == "float32"
    assert document["images"] == "validation split"
    for stage in ("merged", "written"):
        assert document[stage]["max_logit_difference"] < EXACT.logit
        assert document[stage]["num_changed"] == 0
        assert document[stage]["num_detections"] > 0
    model, processor = load_base(folder)
    expected = Predictor(load_run(run.folder).model, run.processor).raw(image_of(run), ["crack"])
    actual = Predictor(model, processor).raw(image_of(run), ["crack"])
    np.testing.assert_allclose(actual[0].query_logits, expected[0].query_logits, atol=1e-4)
    base = Predictor(*load_base(run.config.model.name)).raw(image_of(run), ["crack"])
    assert np.abs(base[0].query_logits - expected[0].query_logits).max() > 1e-2


def test_merged_folder_holds_what_plain_transformers_needs(run, merged):
    folder, document = merged
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "merge.json"} <= names
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads((folder / "merge.json").read_text()) == document
    assert document["data_fingerprint"] == run.metrics["data_fingerprint"]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Sam3Model"]
    model, info = Sam3Model.from_pretrained(folder, output_loading_info=True)
    assert type(model) is Sam3Model
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert Sam3Processor.from_pretrained(folder).image_processor.size["height"] == 56
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.library_name == "transformers"


def test_code_of_the_merged_card_needs_transformers_only(run, merged, tmp_path):
    folder, _ = merged
    for path in [*folder.iterdir(), image_of(run)]:
        name = "photo.jpg" if path == image_of(run) else path.name
        (tmp_path / name).write_bytes(path.read_bytes())
    code = (folder / "README.md").read_text(encoding="utf-8").split("```")[1]
    script = code.removeprefix("python\n") + (
        'import sys\nassert "peft" not in sys.modules and "helpers" not in sys.modules\n'
        'print(found["scores"].tolist())\n'
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [raw] = Predictor(load_run(run.folder).model, run.processor).raw(image_of(run), ["crack"])
    kept = raw.scores[raw.scores > run.config.evaluation.score_threshold]
    assert len(kept)
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), kept, atol=1e-4)


def test_cast_is_written_and_compared_within_its_own_tolerance(detector, tmp_path):
    document = merge(detector.folder, tmp_path / "half", dtype="bfloat16")
    assert document["written"]["num_detections"] > 5
    assert document["merged"]["max_logit_difference"] < EXACT.logit
    assert EXACT.logit < document["written"]["max_logit_difference"]
    assert 0 < document["written"]["max_score_difference"] < CAST.score
    model = Sam3Model.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16


def disturbed(model):
    plain = _plain(model)
    with torch.no_grad():
        plain.mask_decoder.mask_embedder.layers[-1].weight.mul_(1.01)
    return plain


_plain = helpers.train.share._plain


@pytest.mark.parametrize("exists", [True, False])
def test_model_that_differs_is_not_left_in_place(run, tmp_path, monkeypatch, capsys, exists):
    monkeypatch.setattr(helpers.train.share, "_plain", disturbed)
    output = tmp_path / "model"
    if exists:
        output.mkdir()
    arguments = ["merge", "--adapter", str(run.folder), "--output", str(output)]
    assert main(arguments) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == ([output] if exists else [])
    assert not exists or not any(output.iterdir())
    with pytest.raises(MergeDiffers) as caught:
        merge(run.folder, output)
    assert caught.value.document["merged"]["max_logit_difference"] < EXACT.logit
    assert caught.value.document["written"]["max_logit_difference"] > EXACT.logit


def test_failure_while_writing_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Sam3Model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        merge(run.folder, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_data_that_moved_away_are_replaced_by_the_course(run, tmp_path):
    config = run.config.model_copy(
        update={"data": run.config.data.model_copy(update={"data_dir": str(tmp_path / "gone")})}
    )
    name, images = helpers.train.share._sample_images(config)
    assert name == "data/wall_cracks"
    assert len(images) == 4
    assert all(path.is_file() for path in images)


def test_output_in_use_unknown_type_and_missing_run_are_refused(run, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder"):
        merge(run.folder, tmp_path)
    with pytest.raises(InputError, match="'float16'"):
        merge(run.folder, tmp_path / "model", dtype="float16")
    with pytest.raises(InputError, match="no such folder"):
        merge(tmp_path / "none", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command_reports_in_json(run, tmp_path, capsys):
    output = tmp_path / "model"
    arguments = ["--adapter", str(run.folder), "--output", str(output), "--json"]
    assert main(["merge", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
    assert main(["merge", *arguments]) == 2


def test_compare_counts_changed_detections_by_hand():
    same = compare([raw_of([0.2, 0.7])], [raw_of([0.2, 0.7])], 0.3, 0.5)
    assert list(same.values()) == [1, 1, 0.0, 0.0, 0, 1.0]
    assert is_same(same, EXACT)
    other = compare([raw_of([0.2, 0.31])], [raw_of([0.2, 0.29])], 0.3, 0.5)
    assert other["num_changed"] == 1
    assert other["max_score_difference"] == pytest.approx(0.02)
    close = compare([raw_of([0.2, 0.31])], [raw_of([0.2, 0.29])], 0.3, 0.5, margin=0.05)
    assert close["num_changed"] == 0
    assert is_same(close, CAST)
    assert not is_same(close, EXACT)


def test_compare_measures_masks_and_every_kind_of_logit():
    half = np.full((1, 4, 4), 3.0)
    half[:, :, 2:] = -3.0
    masks = compare([raw_of([0.9])], [raw_of([0.9], half)], 0.3, 0.5)
    assert masks["min_mask_iou"] == 0.5
    assert masks["max_logit_difference"] == 6
    assert not is_same(masks, CAST)
    presence = compare([raw_of([0.9])], [raw_of([0.9], presence_logit=39.0)], 0.3, 0.5)
    assert presence["max_logit_difference"] == 1
    unseen = compare([raw_of([0.1])], [raw_of([0.1], half)], 0.3, 0.5)
    assert unseen["min_mask_iou"] == 1


def test_not_a_number_is_never_the_same():
    broken = replace(raw_of([0.9]), query_logits=np.array([np.nan]))
    result = compare([raw_of([0.9])], [broken], 0.3, 0.5)
    assert not is_same(result, EXACT)
    assert not is_same(result, CAST)
    assert compare([], [], 0.3, 0.5)["num_questions"] == 0
