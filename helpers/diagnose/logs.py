"""Training logs of any script, and what a loss curve alone can tell."""

import csv
import json
import math
import re

import pandas as pd

from helpers.errors import InputError, explain
from helpers.files import resolve

LOG_FILES = ("trainer_state.json", "val_stats.json", "train_stats.json", "results.csv", "log.txt")
"""Usual names of logs, as `helpers.diagnose.patient.open_patient` looks for them."""
NAMES = {
    "step": ("step", "global_step", "iter", "iteration", "steps_trainer"),
    "epoch": ("epoch", "trainer/epoch"),
    "loss": ("loss", "train_loss", "train/loss", "training_loss", "loss/train", "train_loss_epoch"),
    "valid_loss": (
        *("eval_loss", "val_loss", "valid_loss", "val/loss", "validation_loss", "test_loss"),
        *("eval/loss", "valid/loss", "loss/val"),
    ),
    "learning_rate": ("learning_rate", "lr", "train/learning_rate", "train/lr", "lr/pg0"),
}
"""Column of the table to its names in logs, lower case; the first that occurs is taken."""
_WHOLE = re.compile(r"total|core_loss$|(all|default)_loss$")  # beside its own terms
_FIX = "give a CSV file, or JSON lines, with a loss for each step or epoch"


def read_log(source):
    """Read a CSV, JSON lines, one JSON with a list of entries, or entries, as a float DataFrame.

    ``step``, ``epoch``, ``loss``, ``valid_loss``, ``learning_rate`` as far as there are such, other
    numbers by their own names; NaN is what was not logged, inf a number that is not finite.
    """
    source = source.to_dict(orient="records") if isinstance(source, pd.DataFrame) else source
    if isinstance(source, list | tuple):
        return tidy_log(source)
    path = resolve(source)
    with explain((OSError, ValueError), "cannot be read as UTF-8 text", where=path, fix=_FIX):
        text = path.read_text(encoding="utf-8-sig")
    return tidy_log(_entries(text, path), path)


def _entries(text, path):
    """Return the entries of a text: list of dict."""
    if not text.lstrip().startswith(("{", "[")):
        lines = [line for line in text.splitlines() if line.strip()]
        delimiter = max(",;\t|", key=(lines or [""])[0].count)
        if delimiter != ",":
            lines = [line.replace(",", ".") for line in lines]  # decimal commas
        return list(csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = []
        for number, line in enumerate(text.splitlines(), start=1):
            place = f"{path}, line {number}"
            with explain((ValueError, RecursionError), "is no JSON", where=place, fix=_FIX):
                content += [json.loads(line)] if line.strip() else []
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = content.get("log_history") or (lists[0] if len(lists) == 1 else [content])
    return content


def tidy_log(entries, where=None):
    """Turn the entries of a log into the table of `read_log`."""
    rows = [_flat(entry) for entry in entries if isinstance(entry, dict)]
    table = pd.DataFrame(rows, dtype=float)
    lower = {str(name).strip().lower(): name for name in reversed(table.columns)}
    renamed = {}
    for name, spellings in NAMES.items():
        found = next((lower[word] for word in spellings if word in lower), None)
        if found is not None:
            renamed[found] = name
    taken = set(renamed.values())
    table = table.drop(columns=[n for n in table if n in taken and renamed.get(n) != n])
    table = table.rename(columns=renamed)
    if "step" in table and table["step"].is_unique and table["step"].notna().all():
        table = table.sort_values("step", ignore_index=True)  # of a resumed run steps occur twice
    if not {"loss", "valid_loss"} & set(table):
        terms = [name for name in table if "loss" in name.lower() and "val" not in name.lower()]
        if not terms:
            columns = ", ".join(map(str, table.columns[:8])) or "no number"
            raise InputError(f"holds no loss, but {columns}", where=where, fix=_FIX)
        whole = [name for name in terms if _WHOLE.search(name.lower())]
        table["loss"] = table[whole[:1] or terms].sum(axis=1, min_count=1)
    return table


def _flat(entry, prefix=""):
    """Return the numbers of an entry, those of nested dicts as ``outer/inner``."""
    numbers = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            numbers |= _flat(value, f"{prefix}{name}/")
            continue
        try:
            number = float(str(value).strip().removeprefix("tensor(").removesuffix(")"))
        except ValueError:
            continue
        numbers[f"{prefix}{str(name).strip()}"] = number if math.isfinite(number) else math.inf
    return numbers
