"""The course card: one page on a pass through the course, from ``summary.json`` and the clinic's score.

``make course`` writes it; ``python -m notebooks.run card`` writes it again, after an exercise for instance.
"""

import re
from numbers import Real
from pathlib import Path

from helpers.answers import templates_in
from helpers.errors import InputError
from helpers.files import ROOT, read_json, write_text
from notebooks.score import Score

NOTEBOOKS = ROOT / "notebooks"
SUMMARY_FILE, CARD_FILE = "summary.json", "card.html"
CLINIC_FOLDER = "clinic"  # where the exercises keep their runs, in the folder of the course
PREDICTION, QUESTION = r"\*\*Predict before", r"<details><summary>\d\. "
_AGAIN = "run `make course` again"


def write_card(output_dir):
    """Write the page and return its path.

    Parameters
    ----------
    output_dir : os.PathLike
        Of a pass through the course, with its ``summary.json``.

    Raises
    ------
    helpers.errors.InputError
        If the summary or the score of the clinic is missing or damaged.
    """
    output_dir = Path(output_dir)
    summary, score = read_summary(output_dir), Score(output_dir / CLINIC_FOLDER)
    done, failures = summary["notebooks"], summary["failures"]
    rows = [
        {"name": name, "reason": failures.get(name), "seconds": done.get(name, {}).get("seconds")}
        | questions_in(output_dir / f"{name}.ipynb")
        for name in sorted(done.keys() | failures.keys())
    ]
    total = len(rows)
    headline = f"{len(done)} of {total} lessons done"
    headline += "" if failures else f" in {summary['seconds'] / 60:.0f} minutes of computing"
    numbers = [sum(row[key] for row in rows) for key in ("predictions", "questions")]
    asked = "They asked for {} predictions and {} answers of yours.".format(*numbers)
    page = templates_in(NOTEBOOKS, autoescape=True).get_template("card.html")
    text = page.render(
        headline=headline,
        rows=rows,
        asked=asked,
        score=score,
        patients=score.table.to_dict("records"),
        next_step=next_step(failures, score),
        summary=summary,
    )
    return write_text(output_dir / CARD_FILE, text + "\n")


def read_summary(output_dir):
    """Return ``summary.json`` of a pass through the course as a dict; a damaged one is refused."""
    path = Path(output_dir) / SUMMARY_FILE
    if not path.is_file():
        raise InputError("no course has ended here", where=path, fix="run `make course` first")
    summary = read_json(path, _AGAIN)
    parts = {"versions": str, "seconds": Real, "notebooks": dict, "failures": dict}
    is_sound = all(isinstance(summary.get(name), kind) for name, kind in parts.items())
    if is_sound:
        lessons = summary["notebooks"].values()
        is_sound = all(
            isinstance(one, dict) and isinstance(one.get("seconds"), Real) for one in lessons
        )
        is_sound &= all(isinstance(reason, str) for reason in summary["failures"].values())
    if not is_sound:
        raise InputError("is no summary of a course", where=path, fix=_AGAIN)
    return summary


def questions_in(path):
    """Return how many predictions and answers a notebook asks for; zeros if it is not there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    patterns = {"predictions": PREDICTION, "questions": QUESTION}
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


def next_step(failures, score):
    """Return the line on how to go on: what failed first, then the exercises, then your own run."""
    if failures:
        first = min(failures)
        return f"open {first}.ipynb beside this page and look at its last cell, then `make course`."
    tried = {name.rpartition("/")[0] for name in score.patients}
    exercises = sorted(path.stem for path in (NOTEBOOKS / "exercises").glob("*.ipynb"))
    if left := [name for name in exercises if name[:2] not in tried]:
        return f"`make lab`, and the patient of notebooks/exercises/{left[0]}.ipynb."
    return "your own run: `python -m helpers diagnose SOURCE`, as in lesson 08."
