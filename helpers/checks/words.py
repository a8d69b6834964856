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
    split : helpers.data.records.Split
        Its whole category table is looked at.

    Returns
    -------
    list of helpers.checks.findings.Finding
        ``D30_ROOT_CATEGORY`` to ``D34_ZERO_BASED_IDS`` and ``D36_NO_WORD``.
    """
    table, used = split.category_table, _used_categories(split)
    unused = [name for name in split.categories if name not in used]
    entries = [entry for entry in table if entry.name in split.categories]
    findings = [
        (
            "D30_ROOT_CATEGORY",
            f"'{entry.name}' {_kind(entry)}, is never annotated, and is left out",
            "remove it from the export: asked as absent it would contradict other categories",
        )
        for entry in table
        if entry.name not in split.categories
    ]
    findings += [_similar(*pair) for pair in combinations(entries, 2) if _is_similar(*pair)]
    findings += [
        (
            "D32_NO_NOUN",
            f"'{name}' is the prompt for its objects and is no noun a person would use",
            "rename it to what the picture shows, for example 'crack'",
        )
        for name in split.categories
        if normalise_noun(name) and _is_no_noun(name)
    ]
    findings += [
        (
            "D36_NO_WORD",
            f"the category '{name}' holds no word that could be asked for",
            f"give it a noun: data.prompts_by_category={{'{name}': crack}}, or remove it",
        )
        for name in split.categories
        if not normalise_noun(name)
    ]
    if unused and used:
        message = f"never annotated in this split: {', '.join(unused)}"
        fix = "remove what was never labelled; it may be asked as absent on every image"
        findings.append(("D33_UNUSED_CATEGORY", message, fix))
    if any(entry.category_id == 0 for entry in table):
        message = "category ids start at 0; here only names matter, other tools expect 1"
        fix = "nothing to do unless another tool reads the file"
        findings.append(("D34_ZERO_BASED_IDS", message, fix))
    where = f"{split.name}/categories"
    return [Finding(code, where, message, fix) for code, message, fix in findings]


def _kind(entry):
    """Say why a category that no object has is not asked for."""
    return "is the parent of other categories" if normalise_noun(entry.name) else "holds no word"


def _used_categories(split):
    """Return the set of categories that objects of a split have."""
    return {item.category for record in split.records for item in record.objects}


def _is_similar(first, second):
    """Return whether the names of two `Category` entries are hard to tell apart."""
    return similar_names(first.name, second.name)


def _similar(first, second):
    """Describe two categories of one name, or of nearly the same."""
    if first.name == second.name:
        ids = f"{first.category_id} and {second.category_id}"
        message = f"the categories {ids} are both '{first.name}' and are asked as one"
        return "D31_SIMILAR_NAMES", message, "merge them, or give the second one its own noun"
    message = f"'{first.name}' and '{second.name}' are nearly the same, yet are asked apart"
    fix = "merge them, or choose names that differ in more than ending and case"
    return "D31_SIMILAR_NAMES", message, fix


def similar_names(first, second):
    """Return whether two names differ by case, spacing, plural or a slip only."""
    first, second = normalise_noun(first), normalise_noun(second)
    if first == second:
        return True
    long_enough = min(len(first), len(second)) >= SHORTEST_SLIP
    return long_enough and SequenceMatcher(None, first, second).ratio() >= SIMILAR


def _is_no_noun(name):
    """Return whether a name is a number, a letter, or a word for anything at all."""
    words = normalise_noun(name).split()
    return all(len(word) == 1 or word in NO_NOUNS or re.search(r"\d", word) for word in words)


def check_prompts(split, absent_queries, num_negatives, negative_prompts):
    """Find images without objects and splits in which "no" is never the right answer: D60 to D62.

    ``absent_queries`` is the number of absent prompts asked over the split, ``num_negatives`` how
    many are wanted per image, ``negative_prompts`` the nouns they are drawn from.
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
        message = "every prompt is present in its image; " + (
            "the model learns to say yes to anything"
            if split.name == "train"
            else "whether the model can say no is not measured"
        )
        fix = "set data.num_negatives to 2 to 4 and list nouns in data.negative_prompts"
        findings.append(Finding("D61_NO_ABSENT_PROMPT", split.name, message, fix))
    if num_negatives and negative_prompts and not any(r.contents for r in split.records):
        nouns = len(negative_prompts)
        message = f"{nouns} nouns are asked as absent, and no image lists its contents"
        fix = "make sure that the images show none of them, or list 'contents' per image"
        findings.append(Finding("D62_UNVERIFIED_NEGATIVES", split.name, message, fix))
    return findings


def check_splits_agree(splits):
    """Find categories that are annotated in one split and not in training: D35."""
    used = {name: _used_categories(split) for name, split in splits.items()}
    findings = []
    for name in used:
        if "train" not in used or name == "train" or used[name] == used["train"]:
            continue
        only_here = ", ".join(sorted(used[name] - used["train"])) or "nothing"
        only_train = ", ".join(sorted(used["train"] - used[name])) or "nothing"
        message = f"annotated only here: {only_here}; only in train: {only_train}"
        fix = "use the same names in every split and put each category into each"
        findings.append(Finding("D35_CATEGORIES_DIFFER", name, message, fix))
    return findings
