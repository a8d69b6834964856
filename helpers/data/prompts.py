"""Which prompts are asked about an image: the present ones, and absent ones drawn at random."""

from __future__ import annotations

import re
import zlib

import numpy as np

from helpers.data.masks import clip_box


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


def true_objects(record):
    """List the objects of an image that count as ground truth, in training and in evaluation.

    Crowd regions do not, nor do boxes without area inside the image; an object without a mask does.
    """
    return [
        item
        for item in record.objects
        if not item.is_crowd and clip_box(item.box_xyxy, record.width, record.height) is not None
    ]


def present_prompts(record, categories, prompt=None):
    """Group the usable objects of an image by the prompt that asks for them.

    Crowd regions and boxes that keep no area inside the image are no targets. A prompt that loses
    all its objects this way is not asked at all: asked as absent, it would teach the opposite.

    Parameters
    ----------
    record : ImageRecord
        The image.
    categories : sequence of str
        Names to ask about; each is its own prompt.
    prompt : str, optional
        Replaces every category name, so that one query gets all objects.

    Returns
    -------
    dict of str to list of ObjectAnnotation
        Prompts in the order of ``categories``.
    """
    usable = true_objects(record)
    if prompt is not None:
        return {prompt: usable} if usable else {}
    groups = {name: [item for item in usable if item.category == name] for name in categories}
    return {name: items for name, items in groups.items() if items}


def absent_candidates(record, nouns):
    """Keep the nouns that nothing in the picture answers to.

    Parameters
    ----------
    record : ImageRecord
        Its annotated categories, crowd regions included and by both names where they are asked by
        another noun, and its ``contents`` are in the picture.
    nouns : sequence of str
        Candidates.

    Returns
    -------
    list of str
        Without any noun that overlaps (`helpers.data.prompts.nouns_overlap`) something in the picture.
    """
    in_picture = {item.category for item in record.objects} | record.contents
    in_picture |= {item.file_category for item in record.objects if item.file_category}
    return [
        noun for noun in nouns if not any(nouns_overlap(noun, present) for present in in_picture)
    ]


def absent_prompts(record, own_names, other_nouns, count, *, seed, epoch):
    """Draw the absent prompts of an image.

    Parameters
    ----------
    record : ImageRecord
        The image.
    own_names : sequence of str
        What the dataset asks for: its category names, or the prompt that replaces them.
    other_nouns : sequence of str
        Further nouns to draw from.
    count : int
        How many to draw; fewer if fewer candidates are left. An image without any object is asked
        for at least one of the dataset's own names, even at 0: nothing else can come of it.
    seed, epoch : int
        The draw depends on these two and the image only, so neither on the number of workers nor
        on the order of the images.

    Returns
    -------
    list of str
        Distinct prompts, an own name first if the image has no object.
    """
    own = absent_candidates(record, own_names)
    others = [noun for noun in absent_candidates(record, other_nouns) if noun not in own]
    generator = np.random.default_rng([seed, epoch, zlib.crc32(record.image_id.encode("utf-8"))])
    first = []
    if not record.objects and own:
        first = [own.pop(int(generator.integers(len(own))))]
    pool = own + others
    drawn = generator.permutation(len(pool))[: max(count - len(first), 0)]
    return first + [pool[index] for index in drawn]
