"""What a data check found: codes, places, and a report for people, programs and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from helpers.errors import InputError, printable

SEVERITIES = ("error", "warning", "info")


class Code(NamedTuple):
    """What a code stands for: its severity, the cause in data/causes.csv, and a short title."""

    severity: str
    cause: str
    title: str


CODES = {
    "D01_NO_OBJECTS": Code("error", "no_objects", "the files of a split hold no object"),
    "D02_OBJECTS_LOST": Code("error", "no_objects", "objects in the files do not reach the loss"),
    "D03_UNREADABLE": Code("error", "unreadable_data", "a split cannot be read"),
    "D04_NO_TRAIN_SPLIT": Code("error", "no_objects", "there is nothing to train on"),
    "D05_MISSING_SPLIT": Code("warning", "unreadable_data", "there is no valid or test split"),
    "D06_EMPTY_SPLIT": Code("error", "no_objects", "a split lists no image"),
    "D07_UNANNOTATED_IMAGE": Code("warning", "labels_missing", "an image has no annotation entry"),
    "D08_MISSING_IMAGE": Code("error", "unreadable_data", "an annotation entry has no image"),
    "D09_LOADER_REFUSES": Code("error", "unreadable_data", "the training loader refuses an image"),
    "D10_ALL_CROWD": Code("error", "objects_filtered", "a category has crowd regions only"),
    "D11_CROWD": Code("warning", "objects_filtered", "annotations are marked as crowd"),
    "D12_UNUSED_FILES": Code("info", "unreadable_data", "files of a split are not used"),
    "D20_BOX_OUTSIDE": Code("error", "boxes_off_masks", "a box leaves its image"),
    "D21_BOX_NORMALISED": Code("error", "boxes_off_masks", "a box is not in pixels"),
    "D22_BOX_OFF_MASK": Code("error", "boxes_off_masks", "a box does not fit its own mask"),
    "D23_BOX_FROM_MASK": Code("info", "boxes_off_masks", "an object has no box of its own"),
    "D24_AREA_DIFFERS": Code("warning", "boxes_off_masks", "an area is not that of its mask"),
    "D30_ROOT_CATEGORY": Code("warning", "category_names", "a parent has no annotations"),
    "D31_SIMILAR_NAMES": Code(
        "warning", "category_names", "two category names are nearly the same"
    ),
    "D32_NO_NOUN": Code("warning", "category_names", "a category name is no noun to ask for"),
    "D33_UNUSED_CATEGORY": Code("warning", "category_names", "a category is never annotated"),
    "D34_ZERO_BASED_IDS": Code("info", "category_names", "category ids start at 0"),
    "D35_CATEGORIES_DIFFER": Code("warning", "category_names", "splits use different categories"),
    "D36_NO_WORD": Code("error", "category_names", "a category name holds no word"),
    "D40_DEGENERATE_BOX": Code("error", "not_finite", "a box is thinner than a pixel"),
    "D41_NOT_FINITE": Code("error", "not_finite", "a box holds NaN or infinity"),
    "D42_EMPTY_MASK": Code("error", "not_finite", "a mask has no pixel"),
    "D43_MASK_SIZE": Code("error", "masks_lost", "a mask has another size than its image"),
    "D44_BAD_MASK": Code("error", "masks_lost", "a segmentation is malformed"),
    "D45_NO_MASK": Code("warning", "masks_lost", "an object has a box only"),
    "D46_ANNOTATED_TWICE": Code("error", "merged_categories", "an object is annotated twice"),
    "D50_TOO_SMALL": Code("warning", "tiny_objects", "an object spans less than two mask cells"),
    "D51_TOO_MANY": Code("warning", "tiny_objects", "a prompt has more objects than queries"),
    "D52_COVERS_PICTURE": Code("warning", "labels_missing", "a category covers most of its images"),
    "D60_IMAGES_WITHOUT_OBJECTS": Code("info", "mostly_empty", "images show no object"),
    "D61_NO_ABSENT_PROMPT": Code("warning", "only_positive_prompts", "no absent prompt is asked"),
    "D62_UNVERIFIED_NEGATIVES": Code("info", "present_negatives", "absent prompts may be present"),
    "D70_BROKEN_IMAGE": Code("error", "unreadable_data", "an image cannot be opened"),
    "D71_IMAGE_SHAPE": Code("error", "annotations_off_image", "an image has not the shape stated"),
    "D72_IMAGE_SCALED": Code(
        "warning", "annotations_off_image", "an image has not the size stated"
    ),
    "D73_IMAGE_TURNED": Code("info", "annotations_off_image", "an image has an EXIF orientation"),
    "D74_IMAGE_OUTSIDE": Code("error", "unreadable_data", "an image lies outside the dataset"),
    "D75_TRANSPARENT": Code("warning", "annotations_off_image", "an image is partly transparent"),
    "D76_SEVERAL_FRAMES": Code("warning", "annotations_off_image", "an image has several frames"),
    "D77_CONTRADICTION": Code("error", "annotations_off_image", "statements about an image differ"),
    "D80_LEAKAGE": Code("warning", "evaluation_mismatch", "the same image is in two splits"),
}


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
        keys = ("code", "severity", "where", "message", "fix")
        return {key: getattr(self, key) for key in keys}


def finding_at(code, places, message, fix):
    """Return a list of the one finding for all places of a code; empty without a place."""
    if not places:
        return []
    places = sorted(places, key=lambda place: place.badness, reverse=True)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return [Finding(code, f"{places[0]}{more}", message, fix, tuple(places))]


@dataclass(frozen=True)
class FlaggedImage:
    """An image worth looking at."""

    path: Path
    name: str  # split/image
    codes: tuple[str, ...]  # errors first
    boxes_xyxy: tuple[tuple[float, float, float, float], ...]  # pixels, as annotated
    labels: tuple[str, ...]  # one per box: code and annotation


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
        """Return ``{"ok", "findings", "counts"}`` of plain values, ready for `json.dumps`."""
        findings = [finding.to_json() for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "counts": self.counts}

    def to_frame(self):
        """Return the findings as a table.

        Returns
        -------
        pandas.DataFrame
            ``severity``, ``code``, ``cause`` (name in data/causes.csv), ``places`` (how many),
            ``where``, ``message``, ``fix``.
        """
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
        """Return the report as text for a terminal: a verdict, then what, where and how to mend it."""
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
        return "\n".join(printable(line).replace("\n", "\\n") for line in lines)

    def worst(self, n=4):
        """List the at most n `FlaggedImage` to look at: errors first, then those with most codes."""
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
        """Raise an InputError with the first error, and how many more there are, if not `ok`."""
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
