"""How long the lessons take: the measured seconds, and every sentence that promises minutes.

``make notebooks`` measures; ``python -m notebooks.run times`` writes the sentences again from the
stored ``times.json``.
"""

import json
import math
import re
from pathlib import Path

from helpers.errors import InputError
from helpers.files import ROOT, read_json, write_json, write_text

NOTEBOOKS = ROOT / "notebooks"
TIMES_FILE = "times.json"
AGAIN = "run `make notebooks`"
PROMISE = re.compile(r"\*\*Time:\*\* (\d+) min[^.]*\.")
PAGE_SENTENCE = re.compile(
    r"`make course` runs independent lessons[^\n]*\n[^\n]*; in seconds: [^\n]*\."
)
TABLE_ROW = re.compile(r"^(\| \[[^|]*\]\(notebooks/(\w+)\.ipynb\) \|[^|]*\|) \d+ \| \d+ \|$", re.M)


def rounded(seconds):
    """Round measured seconds to what another run on the same machine repeats: to 5, from 60 on to 10."""
    step = 5 if seconds < 60 else 10
    return max(step, step * round(seconds / step))


def write_times(seconds, wall_seconds, jobs, folder=NOTEBOOKS):
    """Store measured seconds per lesson, the seconds of all and how many ran at a time."""
    seconds = {name: rounded(one) for name, one in sorted(seconds.items())}
    times = {"seconds": seconds, "seconds_in_all": rounded(wall_seconds), "jobs": jobs}
    return write_json(Path(folder) / TIMES_FILE, times)


def read_times(folder=NOTEBOOKS):
    """Return the stored times as a dict; a damaged file is refused."""
    path = Path(folder) / TIMES_FILE
    times = read_json(path, AGAIN)
    numbers = [times.get("seconds_in_all"), times.get("jobs")]
    seconds = times.get("seconds")
    numbers += seconds.values() if isinstance(seconds, dict) and seconds else [None]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise InputError("holds something else than positive whole numbers", where=path, fix=AGAIN)
    return times


def promised_duration(seconds):
    """Say how long a lesson computes, in half or whole minutes, rounded up."""
    if seconds <= 60:
        return "half a minute" if seconds <= 30 else "a minute"
    return f"{math.ceil(seconds / 60)} minutes"


def lesson_promise(reading_minutes, seconds):
    """Return the sentence about time that the first cell of a lesson should have."""
    duration = promised_duration(seconds)
    return f"**Time:** {reading_minutes} minutes of reading, about {duration} of computing on one CPU core."


def page_promise(times):
    """Return the sentence about time of the page of the notebooks."""
    listed = ", ".join(f"{name[:2]} {seconds}" for name, seconds in times["seconds"].items())
    duration = promised_duration(times["seconds_in_all"])
    return (
        "`make course` runs independent lessons side by side, one thread each. When the outputs stored "
        f"here were made, that took\n{duration}, {times['jobs']} at a time; in seconds: {listed}."
    )


def promises(folder=NOTEBOOKS):
    """Map every file that promises minutes to the text that it should have."""
    folder = Path(folder)
    times, texts, reading = read_times(folder), {}, {}
    lessons = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    if lacking := sorted(lessons.keys() ^ times["seconds"].keys()):
        listed = ", ".join(lacking)
        raise InputError(f"other lessons: {listed}", where=folder / TIMES_FILE, fix=AGAIN)
    for name, path in lessons.items():
        notebook = read_json(path, "restore the notebook")
        text = "".join(notebook["cells"][0]["source"])
        found = _one(PROMISE, text, path)
        reading[name] = int(found[1])
        text = text.replace(found[0], lesson_promise(reading[name], times["seconds"][name]))
        notebook["cells"][0]["source"] = text.splitlines(keepends=True)
        texts[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"

    def row(match):
        seconds = times["seconds"][match[2]]
        return f"{match[1]} {reading[match[2]]} | {math.ceil(seconds / 60)} |"

    page, start = folder / "README.md", folder.parent / "README.md"
    text = page.read_text(encoding="utf-8")
    texts[page] = text.replace(_one(PAGE_SENTENCE, text, page)[0], page_promise(times))
    texts[start] = TABLE_ROW.sub(row, start.read_text(encoding="utf-8"))
    return texts


def write_promises(folder=NOTEBOOKS):
    """Write every sentence and number that promises minutes, in lessons and pages, all or none."""
    for path, text in promises(folder).items():
        write_text(path, text)


def _one(pattern, text, where):
    """Return the only match of a pattern; `InputError` if there is none or several."""
    found = list(pattern.finditer(text))
    if len(found) != 1:
        fix = "write one such sentence, as the other lessons have it"
        raise InputError(f"{len(found)} sentences promise a time, not one", where=where, fix=fix)
    return found[0]
