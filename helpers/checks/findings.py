"""What a data check found: codes, places, and a report for people, programs and pictures."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from helpers.answers import answer_text
from helpers.errors import InputError
from helpers.files import DATA

SEVERITIES = ("error", "warning", "info")


class Code(NamedTuple):
    """What a code stands for, a row of data/findings.csv."""

    severity: str
    cause: str  # in data/causes.csv
    title: str
    message: str  # of its findings, a template as `fix` is
    fix: str


with (DATA / "findings.csv").open(encoding="utf-8", newline="") as _file:
    CODES = {row.pop("code"): Code(**row) for row in csv.DictReader(_file)}


@dataclass(frozen=True)
class Place:
    """One spot a finding is about."""

    split: str
    image_id: str
    path: Path
    annotation_id: int | str | None = None  # None if the whole image is meant
    box_xyxy: tuple[float, float, float, float] | None = None  # pixels, as in the file
    badness: float = 0.0  # compared with other places of the same finding; larger is worse

    def __str__(self):
        """Return ``split/image, annotation 7``."""
        image = f"{self.split}/{self.image_id}"
        return image if self.annotation_id is None else f"{image}, annotation {self.annotation_id}"


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset, with everything needed to mend it."""

    code: str  # key of `CODES`
    where: str  # the file, image or annotation; the worst one and a count if there are several
    message: str
    fix: str
    places: tuple[Place, ...] = ()  # the worst first; empty if a whole split is meant

    @property
    def severity(self):
        """str: ``error``, ``warning`` or ``info``, from `CODES`."""
        return CODES[self.code].severity

    def to_json(self):
        """Return the five texts of the finding as a dict."""
        return {key: getattr(self, key) for key in ("code", "severity", "where", "message", "fix")}


def finding_of(code, where, places=(), **values):
    """Return a finding with the texts of its code, which the values complete."""
    message, fix = (text.format(**values) for text in CODES[code][-2:])
    return Finding(code, str(where), message, fix, tuple(places))


def finding_at(code, places, **values):
    """Return a list of the one finding for all places of a code; empty without a place."""
    if not places:
        return []
    places = sorted(places, key=lambda place: place.badness, reverse=True)
    where = f"{places[0]} and {len(places) - 1} more" if len(places) > 1 else places[0]
    values |= {"n": len(places), "worst": places[0].badness}
    return [finding_of(code, where, places, **values)]


def findings_by_code(faults, **values):
    """Return a finding per code of faults, which are (code, place, detail)."""
    places, details, findings = defaultdict(list), defaultdict(list), []
    for code, place, detail in faults:
        places[code].append(place)
        details[code] += [detail] if detail else []
    for code in sorted(places):
        first = details[code][0] if details[code] else ""
        hint = f"; {len(details[code])} of them {first}" if first else ""
        findings += finding_at(code, places[code], first=first, hint=hint, **values)
    return findings


class FlaggedImage(NamedTuple):
    """An image worth looking at."""

    path: Path
    name: str  # split/image
    codes: tuple[str, ...]  # errors first
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]  # pixels, as annotated


@dataclass(frozen=True)
class Report:
    """All findings about a dataset."""

    data_dir: Path
    findings: tuple[Finding, ...]  # errors first, then by code
    counts: dict  # by split: images, objects in the files and after the collate, queries, ...

    @property
    def ok(self):
        """bool: True if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self):
        """Return ``{"data", "ok", "findings", "counts"}`` of plain values, ready for `json.dumps`."""
        findings = [finding.to_json() for finding in self.findings]
        content = {"data": str(self.data_dir), "ok": self.ok, "findings": findings}
        return content | {"counts": self.counts}

    def to_frame(self):
        """Return the findings as a pandas.DataFrame, with their cause and number of places."""
        rows = [
            (f.severity, f.code, CODES[f.code].cause, len(f.places), f.where, f.message, f.fix)
            for f in self.findings
        ]
        columns = ["severity", "code", "cause", "places", "where", "message", "fix"]
        return pd.DataFrame(rows, columns=columns)

    def counts_frame(self):
        """Return `counts`, but for those per category, as a pandas.DataFrame, a row per split."""
        table = pd.DataFrame.from_dict(self.counts, orient="index").rename_axis("split")
        return table.drop(columns="objects_per_category", errors="ignore")

    def summary(self):
        """Return the report as text for a terminal: a verdict, then what, where and its fix."""
        return answer_text("check", self.to_json())

    def worst(self, n=4):
        """List at most n `FlaggedImage` to look at: errors first, then those with most codes."""
        flagged = {}
        for finding in self.findings:
            for rank, place in enumerate(finding.places):
                flagged.setdefault(place.path, []).append((finding, place, rank))
        images = []
        for path, entries in flagged.items():
            findings, places, ranks = zip(*entries, strict=True)
            codes = tuple(dict.fromkeys(finding.code for finding in findings))
            boxes_xyxy = tuple(place.box_xyxy for place in places if place.box_xyxy)
            name = f"{places[0].split}/{places[0].image_id}"
            severity = min(SEVERITIES.index(finding.severity) for finding in findings)
            urgency = (severity, -len(codes), min(ranks))
            images.append((urgency, FlaggedImage(path, name, codes, boxes_xyxy)))
        return [image for _, image in sorted(images, key=lambda pair: pair[0])[:n]]

    def raise_for_errors(self):
        """Raise an InputError with the first error, and how many more there are, if not `ok`."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            more = f" ({len(errors) - 1} further errors)" if len(errors) > 1 else ""
            message = f"{errors[0].message}{more} [{errors[0].code}]"
            raise InputError(message, where=errors[0].where, fix=errors[0].fix)
