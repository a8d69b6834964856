"""Faults of the words: categories that cannot be asked for, and absent prompts that are missing."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import combinations

from helpers.checks.findings import Finding, Place, finding_at
from helpers.data.prompts import normalise_noun

SIMILAR = 0.85  # share of matching letters from which two names pass for a slip of the pen
SHORTEST_SLIP = 5  # letters; among shorter words "rust" and "dust" are different things
NO_NOUNS = frozenset(
    "object thing item class category label target instance annotation region roi foreground "
    "background none null unknown other misc unlabeled unlabelled undefined default".split()
)


def check_categories(split):
    """Find names that make bad prompts.

    Parameters
    ----------
    split : Split
        Its whole category table is looked at.

    Returns
    -------
    list of Finding
        ``D30_ROOT_CATEGORY``, ``D31_SIMILAR_NAMES``, ``D32_NO_NOUN``, ``D33_UNUSED_CATEGORY``,
        ``D34_ZERO_BASED_IDS``.
    """
    where, table = f"{split.name}/categories", split.category_table
    used = {item.category for record in split.records for item in record.objects}
    unused = [name for name in split.categories if name not in used]
    asked = [entry for entry in table if entry.name in split.categories]
    found = [
        (
            "D30_ROOT_CATEGORY",
            f"'{entry.name}' is the parent of other categories, is never annotated, and is left out",
            "remove it from the export: asked as absent it would contradict its children",
        )
        for entry in table
        if entry.name not in split.categories
    ]
    found += [
        (
            "D31_SIMILAR_NAMES",
            f"'{first.name}' and '{second.name}' are nearly the same, yet are asked apart",
            "merge them, or choose names that differ in more than ending and case",
        )
        for first, second in combinations(asked, 2)
        if similar_names(first.name, second.name)
    ]
    found += [
        (
            "D32_NO_NOUN",
            f"'{name}' is the prompt for its objects and is no noun a person would use",
            "rename it to what the picture shows, for example 'crack'",
        )
        for name in split.categories
        if _is_no_noun(name)
    ]
    if unused and used:
        message = f"never annotated in this split: {', '.join(unused)}"
        fix = "remove what was never labelled; it may be asked as absent on every image"
        found.append(("D33_UNUSED_CATEGORY", message, fix))
    if any(entry.category_id == 0 for entry in table):
        message = "category ids start at 0; here only names matter, other tools expect 1"
        fix = "nothing to do unless another tool reads the file"
        found.append(("D34_ZERO_BASED_IDS", message, fix))
    return [Finding(code, where, message, fix) for code, message, fix in found]


def similar_names(first, second):
    """Tell whether two names differ by case, spacing, plural or a slip only.

    Parameters
    ----------
    first, second : str
        Names of categories.

    Returns
    -------
    bool
        True also for a share of matching letters of at least `SIMILAR` in longer names.
    """
    first, second = normalise_noun(first), normalise_noun(second)
    if first == second:
        return True
    long_enough = min(len(first), len(second)) >= SHORTEST_SLIP
    return long_enough and SequenceMatcher(None, first, second).ratio() >= SIMILAR


def _is_no_noun(name):
    """Tell whether a name is a number, a letter, or a word for anything at all."""
    words = normalise_noun(name).split()
    return all(len(word) == 1 or word in NO_NOUNS or re.search(r"\d", word) for word in words)


def check_prompts(split, absent_queries, num_negatives, negative_prompts):
    """Find images without objects and splits in which "no" is never the right answer.

    Parameters
    ----------
    split : Split
        For the images.
    absent_queries : int
        Absent prompts asked over the split.
    num_negatives : int
        Absent prompts wanted per image.
    negative_prompts : sequence of str
        Nouns they are drawn from.

    Returns
    -------
    list of Finding
        ``D60_IMAGES_WITHOUT_OBJECTS``, ``D61_NO_ABSENT_PROMPT``, ``D62_UNVERIFIED_NEGATIVES``.
    """
    empty = [
        Place(split.name, record.image_id, record.path)
        for record in split.records
        if not record.objects
    ]
    share = len(empty) / max(len(split.records), 1)
    findings = finding_at(
        "D60_IMAGES_WITHOUT_OBJECTS",
        empty,
        f"{len(empty)} of {len(split.records)} images ({share:.0%}) show no object and teach "
        "absence only",
        "make sure that they really show none",
    )
    if not absent_queries:
        consequence = (
            "the model learns to say yes to anything"
            if split.name == "train"
            else "whether the model can say no is not measured"
        )
        findings.append(
            Finding(
                "D61_NO_ABSENT_PROMPT",
                split.name,
                "every prompt is present in its image; " + consequence,
                "set data.num_negatives to 2 to 4 and list nouns in data.negative_prompts",
            )
        )
    if num_negatives and negative_prompts and not any(r.contents for r in split.records):
        findings.append(
            Finding(
                "D62_UNVERIFIED_NEGATIVES",
                split.name,
                f"{len(negative_prompts)} nouns are asked as absent, and no image lists its contents",
                "make sure that the images show none of them, or list 'contents' per image",
            )
        )
    return findings


def check_splits_agree(splits):
    """Find categories that are annotated in one split and not in training.

    Parameters
    ----------
    splits : dict of str to Split
        By name; without ``train`` there is nothing to compare.

    Returns
    -------
    list of Finding
        ``D35_CATEGORIES_DIFFER``.
    """
    used = {
        name: {item.category for record in split.records for item in record.objects}
        for name, split in splits.items()
    }
    findings = []
    for name in used:
        if "train" not in used or name == "train" or used[name] == used["train"]:
            continue
        only_here = sorted(used[name] - used["train"])
        only_train = sorted(used["train"] - used[name])
        findings.append(
            Finding(
                "D35_CATEGORIES_DIFFER",
                name,
                f"annotated only here: {', '.join(only_here) or 'nothing'}; only in train: "
                f"{', '.join(only_train) or 'nothing'}",
                "use the same names in every split and put each category into each",
            )
        )
    return findings
