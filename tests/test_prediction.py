from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from tiny_random import tiny_model, tiny_processor, write_dataset
from torchvision.ops import box_convert

from helpers.data.coco import read_split
from helpers.data.dataset import PromptDataset
from helpers.detect.detections import detect, masks_at_image_size, raw_predictions
from helpers.detect.metrics import evaluate_queries, threshold_sweep
from helpers.detect.predictor import Predictor, untrained_prompts
from helpers.detect.queries import Query, predict_split
from helpers.errors import InputError

ORACLES = sorted((Path(__file__).parent / "fixtures" / "oracles").glob("post_dev_*.safetensors"))


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), tiny_processor())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "bars")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def oracle_predictions(oracle):
    logits = oracle["pred_logits"][..., 0]
    masks = oracle["pred_masks"]
    outputs = {
        "pred_logits": logits,
        "presence_logits": oracle["presence_logits"],
        "pred_boxes": box_convert(oracle["pred_boxes"], "cxcywh", "xyxy"),
        "pred_masks": masks,
        "semantic_logits": masks[:, :1],
    }
    sizes = oracle["target_sizes_hw"].tolist()
    return raw_predictions(outputs, [("image", "prompt", *size) for size in sizes])


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_post_processing_equals_the_native_one(path):
    oracle = load_file(path)
    start = 0
    for row, raw in enumerate(oracle_predictions(oracle)):
        np.testing.assert_allclose(raw.scores, oracle["exp.scores"][row], atol=1e-6)
        kept = oracle["exp.keep"][row].bool().numpy()
        np.testing.assert_array_equal(raw.scores > 0.5, kept)
        end = start + int(kept.sum())
        boxes = oracle["exp.kept.boxes_xyxy_px"][start:end].numpy()
        np.testing.assert_allclose(raw.boxes_xyxy[kept], boxes, atol=1e-4)
        found = detect(raw, 0.5)
        assert len(found) == end - start
        order = np.argsort(-raw.scores[kept], kind="stable")
        limits = [raw.width, raw.height, raw.width, raw.height]
        for one, index in zip(found, order, strict=True):
            expected = oracle[f"exp.kept.masks.{row}"][index]
            np.testing.assert_array_equal(coco_mask.decode(one["mask_rle"]), expected)
            np.testing.assert_allclose(one["box_xyxy"], np.clip(boxes[index], 0, limits), atol=1e-4)
        start = end


def test_some_oracle_keeps_something():
    assert sum(int(load_file(path)["exp.keep"].sum()) for path in ORACLES) > 5


def test_mask_threshold_is_a_probability_of_the_upsampled_logit():
    logits = np.array([[[-2.0, 2.0], [-2.0, 2.0]]], dtype=np.float32)
    low = masks_at_image_size(logits, 8, 8, 0.2)[0].sum()
    high = masks_at_image_size(logits, 8, 8, 0.8)[0].sum()
    assert low > 32 > high > 0


def test_score_is_query_times_presence_and_both_are_kept(predictor, photo):
    raw = predictor.raw(photo, ["crack"])[0]
    np.testing.assert_allclose(raw.scores, raw.query_prob * raw.presence_prob, rtol=1e-6)
    assert raw.max_score == pytest.approx(raw.max_query_prob * raw.presence_prob)
    prediction = predictor.predict(photo, "crack", threshold=0.0)[0].to_dict()
    assert list(prediction) == [
        "image",
        "prompt",
        "presence_prob",
        "max_query_prob",
        "max_score",
        "detections",
    ]
    assert len(prediction["detections"]) == len(raw.scores)
    scores = [one["score"] for one in prediction["detections"]]
    assert scores == sorted(scores, reverse=True)
    for one in prediction["detections"]:
        x0, y0, x1, y1 = one["box_xyxy"]
        assert 0 <= x0 <= x1 <= 50
        assert 0 <= y0 <= y1 <= 30
        assert one["mask_rle"]["size"] == [30, 50]


