"""What a base knows: replayed in training, compared after it, and left to the base by routing."""

from dataclasses import replace

import numpy as np
import pytest
from peft.helpers import rescale_adapter_scale

from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import PromptDataset
from helpers.data.masks import mask_to_rle
from helpers.data.prompts import REPLAYED_PER_IMAGE
from helpers.data.records import ImageRecord, ObjectAnnotation
from helpers.detect import knowledge
from helpers.detect.knowledge import clear_answers, retention
from helpers.detect.predictor import Predictor
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.files import CONFIGS, DATA, TINY_BASE
from helpers.model.lora import add_lora
from helpers.model.sam3 import load_base
from helpers.train.training import training_data


@pytest.fixture(scope="module")
def walls():
    split = read_split(DATA / "known_things", "test")
    return replace(split, records=split.records[:4])


@pytest.fixture(scope="module")
def adapted():
    """The embedded base with an adapter that still changes nothing."""
    model, processor = load_base(TINY_BASE)
    lora = load_config(CONFIGS / "crack_detection_config.yaml", "tiny").lora
    return add_lora(model, lora).eval(), processor


def square(left, top, side, size=40):
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask_to_rle(mask)


def detection(rle, score=0.9):
    return {"score": score, "box_xyxy": [0.0, 0.0, 10.0, 10.0], "mask_rle": rle}


def record_with(*rles):
    items = tuple(ObjectAnnotation("crack", (0.0, 0.0, 20.0, 20.0), rle) for rle in rles)
    return ImageRecord("a.png", "a.png", 40, 40, items)


def test_what_lies_on_an_annotation_or_on_a_better_detection_is_no_answer():
    record = record_with(square(0, 0, 10))
    detections = [
        detection(square(20, 20, 10)),  # free
        detection(square(21, 21, 10)),  # the same again
        detection(square(0, 5, 10)),  # half of it on the crack
        detection(square(0, 8, 10)),  # a fifth of it on the crack
    ]
    objects = knowledge._objects_of(detections, "hole", record)
    assert [item.rle for item in objects] == [detections[0]["mask_rle"], detections[3]["mask_rle"]]
    assert {item.category for item in objects} == {"hole"}


def test_clear_answers_are_the_detections_of_the_base(walls, adapted):
    model, processor = adapted
    words = ["tile", "moss", "window"]
    answers = clear_answers(model, processor, walls.records, words)
    assert set(answers) == {record.image_id for record in walls.records}
    shown = {
        record.image_id: {item.category for item in record.objects} & set(words)
        for record in walls.records
    }
    assert {name: set(detected) for name, (detected, _) in answers.items()} == shown
    assert all(set(detected) <= possible for detected, possible in answers.values())
    assert not any("window" in possible for _, possible in answers.values())


def test_an_adapter_that_changes_nothing_keeps_everything(walls, adapted):
    kept = retention(*adapted, walls, ["tile", "moss", "window"])
    assert kept["objects"] > 0
    assert (kept["AP"], kept["AP50"]) == (1.0, 1.0)
    assert kept["by_word"] == {"tile": 1.0, "moss": 1.0}
    assert kept["false_positive_rate"] == 0


def test_an_adapter_that_forgets_is_seen_and_routing_gives_everything_back(walls, adapted):
    model, processor = adapted
    words = ["tile", "moss"]
    expected = [query.max_score for query in predict_split(model, processor, walls)]
    spoilt = [p for name, p in model.named_parameters() if "lora_B" in name and "detr" not in name]
    for parameter in spoilt:
        parameter.data.normal_(0, 0.3)
    try:
        assert retention(model, processor, walls, words)["AP50"] < 0.5
        with rescale_adapter_scale(model, 1e-6):
            assert retention(model, processor, walls, words)["AP50"] > 0.99
        queries = predict_split(model, processor, walls, adapter_words=["Crack "])
        assert [query.max_score for query in queries] == pytest.approx(expected, abs=1e-6)
        queries = predict_split(model, processor, walls, adapter_words=["Tile "])
        for query, base_score in zip(queries, expected, strict=True):
            is_own = query.prompt == "tile"
            assert (abs(query.max_score - base_score) > 1e-6) == is_own, query.prompt

        routed = Predictor(model, processor, ["tile"])
        answers = routed.raw(walls.records[0].path, ["moss", "tile", "moss"])
        assert [answer.prompt for answer in answers] == ["moss", "tile", "moss"]
        with model.disable_adapter():
            [of_base] = Predictor(model, processor).raw(walls.records[0].path, ["moss"])
        [adapted_answer] = Predictor(model, processor).raw(walls.records[0].path, ["tile"])
        assert answers[0].max_score == of_base.max_score
        assert answers[1].max_score == adapted_answer.max_score
    finally:
        for parameter in spoilt:
            parameter.data.zero_()


