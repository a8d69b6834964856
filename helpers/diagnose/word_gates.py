"""Gates on the words of a run: which are asked in training, as present or absent, and which now."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

from helpers.checks.words import check_categories, similar_names
from helpers.detect.predictor import Predictor, untrained_prompts
from helpers.diagnose.examination import Evidence, Gate, Inapplicable
from helpers.errors import InputError
from helpers.files import read_json
from helpers.train.run import PROMPTS_FILE

IN_PICTURE = 0.9
"""Score from which the base is believed that a word is in the picture. Of words that are in it, the
embedded base gives 62 % such a score; of its words that are not, 0.0 % on walls, and 1.1 % on
photographs, which it never saw. From 0.3 on these would be 100 %, 14 % and up to 24 %."""
MAX_PRESENT_SHARE = 0.02
"""Of the absent prompts, and more than `SLIPS` of them; see `absent_prompts_in_pictures`."""
SLIPS = 2
SLIP = 0.4
"""Confidence of what is shown and names no cause."""
ASKED_OF_BASE = 48  # images, evenly spaced


def trained_and_asked(examination):
    """Compare the words of the training with those asked now."""
    trained = read_json(examination.folder / PROMPTS_FILE, fix="train again with --overwrite")[
        "prompts"
    ]
    if not trained:
        raise InputError("no prompt was trained with objects", where=examination.folder)
    asked = [examination.prompt] if examination.prompt else _annotated(examination.split("valid"))
    text = f"trained with objects: {', '.join(sorted(trained))}; asked: {', '.join(asked)}"
    unknown = untrained_prompts(asked, trained)
    if unknown:
        text = f"{text}; never trained with objects: {', '.join(unknown)}"
        return text, [Evidence("other_training_prompt", 0.95, text)]
    return text, []


def _annotated(split):
    """List the categories that have objects in a split."""
    used = {item.category for record in split.records for item in record.objects}
    return [name for name in split.categories if name in used]


def absent_prompts_asked(examination):
    """Count the absent prompts of an epoch."""
    queries = [query for _, query, _ in examination.train_queries]
    absent = [query["prompt"] for query in queries if not query["is_positive"]]
    own = set(examination.train_dataset.own_names)
    others = sum(prompt not in own for prompt in absent)
    text = (
        f"{len(absent)} of {len(queries)} prompts of an epoch are absent ones, {others} of them "
        "other words than the dataset's own"
    )
    if not absent:
        return text, [Evidence("only_positive_prompts", 1.0, text)]
    if not others and len(own) == 1:
        return text, [Evidence("only_positive_prompts", 0.9, text)]
    return text, []


def objects_of_one_category(examination):
    """Compare the categories of the objects that a prompt gets with the prompt."""
    if examination.config.data.prompt is not None:
        raise Inapplicable("data.prompt asks for all categories at once", where=examination.folder)
    mixed = Counter()
    for record, query, target in examination.train_queries:
        own = sum(item.category == query["prompt"] for item in record.objects)
        if len(target["boxes_cxcywh"]) > own:
            mixed[query["prompt"]] += 1
    texts = [f"'{prompt}' on {count} images" for prompt, count in mixed.items()]
    text = f"prompts that get objects of another category: {', '.join(texts) or 'none'}"
    return text, [Evidence("merged_categories", 1.0, text)] if mixed else []


def nearly_the_same_names(examination):
    """Find words asked as absent that hardly differ from what the picture is annotated with."""
    clashes = Counter(
        (query["prompt"], item)
        for record, query, _ in examination.train_queries
        for item in {item.category for item in record.objects}
        if not query["is_positive"] and similar_names(query["prompt"], item)
    )
    split = examination.split("train")
    used = _annotated(split)
    parents = {entry.supercategory for entry in split.category_table if entry.name in used}
    asked = Counter(query["prompt"] for _, query, _ in examination.train_queries)
    roots = {name: asked[name] for name in parents - set(used) if asked[name]}
    texts = [
        f"'{absent}' is asked as absent on {count} images that show '{present}'"
        for (absent, present), count in clashes.items()
    ]
    texts += [
        f"'{name}', the parent of other categories, is asked as absent on {count} images"
        for name, count in roots.items()
    ]
    if texts:
        text = "; ".join(texts)
        return text, [Evidence("category_names", 1.0, text)]
    return _in_table(split, used)


def _in_table(split, used):
    """Judge names that are nearly the same, or parents, in the table alone.

    Where both names have objects, each is taught to leave those of the other out. One without
    objects is never asked beside the other by `helpers.data.prompts`, which is shown and no cause.
    """
    doubled = [pair for pair in combinations(used, 2) if similar_names(*pair)]
    if doubled:
        text = "; ".join(f"'{first}' and '{second}' share the objects" for first, second in doubled)
        return text, [Evidence("category_names", 0.9, text)]
    shown = [
        finding.message
        for finding in check_categories(split)
        if finding.code in ("D30_ROOT_CATEGORY", "D31_SIMILAR_NAMES")
    ]
    text = "; ".join(["no absent prompt is nearly a present one", *shown])
    return text, [Evidence("category_names", SLIP, one) for one in shown]


def absent_prompts_in_pictures(examination):
    """Ask the base for the absent prompts of the training.

    Healthy: 0 of 192 (walls), 2 of 189 (masonry), 0 of 162 (potholes).
    """
    by_image = {}
    for record, query, _ in examination.train_queries:
        if not query["is_positive"]:
            by_image.setdefault(record.image_id, (record, []))[1].append(query["prompt"])
    chosen = list(by_image.values())[:: max(1, len(by_image) // ASKED_OF_BASE)]
    predictor = Predictor(*examination.base)
    asked, seen = 0, Counter()
    for record, prompts in chosen:
        for raw in predictor.raw(record.path, prompts):
            asked += 1
            seen[raw.prompt] += raw.max_score > IN_PICTURE
    if not asked:
        raise Inapplicable("no absent prompt was asked", where=examination.folder)
    words = ", ".join(f"{word} ({count})" for word, count in seen.most_common(5) if count)
    text = (
        f"the base sees {seen.total()} of {asked} absent prompts in {len(chosen)} pictures"
        f"{': ' if words else ''}{words}"
    )
    if seen.total() > max(MAX_PRESENT_SHARE * asked, SLIPS):
        return text, [Evidence("present_negatives", 0.9, text)]
    return text, []


PROMPT_GATES = (
    Gate("names", "no absent prompt is nearly a present one", nearly_the_same_names),
    Gate("prompts and their objects", "a prompt gets its own objects", objects_of_one_category),
    Gate("absent prompts", "each image is asked for other words too", absent_prompts_asked),
    Gate("words of the training", "the words asked now were trained", trained_and_asked),
    Gate(
        "absent prompts in pictures",
        f"the base sees at most {MAX_PRESENT_SHARE:.0%} of them",
        absent_prompts_in_pictures,
    ),
)
