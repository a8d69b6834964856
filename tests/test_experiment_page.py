"""The page of the experiment says what its tables say."""

import re

import nbformat
import pandas as pd
import pytest

from data.experiments.cells import (
    DESIGNS,
    FAILING,
    FIXED,
    FIXED_LONGER,
    RECOMMENDED,
    RECOMMENDED_LONGER,
    SEEDS_OF,
    SUSPECTS,
    TABLES,
    TEXT_COLUMNS,
    WORKING,
)
from data.experiments.make_photographs import PHOTOGRAPHS
from data.experiments.statistics import paired_difference, steps_table
from data.experiments.tables import DECISIVE, load_base_row, runs_of_states
from helpers.files import ROOT

NOTEBOOKS = ROOT / "notebooks"
SETS = {"masonry224": "masonry, cracks", "pothole90": "potholes"}


def table_of(design):
    return pd.read_csv(TABLES / f"{design}.csv", dtype=TEXT_COLUMNS, keep_default_na=False)


def share_by_state(table, *keys):
    """Return the mean share detected in the states that decide, one row per level of some factors.

    ``table`` is that of the design ``causes``, ``grades`` or ``rates``.
    """
    means = runs_of_states(table).groupby([*keys, "state"], sort=False)["detected_share"].mean()
    return means.unstack(sort=False)[list(DECISIVE)]


def markdown(head, rows):
    """Write a table whose numbers stand at the right."""
    texts = sum(not str(cell)[:1].isdigit() for cell in rows[0])
    rule = "|".join(["---"] * texts + ["---:"] * (len(head) - texts))
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, f"|{rule}|", *others])


