from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.causes import CAUSES
from helpers.data.records import ImageRecord, ObjectAnnotation
from helpers.detect.detections import RawPrediction
from helpers.diagnose import answer_gates as gates
from helpers.diagnose.diagnosis import pass_gate
from helpers.diagnose.patient import Examination, Gate
from helpers.errors import InputError
from helpers.model.lora import add_lora
from helpers.model.sam3 import load_base

BOX = (10.0, 10.0, 30.0, 30.0)
BESIDE = (12.0, 10.0, 32.0, 30.0)  # IoU 18 / 22 with BOX
FAR = (60.0, 60.0, 70.0, 70.0)


def answer(presence_logit, query_logit=4.0, box=BOX):
    """Return an answer of two queries; the first has the box."""
    return RawPrediction(
        image="a",
        prompt="crack",
        height=100,
        width=100,
        query_logits=np.array([query_logit, -6.0], dtype=np.float32),
        presence_logit=presence_logit,
        boxes_xyxy=np.array([box, FAR], dtype=np.float32),
        mask_logits=np.zeros((2, 4, 4), dtype=np.float32),
        semantic_logits=np.zeros((4, 4), dtype=np.float32),
    )


def examination(run, base=None, *, asked=("crack",), objects=True):
    """Return what the gates look at: three images, and answers by (word, image shows it)."""
    base = base or (lambda word, shown: answer(-10.0))
    thing = ObjectAnnotation("crack", BOX, None, False)
    records = [
        ImageRecord(
            image_id=str(index),
            path=None,
            width=100,
            height=100,
            objects=(thing,) if objects and index < 2 else (),
        )
        for index in range(3)
    ]

    def raws(words, *, adapted=True):
        give = run if adapted else base
        return {
            (record.image_id, word): give(word, word == "crack" and bool(record.objects))
            for record in records
            for word in words
        }

    section = SimpleNamespace
    return section(
        few=records,
        folder="run",
        data_dir="data",
        image=None,
        words=list(asked),
        trained_words=["crack"],
        raws=raws,
        split=lambda name: section(categories=("crack",)),
        config=section(
            data=section(prompt=None, negative_prompts=("joint", "moss")),
            evaluation=section(absent_prompts=("dog",), metric_for_best="cgF1"),
        ),
    )


def causes(gate, subject):
    return [(one.cause, one.is_direct) for one in gate(subject)[1]]


def healthy(word, shown):
    return answer(4.0 if shown else -8.0)


def test_every_gate_passes_a_healthy_run():
    subject = examination(healthy)
    for gate in (
        gates.run_beside_base,
        gates.presence_at_clamp,
        gates.words_told_apart,
        gates.boxes_and_scores,
    ):
        assert gate(subject)[1] == []
    assert pass_gate(Gate("a gate", "", gates.own_picture), subject).status == "not applicable"


def test_text_names_the_lower_factor():
    text, _ = gates.run_beside_base(
        examination(lambda word, shown: answer(-2.0, 4.0), lambda word, shown: answer(5.0, -2.0))
    )
    run, base = text.split("; base")
    assert "the lower factor is the presence" in run
    assert "the lower factor is the query" in base
    assert f"presence {torch.tensor(-2.0).sigmoid():.3f}" in run


IN_VISION, IN_TEXT = "vision_encoder.layers.0.mlp.fc1", "text_encoder.text_model.layers.0.mlp.fc1"
REFUSED, HALF_KNOWN = answer(-10.0, -6.0), answer(-0.5, 1.0)


@pytest.mark.parametrize(
    ("base", "adapted", "expected"),
    [
        (REFUSED, [IN_VISION], [("word_locked_in_base", True)]),
        (REFUSED, [IN_VISION, IN_TEXT], None),  # the word could have been learned
        (REFUSED, [], None),  # a full model: everything was trained
        (HALF_KNOWN, [IN_VISION], None),  # nothing has to be learned in the text encoder
    ],
)
def test_a_refused_word_needs_a_place_where_it_is_learned(monkeypatch, base, adapted, expected):
    subject = examination(lambda word, shown: answer(-9.0), lambda word, shown: base)
    subject.loaded = SimpleNamespace(model=None)
    monkeypatch.setattr(gates, "lora_layers", lambda model: [(name, None) for name in adapted])
    if expected is None:
        with pytest.raises(InputError, match="for a reason that no gate may see"):
            gates.run_beside_base(subject)
    else:
        assert causes(gates.run_beside_base, subject) == expected


