"""The one-line form of the user's error."""

import pickle

import pytest

from helpers.errors import InputError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("is empty"), "is empty"),
        (InputError("is empty", where="a.json"), "a.json: is empty"),
        (InputError("is empty", fix="write it"), "is empty. Fix: write it"),
        (InputError("Is it empty?", where="a", fix="look"), "a: Is it empty? Fix: look"),
        (InputError("two\n  lines", fix="join\nthem"), "two lines. Fix: join them"),
    ],
)
def test_one_line(error, line):
    assert str(error) == line


def test_parts_survive_the_border_of_a_worker_process():
    error = pickle.loads(pickle.dumps(InputError("broken", where="b.jpg", fix="replace it")))
    assert (error.message, error.where, error.fix) == ("broken", "b.jpg", "replace it")
    assert str(error) == "b.jpg: broken. Fix: replace it"
