"""How well a base knows a word, on the bases that the repository holds."""

from dataclasses import replace

import pytest

from helpers.data.coco import read_split
from helpers.detect.knowledge import LOCKED_PRESENCE, LOCKED_QUERY, word_knowledge
from helpers.errors import InputError
from helpers.files import DATA, WALL_CRACKS
from helpers.model.sam3 import load_base


@pytest.fixture(scope="module")
def walls():
    split = read_split(WALL_CRACKS, "test")
    return replace(split, records=split.records[:15])


@pytest.fixture(scope="module")
def unknown(walls):
    return word_knowledge(*load_base(DATA / "tiny_sam3"), walls, ["crack", "window"])


def test_a_word_that_was_never_met_is_locked(unknown):
    assert list(unknown["knowledge"]) == ["locked", "locked"]
    assert (unknown["presence_prob"] < LOCKED_PRESENCE / 10).all()
    assert (unknown["max_query_prob"] < LOCKED_QUERY).all()
    assert (unknown["detected"] == 0).all()
    assert (unknown["images"] == 12).all(), "three of fifteen walls show no crack"


def test_the_interval_of_no_detection_is_that_of_wilson(unknown):
    # 0 of 12: z^2 / (n + z^2) with z = 1.959964
    assert unknown.loc["crack", "low"] == 0
    assert unknown.loc["crack", "high"] == pytest.approx(0.24249, abs=1e-5)


def test_half_known_is_neither_locked_nor_known_and_a_word_detected_nowhere_is_open(walls):
    table = word_knowledge(*load_base(DATA / "tiny_sam3_half_known"), walls, ["crack", "object"])
    assert table.loc["object", "detected"] == 0
    assert table.loc["object", "knowledge"] == "open"
    row = table.loc["crack"]
    assert row["knowledge"] == "half known"
    assert row["presence_prob"] > 100 * LOCKED_PRESENCE
    assert 0.3 < row["detected"] < 0.85
    assert row["low"] < row["detected"] < row["high"]


def test_the_half_known_base_keeps_what_the_base_knew():
    split = read_split(DATA / "known_things", "test")
    split = replace(split, records=split.records[:6])
    table = word_knowledge(*load_base(DATA / "tiny_sam3_half_known"), split, ["moss", "tile"])
    assert list(table["knowledge"]) == ["known", "known"]


def test_a_word_that_the_files_list_is_asked_where_they_list_it(walls):
    shown = {word: sum(word in r.contents for r in walls.records) for word in ("joint", "moss")}
    assert 0 < shown["joint"] < 12
    table = word_knowledge(*load_base(DATA / "tiny_sam3"), walls, [*shown, "crack"])
    assert table["images"].to_dict() == shown | {"crack": 12}
    assert table.loc["joint", "knowledge"] == "known"


def test_a_category_without_objects_is_refused(walls):
    empty = replace(walls, records=tuple(r for r in walls.records if not r.objects))
    with pytest.raises(InputError, match="no image shows 'crack'"):
        word_knowledge(*load_base(DATA / "tiny_sam3"), empty)
