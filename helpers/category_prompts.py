"""Ask for a category by another noun than its name in the files: a synonym, a singular, a word."""

from __future__ import annotations

import difflib
from dataclasses import replace

from helpers.errors import InputError


def rename_categories(split, prompts_by_category):
    """Give the categories of a split the nouns they are asked by.

    Parameters
    ----------
    split : helpers.records.Split
        As read from its files.
    prompts_by_category : dict of str to str
        ``data.prompts_by_category`` of the config: category name to noun, for example
        ``{"cracks": "crack", "0": "pothole"}``. Names that the split lacks make no difference.

    Returns
    -------
    helpers.records.Split
        Everything that makes prompts from it asks the nouns. Categories with one noun are one
        category, so that one query gets all their objects. What an object is called in the files
        stays in ``file_category``: that word is in the picture, too, and is never asked as absent.
    """
    if not prompts_by_category:
        return split
    records = tuple(_renamed_record(record, prompts_by_category) for record in split.records)
    categories = (prompts_by_category.get(name, name) for name in split.categories)
    table = {}
    for entry in split.category_table:
        name = prompts_by_category.get(entry.name, entry.name)
        table.setdefault(name, replace(entry, name=name))
    return replace(
        split,
        categories=tuple(dict.fromkeys(categories)),
        records=records,
        category_table=tuple(table.values()),
    )


def _renamed_record(record, prompts_by_category):
    """Rename the objects of an image, and say of what else is in it by which noun it is asked."""
    objects = tuple(_renamed(item, prompts_by_category) for item in record.objects)
    nouns = {prompts_by_category[noun] for noun in record.contents if noun in prompts_by_category}
    return replace(record, objects=objects, contents=record.contents | nouns)


def _renamed(item, prompts_by_category):
    """Rename one object, if its category is to be asked by another noun."""
    noun = prompts_by_category.get(item.category, item.category)
    if noun == item.category:
        return item
    return replace(item, category=noun, file_category=item.category)


def refuse_unknown_categories(prompts_by_category, splits):
    """Make sure that every key of a mapping is a category of the dataset.

    Parameters
    ----------
    prompts_by_category : dict of str to str
        See `rename_categories`.
    splits : sequence of helpers.records.Split
        As read, not renamed.

    Raises
    ------
    InputError
        Naming the key and the category it may have meant.
    """
    names = {entry.name for split in splits for entry in split.category_table}
    names |= {name for split in splits for name in split.categories}
    for key in prompts_by_category:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            fix = (
                f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(sorted(names))}"
            )
            raise InputError(
                f"data.prompts_by_category names '{key}', which is no category of the dataset",
                where=splits[0].root.parent if splits else None,
                fix=fix,
            )
