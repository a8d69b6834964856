"""Draw the pipeline with the five places where a zero can arise: ``python -m data.make_drawings``.

One large drawing for lesson 00 and the page of the notebooks, and one strip per lesson with the
lesson's places lit. Colours are those of the course's figures; every place also has a number.
"""

import re
from html import escape
from typing import NamedTuple

from helpers.causes import TABLE
from helpers.files import ROOT, write_text

FIGURES = ROOT / "notebooks" / "figures"
PIPELINE = FIGURES / "pipeline.svg"


class Place(NamedTuple):
    """A place of the pipeline at which a run can come to detect nothing."""

    name: str
    healthy: str  # what holds there in a run that detects
    failing: str  # what goes wrong there
    stages: tuple[str, ...]  # stages of the catalogue (``data/causes.csv``) that belong to it


PLACES = {
    1: Place("Data", "objects arrive", "no object, or a wrong one, reaches the loss", ("data",)),
    2: Place(
        "Words",
        "asked = trained",
        "the asked word is not the trained one; “no” was never taught",
        ("prompts",),
    ),
    3: Place(
        "LoRA",
        "in place, loaded",
        "it sits where no word is learned, or is not loaded",
        ("files", "base", "adapter", "checkpoint"),
    ),
    4: Place(
        "Loss",
        "objects count",
        "the loss rewards silence; logits end at their clamp",
        ("loss", "training"),
    ),
    5: Place(
        "Score",
        "presence × query",
        "a factor is low, the threshold too high, or the score computed wrongly",
        ("prediction", "evaluation"),
    ),
}
LESSONS = {
    "01": (1,),
    "02": (1, 4),
    "03": (3,),
    "04": (4,),
    "05": (2, 5),
    "06": (1, 2, 3),
    "07": (1, 2),
    "08": (1, 2, 3, 4, 5),
    "09": (2, 3),
}
"""Which places each lesson is about; 08 asks at all of them."""
PLACE_OF_CAUSE = {
    key: number
    for key, cause in TABLE.items()
    for number, place in PLACES.items()
    if cause.stage in place.stages
}
"""The place of every cause of the catalogue."""

STYLE = """
text { font-family: Helvetica, Arial, "Liberation Sans", sans-serif; font-size: 12.5px; fill: #1b1b1b; }
.small { font-size: 11.5px; fill: #4a4a4a; }
.bold { font-weight: bold; }
.card { fill: #ffffff; stroke: #c4c4c4; }
.panel { fill: #f1f1f1; stroke: #8a8a8a; }
.box { fill: #ffffff; stroke: #6a6a6a; }
.wire { fill: none; stroke: #4a4a4a; stroke-width: 1.6; }
.head { fill: #4a4a4a; }
.back { stroke-dasharray: 5 3; }
@media (prefers-color-scheme: dark) {
text { fill: #ececec; }
.small { fill: #bdbdbd; }
.card { fill: #1c1c1e; stroke: #55555a; }
.panel { fill: #2a2a2d; stroke: #8a8a8a; }
.box { fill: #1c1c1e; stroke: #a0a0a0; }
.wire { stroke: #bdbdbd; }
.head { fill: #bdbdbd; }
}
.white { fill: #ffffff; }
.black { fill: #000000; }
"""


def colours():
    """Return the colour of each place, from the style of the course's figures."""
    style = (ROOT / "helpers" / "show" / "course.mplstyle").read_text(encoding="utf-8")
    cycle = re.findall(r"'([0-9A-F]{6})'", style)
    chosen = [cycle[0], cycle[1], cycle[2], cycle[3], cycle[6]]  # black would vanish in dark mode
    return {number: f"#{colour}" for number, colour in zip(PLACES, chosen, strict=True)}


def on(colour):
    """Return the class of text that is readable on a colour: white on dark ones only."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 100 else "black"


def text(x, y, content, style="", anchor="middle"):
    """Return one line of text."""
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{escape(content)}</text>'


def box(x, y, width, height, lines, style="box", colour=None):
    """Return a rounded box with centred lines of text, the first bold, the others small."""
    edge = f' style="stroke: {colour}; stroke-width: 3"' if colour else ""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" class="{style}"{edge}/>'
    ]
    first = y + height / 2 + 4 - 8 * (len(lines) - 1)
    for row, line in enumerate(lines):
        parts.append(text(x + width / 2, first + 16 * row, line, "small" if row else "bold"))
    return "".join(parts)


def badge(x, y, number):
    """Return the number of a place in a disc of its colour."""
    colour = colours()[number]
    disc = f'<circle cx="{x}" cy="{y}" r="11" fill="{colour}" class="disc"/>'
    return disc + text(x, y + 4.5, str(number), f"bold {on(colour)}")


def arrow(*points, style="wire"):
    """Return a line through points with a head at its end, which has to run straight."""
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    left, right = (
        (x1 - 8 * dx - 4 * dy, y1 - 8 * dy - 4 * dx),
        (
            x1 - 8 * dx + 4 * dy,
            y1 - 8 * dy + 4 * dx,
        ),
    )
    line = " ".join(f"{x},{y}" for x, y in points)
    head = " ".join(f"{x},{y}" for x, y in ((x1, y1), left, right))
    return f'<polyline points="{line}" class="{style}"/><polygon points="{head}" class="head"/>'


def picture(width, height, title, parts):
    """Return a complete SVG on a card of its own, so that it can be read on any page."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="9" class="card"/>',
            *parts,
            "</svg>\n",
        ]
    )


def lessons_of(number):
    """Return the lessons about a place, those about all places left out."""
    return [lesson for lesson, lit in LESSONS.items() if number in lit and len(lit) < len(PLACES)]


