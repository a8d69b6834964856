import pandas as pd
import pytest

from helpers.errors import InputError
from helpers.factorial import INTERACTION, main_effects, word_effects


def cells_of(*values, outcome="score"):
    index = pd.MultiIndex.from_product([["no", "yes"], ["off", "on"]], names=["objects", "text"])
    return pd.DataFrame({outcome: values}, index=index)


def test_effects_by_hand():
    effects = main_effects(cells_of(0.0, 0.1, 0.5, 0.9))["score"]
    assert effects["objects"] == pytest.approx(0.65)
    assert effects["text"] == pytest.approx(0.25)
    assert effects[INTERACTION] == pytest.approx(0.3)


def test_the_order_of_the_rows_only_sets_the_reference():
    cells = cells_of(0.0, 0.1, 0.5, 0.9)
    turned = main_effects(cells.iloc[::-1])["score"]
    assert turned["objects"] == pytest.approx(-0.65)
    assert turned["text"] == pytest.approx(-0.25)
    assert turned[INTERACTION] == pytest.approx(0.3)


def test_several_outcomes_are_independent():
    cells = cells_of(0, 0, 1, 1).join(cells_of(0, 1, 0, 1, outcome="other"))
    effects = main_effects(cells)
    assert effects["score"].tolist() == [1, 0, 0]
    assert effects["other"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 0.1, 0.5, 0.9), "score: 'objects' changes it by +0.650, 'text' by +0.250: "
         "the first is 2.6 times as large."),
        ((0.9, 0.0, 0.8, 0.1), "score: 'text' changes it by -0.800, 'objects' by +0.000: "
         "only the first makes a difference."),
        ((0.0, 0.5, 0.5, 1.0), "score: 'objects' changes it by +0.500 and 'text' by +0.500: "
         "equally much."),
        ((0.0, 0.0001, 0.0, 0.0), "score: neither 'objects' nor 'text' changes it (both +0.000)."),
    ],
)  # fmt: skip
def test_the_sentence_follows_the_numbers(values, expected):
    assert word_effects(main_effects(cells_of(*values)), "score") == expected


def test_a_unit_is_written_after_the_outcome():
    sentence = word_effects(main_effects(cells_of(0, 0, 1, 1)), "score", unit="(mean)")
    assert sentence.startswith("score (mean): 'objects' changes it by +1.000")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cells: cells.iloc[:3],
        lambda cells: pd.concat([cells, cells.iloc[:1]]),
        lambda cells: cells.reset_index(drop=True),
        lambda cells: cells.rename_axis([None, "text"]),
    ],
)
def test_what_is_no_two_by_two_is_refused(spoil):
    with pytest.raises(InputError):
        main_effects(spoil(cells_of(0, 0, 1, 1)))


def test_a_missing_outcome_is_refused():
    with pytest.raises(InputError, match="an outcome is missing: score"):
        main_effects(cells_of(0, 0, 1, float("nan")))