def test_a_score_at_the_threshold_counts_in_prediction_and_in_evaluation(predictor, photo):
    raw = predictor.raw(photo, ["crack"])[0]
    for rank in range(1, len(raw.scores) + 1):
        threshold = float(np.sort(raw.scores)[-rank])
        pred = [{"rle": d["mask_rle"], "score": d["score"]} for d in detect(raw, threshold)]
        assert len(pred) == rank
        query = Query("photo", "crack", raw.height, raw.width, gt=[], pred=pred)
        assert threshold_sweep([query], [threshold])["count"].tolist() == [rank]


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
def test_a_score_is_compared_as_it_is_printed(threshold):
    # In float32 0.7 and 0.9 are a little less, 0.3 a little more.
    raw = SimpleNamespace(
        scores=np.float32([threshold]),
        height=4,
        width=4,
        boxes_xyxy=np.zeros((1, 4), np.float32),
        mask_logits=np.zeros((1, 4, 4), np.float32),
    )
    is_detected = float(np.float32(threshold)) >= threshold
    assert len(detect(raw, threshold)) == is_detected


def test_threshold_and_number_of_detections_are_used(predictor, photo):
    raw = predictor.raw(photo, ["crack"])[0]
    assert detect(raw, 1.0) == []
    assert len(detect(raw, 0.0, max_detections=4)) == 4


def test_several_prompts_encode_the_image_once(photo):
    model, seen = tiny_model(), []
    model.vision_encoder.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    predictions = Predictor(model, tiny_processor()).predict(photo, ["crack", "joint", "dog"])
    assert seen == [1]
    assert [prediction.prompt for prediction in predictions] == ["crack", "joint", "dog"]


def test_prompts_do_not_influence_each_other(predictor, photo):
    alone = predictor.raw(photo, "joint")[0]
    together = predictor.raw(photo, ["crack", "joint", "moss wall"])[1]
    np.testing.assert_allclose(together.query_logits, alone.query_logits, atol=1e-5)
    np.testing.assert_allclose(together.mask_logits, alone.mask_logits, atol=1e-4)


def test_images_come_before_prompts(predictor, photo):
    other = photo.with_name("other.png")
    Image.new("RGB", (20, 20)).save(other)
    predictions = predictor.predict([photo, other], ["crack", "dog"])
    assert [(Path(p.image).name, p.prompt) for p in predictions] == [
        ("photo.png", "crack"),
        ("photo.png", "dog"),
        ("other.png", "crack"),
        ("other.png", "dog"),
    ]


def test_promptless_mode_asks_for_the_generic_word_at_a_low_threshold(predictor, photo):
    without = predictor.predict(photo)
    assert [prediction.prompt for prediction in without] == ["object"]
    assert without == predictor.predict(photo, "object", threshold=1e-4)
    assert len(without[0].detections) > len(predictor.predict(photo, "object")[0].detections)


def test_image_is_turned_upright(predictor, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")
    turned, upright = (
        predictor.raw(tmp_path / name, "crack")[0] for name in ("turned.png", "upright.png")
    )
    assert (turned.height, turned.width) == (50, 30)
    np.testing.assert_array_equal(turned.query_logits, upright.query_logits)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["crack", ""], [7], 7])
def test_empty_prompts_are_refused(predictor, photo, prompt):
    with pytest.raises(InputError, match="prompt"):
        predictor.predict(photo, prompt)


@pytest.mark.parametrize("prompt", ["cr\udcffack", "\ud800", "ein Ri\udcdf"])
def test_bytes_that_are_no_text_are_refused_in_one_line(predictor, photo, prompt):
    with pytest.raises(InputError, match="not UTF-8") as caught:
        predictor.predict(photo, ["crack", prompt])
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("prompt", ["a $x^$ b", "$$", "a\nb", "\U0001f9f1", "\x1b[31m", "%s {}"])
def test_odd_text_is_asked_as_it_is(predictor, photo, prompt):
    assert [one.prompt for one in predictor.predict(photo, prompt)] == [prompt]


def test_long_prompt_is_refused(predictor, photo):
    with pytest.raises(InputError, match="42 tokens"):
        predictor.predict(photo, " ".join(["crack"] * 40))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.3"])
@pytest.mark.parametrize("name", ["threshold", "mask_threshold"])
def test_impossible_thresholds_are_refused(predictor, photo, name, value):
    with pytest.raises(InputError, match=name):
        predictor.predict(photo, "crack", **{name: value})