def pipeline():
    """Return the large drawing: data, model, loss and score, and what can go wrong at each."""
    hue = colours()
    parts = [
        # what the data give
        box(16, 44, 122, 62, ["annotations", "reader, collate"], colour=hue[1]),
        badge(26, 44, 1),
        box(62, 160, 76, 44, ["image"]),
        box(16, 262, 122, 62, ["prompt: “crack”", "present or absent"], colour=hue[2]),
        badge(26, 262, 2),
        arrow((100, 106), (100, 160)),
        arrow((48, 106), (48, 262)),
        # the model
        f'<rect x="164" y="124" width="372" height="226" rx="9" class="panel" '
        f'style="stroke: {hue[3]}; stroke-width: 3"/>',
        badge(174, 124, 3),
        text(194, 146, "SAM3, frozen, with LoRA beside its layers", "bold", "start"),
        box(176, 160, 110, 44, ["vision encoder"]),
        box(176, 271, 110, 44, ["text encoder"]),
        box(298, 208, 108, 62, ["DETR encoder", "word meets", "image"]),
        box(420, 208, 108, 62, ["DETR decoder", "presence,", "queries"]),
        box(420, 290, 108, 44, ["mask decoder"]),
        arrow((138, 182), (176, 182)),
        arrow((138, 293), (176, 293)),
        arrow((286, 182), (340, 182), (340, 208)),
        arrow((286, 293), (340, 293), (340, 270)),
        arrow((406, 239), (420, 239)),
        arrow((474, 270), (474, 290)),
        # loss and score
        box(562, 44, 124, 62, ["matching, loss", "in training"], colour=hue[4]),
        badge(572, 44, 4),
        box(562, 200, 124, 78, ["score", "presence × query", "≥ threshold?"], colour=hue[5]),
        badge(572, 200, 5),
        box(562, 306, 124, 44, ["detections"]),
        arrow((138, 64), (562, 64)),
        text(349, 57, "objects: boxes and masks", "small"),
        '<polyline points="528,312 548,312 548,239" class="wire"/>',
        arrow((528, 239), (562, 239)),
        arrow((548, 239), (548, 160), (624, 160), (624, 106)),
        text(632, 138, "outputs", "small", "start"),
        arrow((562, 88), (452, 88), (452, 124), style="wire back"),
        text(444, 106, "gradient, to LoRA alone", "small", "end"),
        arrow((624, 278), (624, 306)),
    ]
    for row, (number, place) in enumerate(PLACES.items()):
        y = 384 + 26 * row
        parts += [
            badge(28, y, number),
            text(48, y + 4.5, place.name, "bold", "start"),
            text(98, y + 4.5, place.failing, "", "start"),
            text(684, y + 4.5, "lessons " + " · ".join(lessons_of(number)), "small", "end"),
        ]
    parts.append(
        text(48, 516, "Lesson 08 asks a failing run at all five places.", "small", "start")
    )
    return picture(
        700,
        532,
        "The pipeline, and the five places at which a run can come to detect nothing",
        parts,
    )


def strip(lesson):
    """Return the strip of a lesson: the five places in a row, the lesson's own filled and marked."""
    width, gap, parts = 122, 16, []
    for number, place in PLACES.items():
        x, lit, colour = (
            14 + (number - 1) * (width + gap),
            number in LESSONS[lesson],
            colours()[number],
        )
        if number > 1:
            parts.append(arrow((x - gap, 48), (x, 48)))
        if lit:
            parts.append(f'<polygon points="{x + 54},5 {x + 68},5 {x + 61},16" class="head"/>')
        fill = f'style="fill: {colour}; stroke: {colour}; stroke-width: 3"' if lit else ""
        parts.append(
            f'<rect x="{x}" y="22" width="{width}" height="52" rx="7" class="box" {fill}/>'
        )
        ink = on(colour) if lit else ""
        name = f"{number} · {place.name}"
        parts.append(text(x + width / 2, 43, name, f"bold {ink}"))
        parts.append(text(x + width / 2, 62, place.healthy, f"small {ink}"))
    return picture(700, 84, alternative_text(lesson), parts)


def alternative_text(lesson):
    """Return what the strip of a lesson shows, in one sentence."""
    names = [f"{number} {PLACES[number].name}" for number in LESSONS[lesson]]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    row = ", ".join(f"{number} {place.name}" for number, place in PLACES.items())
    if len(names) == len(PLACES):
        return f"The pipeline in five places, {row}: lesson {lesson} is about all of them"
    return f"The pipeline in five places, {row}: lesson {lesson} is about {listed}"


def strip_markdown(lesson):
    """Return the line of Markdown that shows the strip of a lesson."""
    return f"![{alternative_text(lesson)}](figures/strip_{lesson}.svg)"


def places_table():
    """Return the five places as a Markdown table, for the page of the notebooks."""
    lines = [
        "| place | what goes wrong there | in the [cheat sheet](cheat_sheet.md) | lessons |",
        "|---|---|---|---|",
    ]
    for number, place in PLACES.items():
        stages = ", ".join(stage.capitalize() for stage in place.stages)
        lessons = ", ".join(lessons_of(number))
        lines.append(f"| {number} **{place.name}** | {place.failing} | {stages} | {lessons} |")
    return "\n".join(lines) + "\n"


def drawings():
    """Return all drawings, by path."""
    strips = {FIGURES / f"strip_{lesson}.svg": strip(lesson) for lesson in LESSONS}
    return {PIPELINE: pipeline(), **strips}


if __name__ == "__main__":
    for path, content in drawings().items():
        write_text(path, content)
    print(places_table(), end="")
