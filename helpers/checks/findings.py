"""What a data check found: codes, places, and a report for people, programs and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from helpers.errors import InputError

SEVERITIES = ("error", "warning", "info")


class Code(NamedTuple):
    """What a code stands for: its severity, the row of the cause catalogue, and a short title."""

    severity: str
    row: str
    title: str


CODES = {
    "D01_NO_OBJECTS": Code("error", "1", "the files of a split hold no object"),
    "D02_OBJECTS_LOST": Code("error", "1", "objects are in the files but do not reach the loss"),
    "D03_UNREADABLE": Code("error", "1", "the annotations of a split cannot be read"),
    "D04_NO_TRAIN_SPLIT": Code("error", "1", "there is nothing to train on"),
    "D05_MISSING_SPLIT": Code("warning", "1", "a split for validation or testing is missing"),
    "D06_EMPTY_SPLIT": Code("error", "1", "a split lists no image"),
    "D07_UNANNOTATED_IMAGE": Code("warning", "1", "an image has no annotation entry"),
    "D08_MISSING_IMAGE": Code("error", "1", "an annotation entry has no image"),
    "D09_LOADER_REFUSES": Code("error", "1", "the training loader refuses a split or an image"),
    "D10_ALL_CROWD": Code("error", "1b", "a present category has crowd regions only"),
    "D11_CROWD": Code("warning", "1b", "annotations are marked as crowd"),
    "D20_BOX_OUTSIDE": Code("error", "6", "a box leaves its image"),
    "D21_BOX_NORMALISED": Code("error", "6", "a box is not in pixels"),
    "D22_BOX_OFF_MASK": Code("error", "6", "a box does not fit its own mask"),
    "D23_BOX_FROM_MASK": Code("info", "6", "an object has no box of its own"),
    "D30_ROOT_CATEGORY": Code("warning", "14", "a parent category without annotations"),
    "D31_SIMILAR_NAMES": Code("warning", "14", "two category names are nearly the same"),
    "D32_NO_NOUN": Code("warning", "12", "a category name is no noun to ask for"),
    "D33_UNUSED_CATEGORY": Code("warning", "14", "a category is never annotated"),
    "D34_ZERO_BASED_IDS": Code("info", "14", "category ids start at 0"),
    "D35_CATEGORIES_DIFFER": Code("warning", "14", "splits annotate different categories"),
    "D40_DEGENERATE_BOX": Code("error", "16", "a box is thinner than a pixel"),
    "D41_NOT_FINITE": Code("error", "16", "a box holds NaN or infinity"),
    "D42_EMPTY_MASK": Code("error", "16", "a mask has no pixel"),
    "D43_MASK_SIZE": Code("error", "16", "a mask has another size than its image"),
    "D44_BAD_MASK": Code("error", "16", "a segmentation is malformed"),
    "D45_NO_MASK": Code("warning", "16", "an object has a box only"),
    "D50_TOO_SMALL": Code("warning", "21", "an object is smaller than two cells of the mask grid"),
    "D51_TOO_MANY": Code("warning", "21", "a prompt has more objects than the model has queries"),
    "D60_IMAGES_WITHOUT_OBJECTS": Code("info", "22", "images show no object"),
    "D61_NO_ABSENT_PROMPT": Code("warning", "22", "no absent prompt is ever asked"),
    "D62_UNVERIFIED_NEGATIVES": Code("info", "19", "absent prompts may be in the pictures"),
    "D70_BROKEN_IMAGE": Code("error", "28", "an image cannot be opened"),
    "D71_IMAGE_SHAPE": Code("error", "28", "an image has another shape than its annotation says"),
    "D72_IMAGE_SCALED": Code("warning", "28", "an image is a resized copy of the annotated one"),
    "D73_IMAGE_TURNED": Code("info", "28", "an image carries an EXIF orientation"),
    "D80_LEAKAGE": Code("warning", "13", "the same image is in two splits"),
}


@dataclass(frozen=True)
class Place:
    """One spot a finding is about.

    Attributes
    ----------
    split, image_id : str
        Where the image belongs.
    path : pathlib.Path
        The image file.
    annotation_id : int or str or None
        None if the whole image is meant.
    box_xyxy : tuple of float or None
        The annotated box in pixels, as in the file.
    badness : float
        How bad it is compared with other places of the same finding; larger is worse.
    """

    split: str
    image_id: str
    path: Path
    annotation_id: int | str | None = None
    box_xyxy: tuple[float, float, float, float] | None = None
    badness: float = 0.0

    def __str__(self):
        """Return ``split/image, annotation 7``."""
        image = f"{self.split}/{self.image_id}"
        return image if self.annotation_id is None else f"{image}, annotation {self.annotation_id}"


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset, with everything needed to mend it.

    Attributes
    ----------
    code : str
        A key of `CODES`.
    where : str
        The file, image or annotation; the worst one and a count if there are several.
    message : str
        What is wrong, with the numbers.
    fix : str
        What to do about it.
    places : tuple of Place
        Every spot concerned, the worst first; empty if the finding is about a whole split.
    """

    code: str
    where: str
    message: str
    fix: str
    places: tuple[Place, ...] = ()

    @property
    def severity(self):
        """str: ``error``, ``warning`` or ``info``, from `CODES`."""
        return CODES[self.code].severity

    def to_json(self):
        """Return the five texts of the finding as a dict."""
        return {
            "code": self.code,
            "severity": self.severity,
            "where": self.where,
            "message": self.message,
            "fix": self.fix,
        }


