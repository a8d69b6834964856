"""The page of the experiment says what its tables say."""

import pandas as pd
import pytest

from data.experiments.cells import (
    DESIGNS,
    FAILING,
    FIXED,
    RECOMMENDED,
    RECOMMENDED_LONGER,
    TABLES,
    TEXT_COLUMNS,
    WORKING,
)
from data.experiments.make_photographs import PHOTOGRAPHS
from data.experiments.statistics import paired_difference
from data.experiments.tables import load_base_row

SETS = {"masonry224": "masonry, cracks", "pothole90": "potholes"}


def table_of(design):
    return pd.read_csv(TABLES / f"{design}.csv", dtype=TEXT_COLUMNS, keep_default_na=False)


def share_by_state(table, *keys):
    """Return the mean share detected in the states that decide, one row per level of some factors.

    ``table`` is that of the design ``causes``, ``grades`` or ``rates``.
    """
    states = {
        "failing": FAILING,
        "objects read": FAILING | {"objects": "yes"},
        "working": WORKING,
        "text encoder frozen": WORKING | {"text_lora": "off"},
        "another word": WORKING | {"prompt": "object"},
    }
    return pd.DataFrame(
        {
            name: table[(table[list(state)] == pd.Series(state)).all(axis=1)]
            .groupby(list(keys), sort=False)["detected_share"]
            .mean()
            for name, state in states.items()
        }
    )


def markdown(head, rows):
    """Write a table whose numbers stand at the right."""
    texts = sum(not str(cell)[:1].isdigit() for cell in rows[0])
    rule = "|".join(["---"] * texts + ["---:"] * (len(head) - texts))
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, f"|{rule}|", *others])


BASES_IN_WORDS = {
    "never": "never met the word",
    "control": "as many further steps, no crack",
    "half": "half knows it",
    "half_shut": "half knows it, and was taught that “object” is absent",
    "most": "knows it",
}


def grades_rows():
    shares = share_by_state(pd.concat([table_of("causes"), table_of("grades")]), "word")
    alone = table_of("base").set_index("word")["detected_share"]
    rows = [
        [text, *(f"{share:.2f}" for share in (alone[word], *shares.loc[word]))]
        for word, text in BASES_IN_WORDS.items()
    ]
    return markdown(["base", "alone", *shares.columns], rows)


def rates_rows():
    shares = share_by_state(table_of("rates"), "word", "rate")
    full = share_by_state(table_of("causes").query("seed == 1"), "word")
    rows = []
    for word in ("never", "half"):
        own = {"the full rate": full.loc[word]} | dict(shares.loc[word].iterrows())
        for rate, line in own.items():
            rows.append([BASES_IN_WORDS[word], rate, *(f"{share:.2f}" for share in line)])
    return markdown(["base", "rate", *full.columns], rows)


def front_rows():
    columns = ["detected_share", "AP50", "false_positive_rate", "retention_AP"]
    groups = table_of("front").groupby(["recipe", "word"], sort=False)
    means, seeds = groups[columns].mean(), groups["seed"].nunique()
    alone = table_of("base").set_index("word").loc[["never", "half"], columns]
    rows = [["the base alone", *pairs(alone), ""]]
    for recipe in dict.fromkeys(means.index.get_level_values("recipe")):
        count = seeds[recipe].unique()
        assert len(count) == 1  # as many on both bases
        rows.append([recipe, *pairs(means.loc[recipe]), str(count[0])])
    head = ["recipe", "detected", "AP50", "false alarms", "kept", "seeds"]
    return markdown(head, rows)


def pairs(numbers):
    """Write each column of two rows, ``never`` and ``half``, as two numbers."""
    return [f"{never:.2f} / {half:.2f}" for never, half in numbers.loc[["never", "half"]].T.values]


def cure_rows():
    """Compare the recommended recipe and its longer run with the fixed config, seed by seed."""
    table, rows = table_of("front"), []
    for word in ("never", "half"):
        runs = table[table["word"] == word]
        kept = load_base_row(word=word)["retention_AP"]
        for recipe in (RECOMMENDED, RECOMMENDED_LONGER):
            own = runs[runs["recipe"] == recipe]
            step = paired_difference(runs, "AP50", {"recipe": FIXED}, {"recipe": recipe})
            change = f"{step.value:+.3f} ({step.low:+.2f} to {step.high:+.2f})"
            shares = (
                f"{own['detected_share'].mean():.0%}",
                f"{own['retention_AP'].mean() / kept:.0%}",
            )
            rows.append([BASES_IN_WORDS[word], recipe, *shares, change])
    return markdown(["base", "recipe", "detected", "kept of the base's AP", "change of AP50"], rows)


def photographs_rows():
    columns = ["detected_share", "precision", "recall", "AP50", "union_iou", "retention_AP"]
    groups = pd.read_csv(PHOTOGRAPHS).groupby(["data", "config"], sort=False)[columns]
    low, mean, high = groups.min(), groups.mean(), groups.max()
    rows = []
    for name, config in mean.index:
        place = (name, config)
        cells = [f"{mean.loc[place, column]:.2f}" for column in columns]
        for column in ("AP50", "retention_AP"):
            ends = f" ({low.loc[place, column]:.2f} to {high.loc[place, column]:.2f})"
            cells[columns.index(column)] += ends
        rows.append([SETS[name], f"`{config}`", *cells])
    head = ["set", "config", "detected", "precision", "recall", "AP50", "union IoU", "kept"]
    return markdown(head, rows)


@pytest.mark.parametrize("rows", [front_rows, cure_rows, grades_rows, rates_rows, photographs_rows])
def test_tables_of_the_page_are_those_of_the_files(rows):
    assert rows() in (TABLES / "README.md").read_text(encoding="utf-8")


def test_every_table_is_named_on_the_page():
    page = (TABLES / "README.md").read_text(encoding="utf-8")
    for name in (*DESIGNS, "base", "photographs", "confusion"):
        assert f"`{name}.csv`" in page, name
