"""Thresholds that are chosen, kinds of mistakes, what a score is worth."""

import numpy as np
import pytest

from helpers.data.masks import mask_to_rle
from helpers.detect import (
    choose_thresholds,
    content_matrix,
    mistake_table,
    reliability_table,
    threshold_sweep,
)
from helpers.detect.queries import Query
from helpers.errors import InputError
from helpers.show import headline

SIDE = 40


def rle(x0, y0, x1, y1):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask_to_rle(mask)


A, B, ELSEWHERE = rle(0, 0, 10, 10), rle(20, 20, 30, 30), rle(0, 30, 8, 38)


def query(image_id, gt, pred, prompt="crack"):
    pred = [{"rle": mask, "score": score} for mask, score in pred]
    return Query(image_id, prompt, SIDE, SIDE, gt, pred)


def split_of(num_images, right, wrong):
    """Every picture has an object, found at one score, and a false detection at another."""
    return [query(n, [A], [(A, right(n)), (ELSEWHERE, wrong(n))]) for n in range(num_images)]


def test_the_best_f1_lies_between_the_right_and_the_wrong():
    queries = split_of(20, lambda n: 0.6 + 0.01 * n, lambda n: 0.2 + 0.01 * n)
    row = choose_thresholds(queries).loc["crack"]
    assert 0.39 < row["threshold"] <= 0.6
    assert row[["precision", "recall", "f1"]].tolist() == [1, 1, 1]
    assert (row["images"], row["objects"]) == (20, 20)


def test_the_numbers_at_the_threshold_are_those_of_the_sweep():
    rng = np.random.default_rng(1)
    queries = split_of(30, lambda n: rng.beta(4, 2), lambda n: rng.beta(2, 4))
    row = choose_thresholds(queries).loc["crack"]
    sweep = threshold_sweep(queries, [row["threshold"]]).iloc[0]
    names = ["precision", "recall", "f1"]
    assert np.allclose(row[names].astype(float), sweep[names].astype(float))
    scores = np.unique(np.concatenate([q.scores for q in queries]))
    assert row["f1"] == pytest.approx(threshold_sweep(queries, scores)["f1"].max())
    assert row["low"] <= row["threshold"] <= row["high"]
    assert row["f1_low"] < row["f1"] < row["f1_high"]


def test_few_pictures_leave_the_threshold_open():
    rng = np.random.default_rng(2)
    few = split_of(6, lambda n: rng.beta(4, 2), lambda n: rng.beta(2, 4))
    many = split_of(200, lambda n: rng.beta(4, 2), lambda n: rng.beta(2, 4))
    widths = [np.ptp(choose_thresholds(q).loc["crack", ["f1_low", "f1_high"]]) for q in (few, many)]
    assert widths[0] > 2 * widths[1]


@pytest.mark.parametrize(("goal", "other"), [("precision", "recall"), ("recall", "precision")])
def test_a_goal_is_reached_at_the_least_cost(goal, other):
    rng = np.random.default_rng(3)
    queries = split_of(40, lambda n: rng.beta(3, 2), lambda n: rng.beta(2, 3))
    row = choose_thresholds(queries, goal, 0.8).loc["crack"]
    sweep = threshold_sweep(queries, np.unique(np.concatenate([q.scores for q in queries])))
    reached = sweep[sweep[goal] >= 0.8]
    assert row[goal] >= 0.8
    assert row[other] == pytest.approx(reached[other].max())


def test_what_cannot_be_reached_is_refused():
    queries = [query(n, [A], [(ELSEWHERE, 0.5)]) for n in range(4)]
    with pytest.raises(InputError, match="'crack': no detection is right"):
        choose_thresholds(queries)
    queries = split_of(4, lambda n: 0.3, lambda n: 0.9)
    with pytest.raises(InputError, match=r"no threshold has precision 0\.9"):
        choose_thresholds(queries, "precision")
    with pytest.raises(InputError, match="no goal 'f2'"):
        choose_thresholds(queries, "f2")
    with pytest.raises(InputError, match="least"):
        choose_thresholds(queries, "recall", 1.5)
    with pytest.raises(InputError, match="no detection is right"):
        choose_thresholds([query(0, [A], [])])