BASES_IN_WORDS = {
    "never": "never met the word",
    "control": "as many further steps, no crack",
    "quarter": "knows it a little",
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
    full = share_by_state(table_of("causes").query(f"seed in {SEEDS_OF['rates']}"), "word")
    rows = []
    for word in ("never", "half"):
        own = {"the full rate": full.loc[word]} | dict(shares.loc[word].iterrows())
        for rate, line in own.items():
            rows.append([BASES_IN_WORDS[word], rate, *(f"{share:.2f}" for share in line)])
    return markdown(["base", "rate", *full.columns], rows)


def front_rows():
    columns = ["detected_share", "AP50", "false_positive_rate", "retention_AP"]
    means = table_of("front").groupby(["recipe", "word"], sort=False)[columns].mean()
    alone = table_of("base").set_index("word").loc[["never", "half"], columns]
    rows = [["the base alone", *pairs(alone)]]
    for recipe in dict.fromkeys(means.index.get_level_values("recipe")):
        rows.append([recipe, *pairs(means.loc[recipe])])
    return markdown(["recipe", "detected", "AP50", "false alarms", "kept"], rows)


def pairs(numbers):
    """Write each column of two rows, ``never`` and ``half``, as two numbers."""
    return [f"{never:.2f} / {half:.2f}" for never, half in numbers.loc[["never", "half"]].T.values]


def cure_rows():
    """Compare the recommended recipe, and both for twice as long, with the fixed config by seed."""
    table, rows = table_of("front"), []
    for word in ("never", "half"):
        runs = table[table["word"] == word]
        kept = load_base_row(word=word)["retention_AP"]
        for recipe in (FIXED_LONGER, RECOMMENDED, RECOMMENDED_LONGER):
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


def page(path=TABLES / "README.md"):
    return " ".join(path.read_text(encoding="utf-8").split())


def source(name):
    """Return what the cells of a lesson say, in one line."""
    cells = nbformat.read(NOTEBOOKS / name, as_version=4).cells
    return " ".join(" ".join(cell.source.split()) for cell in cells)


def change(outcome, word, recipe, other):
    """Write by how much the outcome of one recipe differs from that of another, with the interval."""
    runs = table_of("front").query("word == @word")
    step = paired_difference(runs, outcome, {"recipe": other}, {"recipe": recipe})
    return f"{step.value:+.3f} ({step.low:+.3f} to {step.high:+.3f})"


def kept_change(word, recipe, other):
    return change("retention_AP", word, recipe, other)


def others_change(word, other):
    return change("retention_AP_last_five", word, "replay of five", other)


def meets_the_bar(means, kept):
    """Return the recipes that meet the bar of the page on the base that half knows the word."""
    good = means["AP50"] >= means.loc[FIXED, "AP50"] - 0.03
    good &= (means["detected_share"] >= 0.95) & (means["retention_AP"] >= 0.9 * kept)
    return list(means.index[good])


def test_both_bases_have_the_same_seeds_in_both_tables():
    for design in ("causes", "front"):
        table = table_of(design)
        assert set(table["seed"]) == {1, 2, 3, 4, 5}
        assert table["word"].value_counts().nunique() == 1
    assert "(80 runs, five seeds)" in page()
    assert "holds 80 runs, five seeds of sixteen combinations" in source("00_start_here.ipynb")
    for name in ("00_start_here.ipynb", "06_root_cause.ipynb", "09_keep_the_rest.ipynb"):
        assert not re.search(r"three seeds|48 runs|3 to 5|three to five", source(name), re.I)


def test_sentences_on_the_half_knowing_base_have_the_numbers_of_the_table():
    table = table_of("causes").query("word == 'half'")
    steps = steps_table(table, SUSPECTS, "detected_share").loc["working"]
    ends = {
        name: f"{100 * step['low']:+.0f} to {100 * step['high']:+.0f} points"
        for name, step in steps.iterrows()
    }
    frozen, whole = (f"{steps.loc['text_lora', when]:.0%}"[:-1] for when in ("after", "before"))
    object_asked = f"{steps.loc['prompt', 'after']:.0%}"[:-1]
    frozen_object = WORKING | {"prompt": "object", "text_lora": "off"}
    cell = table[(table[list(frozen_object)] == pd.Series(frozen_object)).all(axis=1)]
    assert (cell["detected_share"] == 1).all()  # "the same training detects 100 %"
    kept = table[(table[list(WORKING)] == pd.Series(WORKING)).all(axis=1)]["retention_AP"].mean()
    said = page()
    assert (
        f"detects {frozen} % instead of {whole} % (interval of the difference {ends['text_lora']})"
        in said
    )
    assert f"detects {object_asked} % (interval of the difference {ends['prompt']})" in said
    assert f"known things {kept:.2f} in the working state" in said
    lesson = source("06_root_cause.ipynb")
    assert f"{frozen} and {whole} %, interval of the change {ends['text_lora']}" in lesson
    assert f"{object_asked} % are detected, interval of the change {ends['prompt']}" in lesson
    assert (
        f"{frozen} % of the crack images are detected, with it adapted {whole} % "
        f"(five seeds; interval of the difference {ends['text_lora']})"
    ) in page(NOTEBOOKS / "the_document.md")


def test_sentences_on_the_front_have_the_numbers_of_the_table():
    means = table_of("front").groupby(["word", "recipe"]).mean(numeric_only=True)
    never, half = means.loc["never"], means.loc["half"]
    base = load_base_row(word="half")["retention_AP"]
    tenth, third = "a tenth of the rate", "a third of the rate"
    assert never.loc[tenth, "detected_share"] == 0
    sentences = [
        f"{kept_change('half', 'replay', RECOMMENDED)} where the word is half known, "
        f"{kept_change('never', 'replay', RECOMMENDED)} where it was never met.",
        f"where the word is half known: {change('AP50', 'half', 'replay', RECOMMENDED)}. Where it "
        f"was never met, five seeds leave that open: "
        f"{change('AP50', 'never', 'replay', RECOMMENDED)}.",
        f"with the fixed config, {others_change('half', FIXED)} half known and "
        f"{others_change('never', FIXED)} never met",
        f"all ten replayed, {others_change('half', 'replay')} and {others_change('never', 'replay')}.",
        f"where the word is half known, {kept_change('half', 'DETR encoder', FIXED)}, and more "
        f"where it was never met, {kept_change('never', 'DETR encoder', FIXED)}, which is still "
        f"only {never.loc['DETR encoder', 'retention_AP']:.2f} of ",
        f"{half.loc[tenth, 'retention_AP'] / base:.0%}".replace("%", " %")
        + f" of the base's AP is kept and {half.loc[tenth, 'detected_share']:.0%}".replace(
            "%", " %"
        )
        + " detected",
        f"and {never.loc[third, 'detected_share']:.0%}".replace("%", " %") + " at a third.",
    ]
    said = page()
    for sentence in sentences:
        assert sentence in said, sentence
    met = meets_the_bar(half, base)
    assert sorted(met) == [RECOMMENDED_LONGER, f"{FIXED}, routed"]
    assert f"Of the {len(half)} rows only routing meets the bar as well." in said
    longer = [change("AP50", word, RECOMMENDED_LONGER, FIXED_LONGER) for word in ("half", "never")]
    assert f"AP50 changes by {longer[0]} there, and by {longer[1]} where the word was" in said
    assert f"loses {half.loc[FIXED, 'AP50'] - half.loc[RECOMMENDED, 'AP50']:.3f}; with" in said
    lost = 1 - half.loc[FIXED, "retention_AP"] / base
    assert f"loses about {10 * round(10 * lost)} %" in source("09_keep_the_rest.ipynb")


def test_sentences_on_the_grades_have_the_numbers_of_the_tables():
    table = pd.concat([table_of("causes"), table_of("grades")])
    alone = table_of("base").set_index("word")["detected_share"]
    runs, met = runs_of_states(table), ["quarter", "half", "half_shut", "most"]
    shares = share_by_state(table, "word")
    read = runs[(runs["state"] == "objects read") & runs["word"].isin(met)]
    assert (read["detected_share"] == 1).all()
    steps = {
        paired_difference(
            table[table["word"] == word],
            "detected_share",
            FAILING,
            FAILING | {"objects": "yes"},
        )
        for word in met
    }
    [(low, high)] = {(round(100 * step.low), round(100 * step.high)) for step in steps}
    spoilt = []
    for word in met:
        other = WORKING | {"prompt": "object"}
        step = paired_difference(table[table["word"] == word], "detected_share", WORKING, other)
        share = shares.loc[word, "another word"]
        spoilt.append(f"{100 * share:.0f} % ({100 * step.low:+.0f} to {100 * step.high:+.0f}")
    unread = table[table["objects"] == "no"]
    assert (unread["detected_share"] == 0).all()
    frozen = shares.loc[met, "text encoder frozen"]
    said = page()
    for sentence in (
        f"of which one detects {alone['quarter']:.0%} alone".replace("%", " %"),
        f"from 0 % to 100 % in each of {len(read)} runs (interval of the difference {low:+} to "
        f"{high:+} points on each base)",
        f"detects {100 * frozen.min():.0f} to {100 * frozen.max():.0f} %",
        ", ".join(f"{one})" for one in spoilt),
        f"0 % in all {len(unread)} runs on six bases",
    ):
        assert sentence in said, sentence


def test_sentences_on_lower_rates_have_the_numbers_of_the_tables():
    table = table_of("front").query("word == 'never'").set_index("recipe")
    rates = table_of("rates").query("word == 'never'")
    working = rates[(rates[list(WORKING)] == pd.Series(WORKING)).all(axis=1)].set_index("rate")
    tenth, third = "a tenth of the rate", "a third of the rate"
    for rate in (tenth, third):
        assert working.loc[rate, "config_hash"] in set(table.loc[rate, "config_hash"])
        assert (rates.loc[rates["rate"] == rate, "detected_share"] == 0).all()
    assert (table.loc[tenth, "detected_share"] == 0).all()
    shares = table.loc[third, "detected_share"]
    mean, low, high = (f"{100 * one:.0f}" for one in (shares.mean(), shares.min(), shares.max()))
    never, half = share_by_state(table_of("rates"), "word", "rate").groupby("word", sort=False)
    longer = never[1].xs(f"{third}, three times the epochs", level="rate").iloc[0]
    assert (longer.drop("working") == 0).all()
    other, failing = (100 * half[1][state] for state in ("another word", "failing"))
    said = page()
    for sentence in (
        f"this state detects {mean} % ({low} to {high} %)",
        f"outlines (AP50 {working.loc[third, 'AP50']:.2f})",
        f"it detects {100 * longer['working']:.0f} %, and each of the four other states 0 %",
        "{:.0f} % and {:.0f} % at a third and at a tenth of it, and {:.0f} % at a third".format(
            *other
        ),
        "65 % become 0 %, {:.0f} %, {:.0f} % and {:.0f} %".format(*failing),
    ):
        assert sentence in said, sentence
    assert (half[1]["objects read"] == 1).all()
    assert half[1]["text encoder frozen"].min() > 0.85


def test_what_the_page_says_of_the_rows_of_another_machine():
    table = table_of("front")
    is_new = table["code_version"] == "95425fb"
    assert (is_new.sum(), set(table[is_new]["seed"])) == (40, {2, 5})
    same = table[table["recipe"].isin(table[is_new]["recipe"])]
    outcomes = ["detected_share", "AP50", "retention_AP"]
    here, there = (
        same[side[same.index]].groupby(["word", "recipe"])[outcomes].mean()
        for side in (~is_new, is_new)
    )
    steps = there - here
    average, most = steps.mean(), steps.abs().max()
    assert (
        f"Over the {len(steps)} pairs of recipe and base, means of these two seeds and of the other "
        f"three differ by {average.iloc[0]:+.3f} (detected), {average.iloc[1]:+.3f} (AP50) and "
        f"{average.iloc[2]:+.3f} (kept) on average, and by at most {most.iloc[0]:.2f}, "
        f"{most.iloc[1]:.2f} and {most.iloc[2]:.2f}."
    ) in page()


def test_the_promised_hours_are_those_of_the_rows():
    # A use of an adapter shares the seconds of its run.
    tables = [table_of(design) for design in DESIGNS]
    keys = ["design", "word", "seed", "config_hash"]
    rows = pd.concat(table.assign(word=table.get("word", "")) for table in tables)
    uses = rows["design"] == "front"
    seconds = rows[uses].drop_duplicates(keys)["seconds"].sum() + rows[~uses]["seconds"].sum()
    assert round(seconds / 3600 / 2) == 8
    for path in (NOTEBOOKS / "README.md", ROOT / "Makefile"):
        assert "about eight hours on two cores" in page(path)


@pytest.mark.parametrize("rows", [front_rows, cure_rows, grades_rows, rates_rows, photographs_rows])
def test_tables_of_the_page_are_those_of_the_files(rows):
    assert rows() in (TABLES / "README.md").read_text(encoding="utf-8")


def test_every_table_is_named_on_the_page():
    for name in (*DESIGNS, "base", "photographs", "confusion"):
        assert f"`{name}.csv`" in page(), name
