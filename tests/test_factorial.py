from itertools import product

import numpy as np
import pandas as pd
import pytest

from helpers.errors import InputError
from helpers.lab.statistics import (
    INTERACTION,
    contrasts,
    effect_table,
    estimate,
    main_effects,
    one_step_effects,
    paired_difference,
    word_effects,
)


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


FACTORS = {"a": (0, 1), "b": ("off", "on"), "c": ("x", "y")}


def three_factor_table(effect_a=0.2, interaction=0.4, seeds=(1, 2, 3)):
    rows = []
    for seed, a, b, c in product(seeds, *FACTORS.values()):
        score = 0.1 * seed + effect_a * a + interaction * (a and b == "on") + 0.05 * (c == "y")
        rows.append({"a": a, "b": b, "c": c, "seed": seed, "score": score})
    return pd.DataFrame(rows)


def test_contrasts_of_three_factors_by_hand():
    effects = contrasts(three_factor_table(), FACTORS, ["score"])["score"]
    assert effects.loc[("a", 1)] == pytest.approx(0.2 + 0.4 / 2)
    assert effects.loc[("b", 2)] == pytest.approx(0.4 / 2)
    assert effects.loc[("c", 3)] == pytest.approx(0.05)
    assert effects.loc[("a x b", 1)] == pytest.approx(0.4)
    assert effects.loc[("b x c", 1)] == pytest.approx(0)


def test_what_all_seeds_agree_on_has_an_interval_without_width():
    row = effect_table(three_factor_table(), FACTORS, "score").loc["a"]
    assert row["low"] == pytest.approx(row["high"])
    assert row["is_clear"]


def test_a_missing_run_is_refused():
    with pytest.raises(InputError, match="7 runs are not the 8 combinations"):
        contrasts(three_factor_table().iloc[1:], FACTORS, ["score"])


def test_the_interval_is_students():
    one = estimate([1.0, 2.0, 4.0])
    half = 4.302652729911275 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)  # t(0.975, 2) from a table
    assert (one.low, one.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert not one.is_clear
    assert not estimate([1.0]).is_clear


def test_the_interval_covers_what_it_promises_and_a_percentile_bootstrap_does_not():
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(600, 5))
    covered = np.mean([one.low <= 0 <= one.high for one in map(estimate, samples)])
    drawn = generator.integers(5, size=(600, 1000, 5))
    means = np.take_along_axis(samples[:, None], drawn, axis=2).mean(2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert 0.93 <= covered <= 0.97
    assert np.mean((low <= 0) & (high >= 0)) < 0.88


def test_runs_of_one_seed_are_paired():
    table = three_factor_table(interaction=0.0)
    there = {"b": "on", "c": "y"}
    one = paired_difference(table, "score", {"a": 0} | there, {"a": 1} | there)
    assert one.value == pytest.approx(0.2)
    assert one.count == 3
    with pytest.raises(InputError, match="do not pair up"):
        paired_difference(table, "score", {"a": 0} | there, {"a": 7} | there)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_a_gap_has_no_mean(values):
    with pytest.raises(InputError, match="no mean"):
        estimate(values)


def test_one_step_leaves_the_other_factors_where_they_are():
    table = three_factor_table(effect_a=0.2, interaction=0.4)
    steps = one_step_effects(table, FACTORS, {"a": 1, "b": "off", "c": "x"}, "score")
    assert steps["value"].tolist() == pytest.approx([-0.2, 0.4, 0.05])
    assert steps[["from", "to"]].values.tolist() == [[1, 0], ["off", "on"], ["x", "y"]]
