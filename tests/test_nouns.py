"""Which prompts count as the same."""

import pytest

from helpers.data.prompts import normalise_noun, nouns_overlap


@pytest.mark.parametrize(
    ("noun", "form"),
    [
        ("Concrete_cracks ", "concrete crack"),
        ("moss", "moss"),
        ("Bushes", "bush"),
        ("cavities", "cavity"),
        ("bus", "bus"),
        ("tiles", "tile"),
    ],
)
def test_nouns_are_normalised(noun, form):
    assert normalise_noun(noun) == form


def test_nouns_overlap_in_words():
    assert nouns_overlap("cracks", "concrete crack")
    assert nouns_overlap("brick wall", "Brick")
    assert not nouns_overlap("crack", "cracker")
    assert not nouns_overlap("crack", "joint")
    assert not nouns_overlap("", "joint")
