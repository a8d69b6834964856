"""When two nouns ask for the same thing, so that one cannot be an absent prompt of the other."""

from __future__ import annotations

import re


def normalise_noun(noun):
    """Reduce a noun to the form in which two prompts count as the same.

    Parameters
    ----------
    noun : str
        ``"Concrete_cracks "``.

    Returns
    -------
    str
        Lower case, words joined by one space, without plural endings: ``"concrete crack"``.
    """
    words = re.split(r"[\W_]+", noun.casefold())
    return " ".join(_singular(word) for word in words if word)


def _singular(word):
    """Take a regular English plural ending off a word, leaving words like ``moss`` alone."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def nouns_overlap(first, second):
    """Tell whether one noun may be true wherever the other is.

    Parameters
    ----------
    first, second : str
        For example ``"brick wall"`` and ``"bricks"``.

    Returns
    -------
    bool
        True if the words of one, normalised, are all among the words of the other.
    """
    words, others = set(normalise_noun(first).split()), set(normalise_noun(second).split())
    return bool(words and others) and (words <= others or others <= words)