def test_a_base_alone_is_refused_and_words_it_does_not_know_have_no_precision(walls, adapted):
    with pytest.raises(InputError, match="no adapter"):
        retention(*load_base(TINY_BASE), walls, ["tile"])
    kept = retention(*adapted, walls, ["window"])
    assert (kept["objects"], kept["AP"]) == (0, None)


def replay_dataset(**changes):
    config = load_config(CONFIGS / "crack_detection_config.yaml", "tiny")
    split = read_split(DATA / "wall_cracks", "train")
    split = replace(split, records=split.records[:6])
    return PromptDataset.from_config(config, split, **changes)


def test_replayed_words_are_asked_beside_ones_own_and_never_as_absent():
    dataset = replay_dataset(num_negatives=20)
    item = ObjectAnnotation("moss", (1.0, 1.0, 9.0, 9.0), None)
    words = ("moss", "rust", "hole")
    answers = {
        record.image_id: (
            {word: (replace(item, category=word),) for word in words},
            {*words, "stain"},
        )
        for record in dataset.records
    }
    before = [dataset.targets(index, 0) for index in range(len(dataset))]
    assert any(query["prompt"] == "stain" for queries in before for query in queries)
    dataset.set_replay(answers)
    drawn = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            queries = dataset.targets(index, 0)
            positive = [query["prompt"] for query in queries if query["is_positive"]]
            replayed = [prompt for prompt in positive if prompt in words]
            assert len(replayed) == REPLAYED_PER_IMAGE
            assert [p for p in positive if p not in words] == [
                query["prompt"] for query in before[index] if query["is_positive"]
            ]
            absent = {query["prompt"] for query in queries if not query["is_positive"]}
            assert absent.isdisjoint({*words, "stain"})
            drawn.update(replayed)
    assert drawn == set(words)


def test_training_data_replays_the_base_but_counts_ones_own_objects():
    model, processor = load_base(TINY_BASE)
    split = read_split(DATA / "wall_cracks", "train")
    splits = {"train_split": replace(split, records=split.records[:6]), "val_split": split}
    words = ["moss", "tile", "joint", "brick", "stain", "rust"]
    path = CONFIGS / "crack_detection_config.yaml"
    plain, replay = (
        training_data(load_config(path, "tiny", overrides), model, processor, **splits)
        for overrides in ((), {"data.replay_words": words})
    )
    assert plain.train.replay == {}
    assert replay.counts["train"].equals(plain.counts["train"])
    assert replay.fingerprint == plain.fingerprint
    asked = {word for answers in replay.train.replay.values() for word in answers}
    assert asked
    assert asked <= set(words)

    of_nothing = load_config(path, "tiny", {"data.replay_words": ["window"]})
    with pytest.raises(InputError, match="detects none of window on 6 images"):
        training_data(of_nothing, model, processor, **splits)

    no_objects = tuple(replace(record, objects=()) for record in split.records[:6])
    splits["train_split"] = replace(split, records=no_objects)
    with pytest.raises(InputError, match="no object of 6 images reaches the loss"):
        training_data(
            load_config(path, "tiny", {"data.replay_words": words}), model, processor, **splits
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.replay_words": ["moss", "Moss"]}, "replay_words lists moss more than once"),
        ({"data.replay_words": ["moss"], "data.prompt": "object"}, "replay_words must be"),
    ],
)
def test_words_that_cannot_be_replayed_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(CONFIGS / "crack_detection_config.yaml", "tiny", overrides)


def test_a_word_that_means_the_annotated_thing_is_refused():
    model, processor = load_base(TINY_BASE)
    split = read_split(DATA / "wall_cracks", "train")
    config = load_config(
        CONFIGS / "crack_detection_config.yaml", "tiny", {"data.replay_words": ["cracks"]}
    )
    with pytest.raises(InputError, match="'cracks' means what is annotated as 'crack'"):
        training_data(config, model, processor, train_split=split, val_split=split)


def test_no_replay_leaves_the_fingerprint_of_a_config_as_it_was():
    config = load_config(CONFIGS / "crack_detection_config.yaml", "tiny")
    assert "replay_words" in config.model_dump()["data"]
    replay = config.replace({"data.replay_words": ("moss",)})
    assert replay.fingerprint() != config.fingerprint()
    assert replay.replace({"data.replay_words": ()}).fingerprint() == config.fingerprint()
