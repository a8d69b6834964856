"""The prompt bench: what it asks once, what it answers to a bad word, and its heat map."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from helpers.data import read_split
from helpers.detect import Predictor, content_matrix
from helpers.errors import InputError
from notebooks.prompt_bench import (
    MODELS,
    NOTHING,
    PromptBench,
    matrix_figure,
    matrix_sentence,
)

THRESHOLD = 0.1  # some answers of the random run lie above it, some below


@pytest.fixture(scope="module")
def walls(data_dir):
    return read_split(data_dir, "test")


@pytest.fixture
def bench(run, walls):
    settings = {"asked": run.prompts, "score_threshold": THRESHOLD}
    return PromptBench(run.model, run.processor, walls, **settings)


def count_passes(bench, monkeypatch):
    """Return a list that grows by one with each question to the model."""
    asked, raw = [], bench._predictor.raw

    def counted(image, prompts, name=None):
        asked.append((name, tuple(prompts)))
        return raw(image, prompts, name)

    monkeypatch.setattr(bench._predictor, "raw", counted)
    return asked


def test_answers_are_those_of_the_run_and_of_its_base(bench, run, walls):
    record = walls.records[0]
    answers = bench.ask(record.image_id, ["crack", "moss"])
    predictor = Predictor(run.model, run.processor)
    expected = {"this run": predictor.raw(record.path, ["crack", "moss"])}
    with run.model.disable_adapter():
        expected["its base"] = predictor.raw(record.path, ["crack", "moss"])
    for name in MODELS:
        for query, raw in zip(answers[name], expected[name], strict=True):
            assert query.prompt == raw.prompt
            assert query.presence_prob == pytest.approx(raw.presence_prob, abs=1e-6)
            assert query.max_score == pytest.approx(raw.max_score, abs=1e-6)
    assert answers["this run"][0].max_score != answers["its base"][0].max_score
    assert len(answers["this run"][0].gt) == len(record.objects) > 0
    assert answers["this run"][1].gt == []


def test_the_adapter_is_on_again_after_a_question(bench, run, walls):
    image_id = walls.records[0].image_id
    predictor = Predictor(run.model, run.processor)
    before = predictor.raw(walls.records[0].path, ["crack"])[0].max_score
    bench.ask(image_id, ["crack"])
    assert predictor.raw(walls.records[0].path, ["crack"])[0].max_score == before


def test_an_image_is_asked_a_word_once_however_it_is_written(bench, walls, monkeypatch):
    first, second = (record.image_id for record in walls.records[:2])
    asked = count_passes(bench, monkeypatch)
    bench.ask(first, ["crack", "moss", "crack"])
    assert asked == [(first, ("crack", "moss"))] * len(MODELS)
    bench.ask(first, ["  Crack", "MOSS"])
    assert len(asked) == len(MODELS)
    bench.ask(first, ["crack", "dog"])
    assert asked[len(MODELS) :] == [(first, ("dog",))] * len(MODELS)
    bench.ask(second, ["crack"])
    assert asked[-1] == (second, ("crack",))


BAD_WORDS = {
    "": "empty",
    "   ": "empty",
    "crack " * 40: "42 tokens",
    "\ud800": "no text",
    7: "empty",
}


@pytest.mark.parametrize(("word", "message"), BAD_WORDS.items())
def test_a_word_that_cannot_be_asked_is_refused(bench, walls, word, message):
    with pytest.raises(InputError, match=message) as error:
        bench.ask(walls.records[0].image_id, [word])
    assert error.value.fix


def test_a_word_without_a_token_is_refused(bench, monkeypatch):
    tokenize = bench._tokenize
    monkeypatch.setattr(bench, "_tokenize", lambda words: tokenize([""] * len(words)))
    with pytest.raises(InputError, match="no token of '¤'"):
        bench.words(["¤"])


def test_an_image_that_is_not_in_the_split_is_refused(bench):
    with pytest.raises(InputError, match=r"no image 'other.png'"):
        bench.ask("other.png", ["crack"])


def test_a_base_alone_and_an_empty_split_are_refused(run, walls):
    with pytest.raises(InputError, match="no adapter"):
        PromptBench(run.model.get_base_model(), run.processor, walls)
    with pytest.raises(InputError, match="no picture"):
        PromptBench(run.model, run.processor, replace(walls, records=()))
    with pytest.raises(InputError, match="score_threshold is 7"):
        PromptBench(run.model, run.processor, walls, score_threshold=7)


def test_the_table_has_a_row_per_word_and_model(bench, walls):
    image_id = walls.records[0].image_id
    table = bench.table(image_id, ["crack", "moss"])
    assert table.index.tolist() == [(word, name) for word in ("crack", "moss") for name in MODELS]
    query = bench.ask(image_id, ["moss"])["its base"][0]
    row = table.loc["moss", "its base"]
    assert row["highest score"] == query.max_score
    assert row["presence"] * row["best query"] == pytest.approx(row["highest score"], abs=1e-6)
    assert row["detections"] == sum(score >= THRESHOLD for score in query.scores)


def test_a_remark_says_what_the_training_asked(bench, run, walls):
    assert "asked it on pictures that show it" in bench.remark("crack")
    assert "only where it is absent" in bench.remark("moss")
    assert "never asked it; the closest that it asked is “crack”" in bench.remark("cracks")
    assert bench.remark("hole wall").startswith("“hole wall” is read as 2 pieces: hole + wall.")
    unknown = PromptBench(run.model, run.processor, walls)
    assert unknown.remark("moss") == "“moss” is read as 1 piece: moss."


def test_matrices_count_every_picture(bench, walls):
    words = ["crack", "moss"]
    matrices = bench.matrices(words)
    contents = bench.contents()
    assert contents[walls.records[0].image_id] == {"crack"}
    assert contents[walls.records[-1].image_id] == set()
    for number, (name, table) in enumerate(matrices.items()):
        assert name == MODELS[number]
        assert table.columns.tolist() == words
        assert table.index.tolist() == ["crack", NOTHING]
        answers = [bench.ask(r.image_id, words)[name] for r in walls.records]
        flat = [query for same in answers for query in same]
        whole = content_matrix(flat, THRESHOLD, contents)
        assert table.loc["crack", "moss"] == whole.loc["crack", "moss"]
        shown = [a[0].scores.max(initial=0) for a in answers[:-1]]  # the last shows nothing
        assert table.loc["crack", "crack"] == np.mean([score >= THRESHOLD for score in shown])


def matrices_of(crack_to_moss):
    index, columns = ["crack", "moss", NOTHING], ["crack", "moss"]
    values = [[1.0, crack_to_moss], [np.nan, 0.5], [0.0, 0.25]]
    return {"this run": pd.DataFrame(values, index, columns)}


def test_the_heat_map_has_every_number_and_frames_the_right_ones():
    figure = matrix_figure(matrices_of(0.75))
    ax = figure.axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["1.00", "0.75", "–", "0.50", "0.00", "0.25"]
    frames = [(round(one.get_x() + 0.47), round(one.get_y() + 0.45)) for one in ax.patches]
    assert frames == [(0, 0), (1, 1)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["crack", "moss"]


def test_the_sentence_says_what_the_first_word_is_taken_for():
    sentence = matrix_sentence(matrices_of(0.75))
    assert "This run detects where it is: crack 1.00, moss 0.50" in sentence
    assert "on pictures with crack it also detects, asked for it: moss 0.75." in sentence
    assert matrix_sentence(matrices_of(0.0)).endswith("asked for it: nothing.")


def test_the_panel_follows_the_word_and_the_picture(bench, walls):
    panel = bench.panel("crack")
    first = panel.picture.value
    assert first.startswith('<img alt="test_0.png, asked for crack: ')
    assert "this run" in panel.readout.value
    assert panel.widget.still[0].size[0] > 600
    panel.word.value = "moss"
    assert "asked for moss" in panel.picture.value
    assert panel.picture.value != first
    panel.image.value = walls.records[1].image_id
    assert panel.word.value == "moss"
    assert panel.picture.value.startswith('<img alt="test_1.png, asked for moss: ')


@pytest.mark.parametrize("word", ["", "crack " * 40, "\ud800"])
def test_the_panel_answers_a_bad_word_by_a_message(bench, word):
    panel = bench.panel("crack")
    panel.word.value = word
    assert panel.readout.value.startswith('<p role="alert"><b>Not asked:</b>')
    assert len(panel.readout.value) < 700
    assert panel.picture.value == ""
    panel.word.value = "moss"
    assert "Not asked" not in panel.readout.value
    assert panel.picture.value


def test_what_is_typed_is_shown_as_text(bench):
    panel = bench.panel("crack")
    panel.word.value = '<b onclick="x">moss</b>'
    assert "<b onclick" not in panel.readout.value + panel.picture.value
    assert "&lt;b onclick" in panel.readout.value


def test_another_error_is_not_hidden(bench, monkeypatch):
    panel = bench.panel("crack")

    def broken(*_, **__):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(bench._predictor, "raw", broken)
    with pytest.raises(RuntimeError, match="the model is broken"):
        panel.word.value = "dog"


def test_the_panel_stores_a_still(bench):
    bundle = bench.panel("crack").widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "image/jpeg" in data
    assert data["text/plain"].startswith("A panel with sliders")


def test_an_error_of_the_code_is_shown_and_raised(bench, monkeypatch):
    panel = bench.panel("crack")
    monkeypatch.setattr(bench, "_view", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        panel.word.value = "moss"
    assert "division by zero" in panel.readout.value
    assert panel.picture.value == ""
