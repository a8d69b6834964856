"""Faults of the words: categories that cannot be asked for, and absent prompts that are missing."""

import re
from difflib import SequenceMatcher
from itertools import combinations

from helpers.checks.findings import Place, finding_at, finding_of
from helpers.data.records import normalise_noun

SIMILAR = 0.85  # share of matching letters from which two names pass for a slip of the pen
SHORTEST_SLIP = 5  # letters; among shorter words "rust" and "dust" are different things
NO_NOUNS = frozenset(
    "object thing item class category label target instance annotation region roi foreground "
    "background none null unknown other misc unlabeled unlabelled undefined default".split()
)


def check_categories(split):
    """Find names that make bad prompts, in the whole category table of a `Split`.

    Returns a list of `Finding`: ``D30_ROOT_CATEGORY`` to ``D34_ZERO_BASED_IDS``, ``D36_NO_WORD``.
    """
    table, used, faults = split.category_table, split.used_categories, []
    entries = [entry for entry in table if entry.name in split.categories]
    for entry in table:
        if entry.name not in split.categories:
            has_word = normalise_noun(entry.name)
            kind = "is the parent of other categories" if has_word else "holds no word"
            faults.append(("D30_ROOT_CATEGORY", {"name": entry.name, "kind": kind}))
    for first, second in combinations(entries, 2):
        if similar_names(first.name, second.name):
            pair = f"'{first.name}' and '{second.name}' are nearly the same, yet are asked apart"
            if first.name == second.name:
                ids = f"the categories {first.category_id} and {second.category_id}"
                pair = f"{ids} are both '{first.name}' and are asked as one"
            faults.append(("D31_SIMILAR_NAMES", {"pair": pair}))
    for name in split.categories:
        words = normalise_noun(name).split()
        if all(len(word) == 1 or word in NO_NOUNS or re.search(r"\d", word) for word in words):
            faults.append(("D32_NO_NOUN" if words else "D36_NO_WORD", {"name": name}))
    unused = [name for name in split.categories if name not in used]
    if unused and used:
        faults.append(("D33_UNUSED_CATEGORY", {"names": ", ".join(unused)}))
    if any(entry.category_id == 0 for entry in table):
        faults.append(("D34_ZERO_BASED_IDS", {}))
    return [finding_of(code, f"{split.name}/categories", **values) for code, values in faults]


def similar_names(first, second):
    """Return whether two names differ by case, spacing, plural or a slip only."""
    first, second = normalise_noun(first), normalise_noun(second)
    is_long = min(len(first), len(second)) >= SHORTEST_SLIP
    return first == second or (is_long and SequenceMatcher(None, first, second).ratio() >= SIMILAR)


def check_prompts(split, absent_queries, num_negatives, negative_prompts):
    """Find images without objects, and a split of which no prompt, of so many, is absent."""
    empty = [record for record in split.records if not record.objects]
    total = len(split.records)
    share = len(empty) / max(total, 1)
    places = [Place(split.name, record.image_id, record.path) for record in empty]
    findings = finding_at("D60_IMAGES_WITHOUT_OBJECTS", places, total=total, share=share)
    if not absent_queries:
        consequence = "whether the model can say no is not measured"
        if split.name == "train":
            consequence = "the model learns to say yes to anything"
        findings.append(finding_of("D61_NO_ABSENT_PROMPT", split.name, consequence=consequence))
    if num_negatives and negative_prompts and not any(r.contents for r in split.records):
        findings.append(finding_of("D62_UNVERIFIED_NEGATIVES", split.name, n=len(negative_prompts)))
    return findings


def check_splits_agree(splits):
    """Find categories that are annotated in one split and not in training: D35."""
    used = {name: set(split.used_categories) for name, split in splits.items()}
    findings = []
    for name in used if "train" in used else ():
        here = ", ".join(sorted(used[name] - used["train"])) or "nothing"
        train = ", ".join(sorted(used["train"] - used[name])) or "nothing"
        if used[name] != used["train"]:
            findings.append(finding_of("D35_CATEGORIES_DIFFER", name, here=here, train=train))
    return findings
