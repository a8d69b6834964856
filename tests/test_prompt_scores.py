import pytest

from helpers.errors import InputError
from helpers.prompt_scores import prompt_scores

RLE = {"size": [4, 4], "counts": "02>"}


def query(image_id, prompt, shown, presence, max_query):
    return {
        "image_id": image_id, "prompt": prompt, "height": 4, "width": 4,
        "gt": [RLE] if shown else [], "pred": [], "presence_prob": presence,
        "max_query_prob": max_query, "max_score": presence * max_query,
    }  # fmt: skip


QUERIES = [
    query(1, "crack", True, 1.0, 0.8),
    query(2, "crack", True, 0.5, 0.4),
    query(3, "crack", False, 0.1, 0.9),
    query(1, "dog", False, 0.0, 0.6),
]


def test_prompts_are_kept_apart_by_whether_they_are_shown():
    table = prompt_scores(QUERIES, 0.3)
    assert list(table.index) == [("crack", "present"), ("crack", "absent"), ("dog", "absent")]
    assert table["images"].tolist() == [2, 1, 1]
    shown = table.loc[("crack", "present")]
    assert shown["max score"] == pytest.approx(0.5)  # (0.8 + 0.2) / 2
    assert shown["presence"] == pytest.approx(0.75)
    assert shown["reached"] == 0.5


def test_a_score_at_the_threshold_reaches_it():
    assert prompt_scores(QUERIES, 0.8).loc[("crack", "present"), "reached"] == 0.5


@pytest.mark.parametrize(("queries", "threshold"), [([], 0.3), (QUERIES, 1.5)])
def test_refuses_what_has_no_answer(queries, threshold):
    with pytest.raises(InputError):
        prompt_scores(queries, threshold)
