"""Write the cheat sheet of lesson 08, a page of all causes: ``python -m data.make_cheat_sheet``."""

from helpers.causes import CAUSES, STAGES
from helpers.files import ROOT, write_text

SHEET = ROOT / "notebooks" / "cheat_sheet.md"
HEAD = """# Cheat sheet: why it detects nothing

Every cause that this course can show, in the order in which data flows. Ask the cheap questions first; an earlier cause explains oddities
further down. `python -m helpers diagnose SOURCE` asks them all, `python -m helpers causes CODE` prints one cause with its sources.
Written by `make notebooks` from [data/causes.csv](../data/causes.csv).
"""


def cheat_sheet():
    """Return the page as Markdown: a table per stage."""
    parts = [HEAD]
    for stage in STAGES:
        rows = [
            f"| **{cause.title}** `{code}` | {cause.symptom} | {cause.test} | {cause.fix} |"
            for code, cause in CAUSES.items()
            if cause.stage == stage
        ]
        if rows:
            head = "| cause | what you see | what shows it | what to do |\n|---|---|---|---|\n"
            parts.append(f"\n## {stage.capitalize()}\n\n{head}" + "\n".join(rows) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    write_text(SHEET, cheat_sheet())
