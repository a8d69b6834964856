from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from data.experiments.statistics import (
    INTERACTION,
    contrast,
    effect_table,
    effective_count,
    main_effects,
    paired_difference,
    wilson,
    word_effects,
)
from helpers.errors import InputError


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


def test_effects_of_three_factors_by_hand():
    effects = effect_table(three_factor_table(), FACTORS, "score")["value"]
    assert effects["a"] == pytest.approx(0.2 + 0.4 / 2)
    assert effects["b"] == pytest.approx(0.4 / 2)
    assert effects["c"] == pytest.approx(0.05)
    assert effects["a x b"] == pytest.approx(0.4)
    assert effects["b x c"] == pytest.approx(0)


def test_what_all_seeds_agree_on_has_an_interval_without_width():
    row = effect_table(three_factor_table(), FACTORS, "score").loc["a"]
    assert row["low"] == pytest.approx(row["high"])
    assert row["is_clear"]


def test_a_missing_run_is_refused():
    with pytest.raises(InputError, match="7 runs are not the 8 combinations"):
        effect_table(three_factor_table().iloc[1:], FACTORS, "score")


def estimate(values, count=None):
    return contrast(np.array(values, dtype=float)[:, None], [1], count)


def test_the_interval_is_students():
    mean = estimate([1.0, 2.0, 4.0])
    half = 4.302652729911275 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)  # t(0.975, 2) from a table
    assert (mean.low, mean.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert not mean.is_clear
    assert not estimate([1.0]).is_clear


@pytest.mark.parametrize(("successes", "count"), [(0, 26), (3, 26), (13, 26), (26, 26), (1, 1)])
def test_the_interval_of_a_share_is_wilsons(successes, count):
    interval = binomtest(successes, count).proportion_ci(0.95, "wilson")
    assert wilson(successes / count, count) == pytest.approx((interval.low, interval.high))
    assert estimate([successes / count], count)[1:3] == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((10, 10), (0, 10), 0.6075, 1.0)],
)
def test_the_interval_of_a_difference_of_shares_is_newcombes(first, second, low, high):
    """Newcombe 1998, table II, method 10."""
    shares = [second[0] / second[1], first[0] / first[1]]
    ends = [
        wilson(share, count) for share, count in zip(shares, (second[1], first[1]), strict=True)
    ]
    if first[1] == second[1]:
        assert contrast([shares], [-1, 1], first[1])[1:3] == pytest.approx((low, high), abs=1e-4)
    below = np.hypot(shares[1] - ends[1][0], ends[0][1] - shares[0])
    above = np.hypot(ends[1][1] - shares[1], shares[0] - ends[0][0])
    difference = shares[1] - shares[0]
    assert (difference - below, difference + above) == pytest.approx((low, high), abs=1e-4)


def test_shares_at_a_bound_have_a_width_and_stay_within_the_bounds():
    values = [[0.0, 1.0], [0.0, 1.0], [0.0, 0.96], [0.0, 1.0], [0.0, 0.92]]
    difference = contrast(values, [-1, 1], 26)
    assert -1 <= difference.low < difference.value < difference.high <= 1
    same = contrast([[0.0, 0.0]] * 5, [-1, 1], 26)
    assert same.low < 0 < same.high
    assert not same.is_clear


def test_shares_that_scatter_from_seed_to_seed_are_worth_fewer_images():
    steady, scattered = [0.5] * 5, [0.0, 1.0, 0.5, 0.0, 1.0]
    assert effective_count(np.array(steady)[:, None], 26) == 26
    assert effective_count(np.array(scattered)[:, None], 26) < 5
    widths = [np.ptp(estimate(values, 26)[1:3]) for values in (steady, scattered)]
    assert widths[1] > 2 * widths[0]


def test_the_interval_covers_what_it_promises_and_a_percentile_bootstrap_does_not():
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(600, 5))
    covered = np.mean([one.low <= 0 <= one.high for one in map(estimate, samples)])
    drawn = generator.integers(5, size=(600, 1000, 5))
    means = np.take_along_axis(samples[:, None], drawn, axis=2).mean(2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert 0.93 <= covered <= 0.97
    assert np.mean((low <= 0) & (high >= 0)) < 0.88


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_the_interval_of_a_share_covers_what_it_promises(spread):
    """Seeds may differ in how well they detect; the images are the same for all of them."""
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(400):
        chances = np.clip(0.9 + spread * generator.normal(size=(5, 1)), 0, 1)
        truth = np.clip(0.9 + spread * np.random.default_rng(2).normal(size=100_000), 0, 1).mean()
        shares = (generator.random((5, 26)) < chances).mean(axis=1)
        interval = estimate(shares, 26)
        covered.append(interval.low <= truth <= interval.high)
    assert np.mean(covered) >= 0.93


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