def known_base(word, shown):
    """Know other words, but not this one: it stands at the clamp before training."""
    return answer(-10.0 if word == "crack" else -4.0)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda word, shown: answer(-10.0), [("at_clamp", True)]),
        (lambda word, shown: answer(10.0), []),  # the other clamp says yes
        (known_base, []),  # nothing was learned: not this gate's cause
        (lambda word, shown: answer(-9.9), []),
        (lambda word, shown: answer(4.0 if shown else -10.0), []),
    ],
)
def test_presence_at_its_clamp(run, expected):
    assert causes(gates.presence_at_clamp, examination(run, known_base)) == expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda word, shown: answer(4.0), [("only_positive_prompts", False)]),
        (
            lambda word, shown: answer(4.0 if shown else 0.5, -1.0),
            [("only_positive_prompts", False)],
        ),
        (lambda word, shown: answer(4.0 if shown else -2.0), []),
        (lambda word, shown: answer(-6.0), []),  # silent for all: nothing to compare
    ],
)
def test_absent_words(run, expected):
    assert causes(gates.words_told_apart, examination(run)) == expected


def test_without_objects_there_is_nothing_to_compare():
    subject = examination(healthy, objects=False)
    for gate in (gates.words_told_apart, gates.presence_at_clamp):
        result = pass_gate(Gate("a gate", "", gate), subject)
        assert result.evidence == ()


@pytest.mark.parametrize(
    ("run", "base", "expected"),
    [
        ((-6.0, BESIDE), (-10.0, FAR), [("low_confidence", False)]),
        ((4.0, BESIDE), (-10.0, FAR), []),
        ((-6.0, FAR), (-10.0, FAR), []),
        ((-6.0, BESIDE), (-10.0, BOX), []),  # the base had these boxes before
    ],
)
def test_boxes_and_scores(run, base, expected):
    subject = examination(
        lambda word, shown: answer(run[0], box=run[1]),
        lambda word, shown: answer(base[0], box=base[1]),
    )
    assert causes(gates.boxes_and_scores, subject) == expected


DISTORTED = [("text_distorted", True)]


@pytest.mark.parametrize(
    ("others", "update", "expected"),
    [
        ([[1.0, 0.1], [0.9, 0.1]], 0.2, DISTORTED),
        ([[0.6, 0.8], [0.5, -1.0]], 8.0, DISTORTED),  # the words hardly draw near, but all is new
        ([[0.6, 0.8], [0.5, -1.0]], 0.2, []),
        ([[-1.0, 0.1], [-1.0, 0.1]], 8.0, []),  # together, but apart from the trained word
        ([[0.0, 1.0], [1.0, 0.2]], 0.2, []),
    ],
)
def test_words_apart(monkeypatch, others, update, expected):
    tables = {"base": [[1.0, 0.0], [0.5, 1.0], [0.5, -1.0]], "run": [[1.0, 0.0], *others]}
    monkeypatch.setattr(
        gates, "prompt_embeddings", lambda model, processor, words: torch.tensor(tables[model])
    )
    monkeypatch.setattr(gates, "_update_medians", lambda examination: {"text_encoder": update})
    subject = examination(healthy)
    subject.base, subject.loaded = ("base", None), SimpleNamespace(model="run", processor=None)
    assert causes(gates.words_apart, subject) == expected


def test_size_of_update_is_that_of_the_product(base, config):
    model = add_lora(load_base(base)[0], config.lora)
    subject = SimpleNamespace(loaded=SimpleNamespace(model=model), is_live=False)
    text, evidence = gates.size_of_update(subject)
    assert "vision_encoder 0.00" in text
    assert [one.cause for one in evidence] == ["adapter_at_zero"]
    for name, layer in gates.lora_layers(model):
        weights = layer.get_base_layer().weight.detach()
        torch.nn.init.zeros_(layer.lora_A["default"].weight)
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
        if "text" not in name:
            layer.lora_A["default"].weight.data[0, 0] = weights.norm()
            layer.lora_B["default"].weight.data[0, 0] = 0.1 if "vision" in name else 0.05
    scale = config.lora.alpha / config.lora.rank
    medians = gates._update_medians(subject)
    assert medians["vision_encoder"] == pytest.approx(0.1 * scale, rel=1e-5)
    assert medians["mask_decoder"] == pytest.approx(0.05 * scale, rel=1e-5)
    assert medians["text_encoder"] == 0
    assert causes(gates.size_of_update, subject) == [("overtrained", True)]


def test_all_gates_can_be_asked_of_a_real_run(run_folder, data_dir):
    subject = Examination(run_folder, image=data_dir / "test" / "test_0.png", prompt="dog")
    results = {gate.name: pass_gate(gate, subject) for gate in gates.BEHAVIOUR_GATES}
    assert {one.status for one in results.values()} <= {"ok", "failed", "not applicable"}
    assert "test_0.png: 'dog' scores" in results["own picture"].measured
    assert {one.cause for result in results.values() for one in result.evidence} <= set(CAUSES)
