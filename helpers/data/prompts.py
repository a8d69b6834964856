"""Which prompts are asked about an image: the present ones, and absent ones drawn at random."""

import re
import zlib
from functools import lru_cache

import numpy as np

from helpers.data.records import true_objects

REPLAYED_PER_IMAGE = 2  # words in an epoch; each costs as much as a prompt of one's own


@lru_cache(maxsize=10_000)
def normalise_noun(noun):
    """Reduce a noun to lower case singular words: ``"Concrete_cracks "`` to ``"concrete crack"``."""
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


def plain_prompt(prompt):
    """Bring a prompt to lower case with single spaces, which is all the same to the tokenizer."""
    return " ".join(prompt.casefold().split())


def nouns_overlap(first, second):
    """Return whether one noun may be true wherever the other is, like "bricks" and "brick wall"."""
    words, others = set(normalise_noun(first).split()), set(normalise_noun(second).split())
    if not words or not others:  # a name like "-" overlaps with itself only
        return first.strip() == second.strip()
    return words <= others or others <= words


def present_prompts(record, categories, prompt=None):
    """Map the categories, or the one prompt in their place, to the objects of an image, if any."""
    # One that loses all its objects, as crowd regions or outside the image, is not asked at all: as
    # absent, it would teach the opposite.
    objects = true_objects(record)
    if prompt is not None:
        return {prompt: objects} if objects else {}
    groups = {name: [item for item in objects if item.category == name] for name in categories}
    return {name: items for name, items in groups.items() if items}


def absent_candidates(record, nouns):
    """List those of some nouns that overlap with nothing known to be in a picture.

    Known are the ``contents`` of its `ImageRecord` and the names of its objects, of crowds too.
    """
    in_picture = {item.category for item in record.objects} | record.contents
    in_picture |= {item.file_category for item in record.objects if item.file_category}
    return [
        noun for noun in nouns if not any(nouns_overlap(noun, present) for present in in_picture)
    ]


def absent_prompts(record, own_names, other_nouns, count, *, seed, epoch):
    """Draw ``count`` distinct absent prompts of an image, or as many as there are.

    An image without any object is asked for at least one of the dataset's own names, even at 0. The
    draw depends on seed, epoch and image only, not on workers or the order of the images.
    """
    own = absent_candidates(record, own_names)
    others = [noun for noun in absent_candidates(record, other_nouns) if noun not in own]
    generator = _generator(record, seed, epoch)
    first = []
    if not record.objects and own:
        first = [own.pop(int(generator.integers(len(own))))]
    pool = own + others
    drawn = generator.permutation(len(pool))[: max(count - len(first), 0)]
    return first + [pool[index] for index in drawn]


def replayed_prompts(record, answers, *, seed, epoch):
    """Draw at most `REPLAYED_PER_IMAGE` of the words in ``answers``, which maps them to objects."""
    words = [word for word, objects in answers.items() if objects]
    drawn = _generator(record, seed, epoch).permutation(len(words))[:REPLAYED_PER_IMAGE]
    return {words[index]: answers[words[index]] for index in sorted(drawn)}


def _generator(record, seed, epoch):
    """Return the generator of an image in an epoch."""
    name = zlib.crc32(record.image_id.encode("utf-8", "surrogatepass"))
    return np.random.default_rng([seed, epoch, name])