def finding_at(code, places, message, fix):
    """Build the one finding for all places of a code in a split.

    Parameters
    ----------
    code : str
        A key of `CODES`.
    places : list of Place
        May be empty.
    message, fix : str
        As in `Finding`.

    Returns
    -------
    list of Finding
        None or one, so that checks can be added up.
    """
    if not places:
        return []
    places = sorted(places, key=lambda place: place.badness, reverse=True)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return [Finding(code, f"{places[0]}{more}", message, fix, tuple(places))]


@dataclass(frozen=True)
class FlaggedImage:
    """An image worth looking at.

    Attributes
    ----------
    path : pathlib.Path
        The image file.
    name : str
        ``split/image``.
    codes : tuple of str
        What was found in it, errors first.
    boxes_xyxy : tuple of tuple of float
        Boxes concerned, in pixels, as annotated; empty if the whole image is meant.
    labels : tuple of str
        One text per box: code and annotation.
    """

    path: Path
    name: str
    codes: tuple[str, ...]
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All findings about a dataset.

    Attributes
    ----------
    data_dir : pathlib.Path
        The folder checked.
    findings : tuple of Finding
        Errors first, then by code.
    counts : dict
        For each split: images, objects in the files and after the collate, queries, and so on.
    """

    data_dir: Path
    findings: tuple[Finding, ...]
    counts: dict

    @property
    def ok(self):
        """bool: True if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self):
        """Return ``{"ok", "findings", "counts"}`` of plain values, ready for `json.dumps`."""
        findings = [finding.to_json() for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "counts": self.counts}

    def to_frame(self):
        """Return the findings as a table.

        Returns
        -------
        pandas.DataFrame
            ``severity``, ``code``, ``row`` (of the cause catalogue), ``places`` (how many),
            ``where``, ``message``, ``fix``.
        """
        rows = [
            (f.severity, f.code, CODES[f.code].row, len(f.places), f.where, f.message, f.fix)
            for f in self.findings
        ]
        columns = ["severity", "code", "row", "places", "where", "message", "fix"]
        return pd.DataFrame(rows, columns=columns)

    def counts_frame(self):
        """Return `counts`, but for those per category, as a pandas.DataFrame, a row per split."""
        table = pd.DataFrame.from_dict(self.counts, orient="index").rename_axis("split")
        return table.drop(columns="objects_per_category", errors="ignore")

    def summary(self):
        """Return the report as text: a verdict, then what, where and how to mend it."""
        totals = [
            f"{sum(f.severity == severity for f in self.findings)} {severity}"
            for severity in SEVERITIES
        ]
        lines = [f"{self.data_dir}: {'ok' if self.ok else 'NOT OK'} ({', '.join(totals)})"]
        for split, counts in self.counts.items():
            lines.append(
                f"  {split}: {counts['images']} images, {counts['objects_in_files']} objects in "
                f"the files, {counts['objects_after_collate']} after the collate, "
                f"{counts['absent_queries']} absent prompts"
            )
        for finding in self.findings:
            lines.append(f"{finding.severity:8}{finding.code}  {finding.where}")
            lines.append(f"        {finding.message}. Fix: {finding.fix}")
        return "\n".join(lines)

    def worst(self, n=4):
        """Choose the images to look at.

        Parameters
        ----------
        n : int
            How many at most.

        Returns
        -------
        list of FlaggedImage
            Images with errors first, then those with most findings, then the worst of each code.
        """
        flagged = {}
        for finding in self.findings:
            for rank, place in enumerate(finding.places):
                flagged.setdefault(place.path, []).append((finding, place, rank))

        def order(entries):
            severity = min(SEVERITIES.index(finding.severity) for finding, _, _ in entries)
            codes = {finding.code for finding, _, _ in entries}
            return severity, -len(codes), min(rank for _, _, rank in entries)

        chosen = sorted(flagged.items(), key=lambda item: order(item[1]))[:n]
        return [_flagged_image(path, entries) for path, entries in chosen]

    def raise_for_errors(self):
        """Raise an InputError with the first error, for callers that cannot go on.

        Raises
        ------
        InputError
            If `ok` is False; it says how many further errors there are.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            more = f" ({len(errors) - 1} further errors)" if len(errors) > 1 else ""
            message = f"{errors[0].message}{more} [{errors[0].code}]"
            raise InputError(message, where=errors[0].where, fix=errors[0].fix)


def _flagged_image(path, entries):
    """Gather what was found in one image."""
    boxed = [(finding, place) for finding, place, _ in entries if place.box_xyxy is not None]
    place = entries[0][1]
    return FlaggedImage(
        path,
        f"{place.split}/{place.image_id}",
        tuple(dict.fromkeys(finding.code for finding, _, _ in entries)),
        tuple(place.box_xyxy for _, place in boxed),
        tuple(f"{finding.code[:3]} annotation {place.annotation_id}" for finding, place in boxed),
    )