def test_a_word_that_no_picture_shows_has_no_threshold():
    queries = [query(0, [A], [(A, 0.5)]), query(0, [], [(B, 0.9)], "moss")]
    assert choose_thresholds(queries).index.tolist() == ["crack"]


def kinds(queries, threshold=0.1):
    return mistake_table(queries, threshold)["kind"].tolist()


def test_each_kind_of_mistake_is_named():
    shifted, diagonal = rle(5, 0, 15, 10), np.eye(10, dtype=np.uint8)
    thin = np.zeros((SIDE, SIDE), np.uint8)
    thin[:10, :10] = diagonal
    pred = [(A, 0.9), (A, 0.8), (shifted, 0.7), (mask_to_rle(thin), 0.6)]
    queries = [
        query(0, [A], [*pred, (B, 0.5), (ELSEWHERE, 0.4)]),
        query(0, [B], [], "moss"),
    ]
    expected = ["right", "duplicate", "place", "mask", "wrong word", "background", "missed"]
    assert kinds(queries) == expected
    assert kinds(queries, 0.65) == ["right", "duplicate", "place", "missed"]


def test_the_best_detection_takes_the_object_and_the_next_is_a_duplicate():
    nearly = rle(0, 0, 10, 8)
    table = mistake_table([query(0, [A], [(nearly, 0.9), (A, 0.5)])], 0.1)
    assert table["kind"].tolist() == ["right", "duplicate"]
    assert table["iou"].tolist() == pytest.approx([0.8, 1.0])


def test_a_missed_object_has_the_score_of_what_lies_near_it():
    queries = [query(0, [A, B], [(rle(0, 0, 10, 4), 0.05)])]
    table = mistake_table(queries, 0.3)
    assert table["kind"].tolist() == ["missed", "missed"]
    assert table["score"].tolist() == [0.05, 0.0]
    assert list(table.iloc[0]["box_xyxy"]) == [0, 0, 10, 10]


def test_reliability_counts_each_bin_and_its_uncertainty():
    queries = [query(n, [A], [(A, 0.95), (B, 0.15)]) for n in range(10)]
    table = reliability_table(mistake_table(queries, 0.0))
    assert table["count"].tolist() == [10, 10]
    assert table["right"].tolist() == [0.0, 1.0]
    assert table["score"].tolist() == pytest.approx([0.15, 0.95])
    assert table["low"].iloc[1] == pytest.approx(0.722, abs=1e-3)  # Wilson, 10 of 10
    assert table["high"].iloc[0] == pytest.approx(0.278, abs=1e-3)


def test_the_matrix_counts_answers_to_what_is_not_there():
    queries = [
        query(0, [A], [(A, 0.9)]),
        query(0, [], [(B, 0.8)], "car"),
        query(1, [A], []),
        query(1, [B], [(B, 0.8)], "car"),
        query(2, [], [(B, 0.1)], "car"),
        query(2, [], [], "crack"),
    ]
    table = content_matrix(queries, 0.3, {0: {"moss"}})
    assert table.loc["crack", "crack"] == 0.5
    assert table.loc["crack", "car"] == 1.0  # picture 0 alone: picture 1 shows a car
    assert table.loc["car", "car"] == 1.0
    assert table.loc["moss", "car"] == 1.0
    assert table.loc["nothing listed", "car"] == 0.0
    assert np.isnan(table.loc["car", "crack"])  # the one picture with a car shows a crack, too


def test_headlines_have_intervals_over_pictures():
    rng = np.random.default_rng(4)
    queries = split_of(20, lambda n: rng.uniform(0.2, 1), lambda n: rng.uniform(0, 0.8))
    queries += [query(n, [], [(B, rng.uniform(0, 0.5))], "moss") for n in range(20)]
    numbers = headline(queries, 0.6, num_resamples=50)
    assert set(numbers) == {"AP50", "cgF1", "precision", "recall", "F1"}
    for name, (value, low, high) in numbers.items():
        assert low is None or low <= value <= high, name
    value, low, high = numbers["recall"]
    assert value == threshold_sweep(queries, [0.6])["recall"][0]
    assert 0.02 < high - low < 0.6
    assert headline(queries, 0.6, num_resamples=50) == numbers