def test_missing_and_corrupt_images_are_refused(predictor, tmp_path):
    with pytest.raises(InputError, match="no such image"):
        predictor.predict(tmp_path / "none.png", "crack")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="no readable image"):
        predictor.predict(tmp_path / "bad.jpg", "crack")


def test_untrained_prompts_are_named_with_the_closest_trained_one():
    trained = ["crack", "brick wall"]
    assert untrained_prompts([" CRACK ", "brick  Wall"], trained) == {}
    assert untrained_prompts(["cracks", "zebra"], trained) == {"cracks": "crack", "zebra": None}


def test_queries_of_a_split(data_dir, monkeypatch):
    split = read_split(data_dir, "valid")
    monkeypatch.setattr("helpers.detect.queries.IMAGES_AT_ONCE", 2)
    queries = predict_split(tiny_model(), tiny_processor(), split, absent_prompts=("joint", "dog"))
    asked = {(query.image_id, query.prompt) for query in queries}
    images = [record.image_id for record in split.records]
    assert asked == {(image, prompt) for image in images for prompt in ("crack", "joint", "dog")}
    for query in queries:
        record = next(r for r in split.records if r.image_id == query.image_id)
        assert len(query.gt) == (len(record.objects) if query.prompt == "crack" else 0)
        assert len(query.pred) == 10  # low scores are kept: average precision needs them
        assert query.max_score == pytest.approx(query.scores.max())
    metrics = evaluate_queries(queries, 0.3)
    assert metrics["num_present"] == 2
    assert metrics["num_absent"] == 7


def test_ground_truth_as_prediction_is_perfect(data_dir):
    split = read_split(data_dir, "test")
    queries = [
        replace(
            query,
            pred=[
                {"rle": rle, "score": 0.9, "box_xyxy": box}
                for rle, box in zip(query.gt, query.gt_boxes_xyxy, strict=True)
            ],
            max_score=0.9 if query.gt else 0.0,
        )
        for query in predict_split(tiny_model(), tiny_processor(), split, absent_prompts=("dog",))
    ]
    metrics = evaluate_queries(queries, 0.5)
    assert metrics["AP"] == metrics["box_AP"] == pytest.approx(1.0)
    assert metrics["cgF1"] > 0.99


def test_object_without_mask_stands_as_its_box(data_dir):
    split = read_split(data_dir, "test")
    plain = {
        (query.image_id, query.prompt): query.gt
        for query in predict_split(tiny_model(), tiny_processor(), split)
    }
    bare = [
        type(record)(
            **{
                **vars(record),
                "objects": tuple(
                    type(item)(**{**vars(item), "rle": None}) for item in record.objects
                ),
            }
        )
        for record in split.records
    ]
    split = type(split)(**{**vars(split), "records": tuple(bare)})
    for query in predict_split(tiny_model(), tiny_processor(), split):
        assert query.gt == plain[query.image_id, query.prompt]


def test_word_known_to_be_in_the_picture_is_never_asked_as_absent(data_dir):
    split = read_split(data_dir, "valid")
    known = [
        type(record)(**{**vars(record), "contents": frozenset({"joint"})})
        for record in split.records
    ]
    split = type(split)(**{**vars(split), "records": tuple(known)})
    dataset = PromptDataset.for_evaluation(
        split, tiny_model(), tiny_processor(), absent_prompts=("joint", "dog")
    )
    asked = {
        query["prompt"] for index in range(len(dataset)) for query in dataset[index]["queries"]
    }
    assert asked == {"crack", "dog"}


def test_prediction_leaves_later_training_possible(photo):
    # transformers caches position encodings; made in inference mode they could not be trained with.
    model = tiny_model()
    Predictor(model, tiny_processor()).predict(photo, "crack")
    outputs = model.train()(
        pixel_values=torch.zeros(1, 3, 56, 56),
        **dict(tiny_processor()(text=["crack"], return_tensors="pt")),
    )
    outputs.pred_logits.sum().backward()
    assert model.detr_decoder.query_embed.weight.grad.abs().sum() > 0
