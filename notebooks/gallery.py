"""Galleries: findings of the checks, and label mistakes ranked, each with its object drawn."""

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import supervision as sv
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from helpers.checks.findings import CODES, SEVERITIES
from helpers.data.coco import read_split
from helpers.data.masks import mask_to_rle, rle_box_xyxy
from helpers.data.records import plain_prompt, true_objects, true_rle
from helpers.detect.metrics import mask_ious
from helpers.detect.mistakes import HIT, NEAR
from helpers.errors import InputError, check_probability, printable
from helpers.show.pictures import TRUTH_COLOUR, annotate, as_picture, decode_mask

SIDE_INCHES, DPI = 2.4, 100  # of a picture in a gallery
CAPTION_LETTERS = 33  # in a line below that width
CAPTION_POINTS, LINE_INCHES = 8.5, 0.15
BARE_SIZE = (256, 256)  # pixels, of the grey picture for a file that cannot be opened
SHIFT_PX = 24  # by which a planted mistake moves an annotation at least; else half its width


@dataclass(frozen=True)
class Exhibit:
    """One picture of a gallery: what is drawn, and a line that says what is wrong."""

    path: Path
    image_id: str
    kind: str  # code of the finding, or how model and annotation disagree
    caption: str
    boxes_xyxy: tuple = ()  # of what is in doubt, in pixels, drawn in orange
    rles: tuple = ()  # the masks in those boxes, if there are any
    objects: tuple = ()  # `ObjectAnnotation` as annotated, drawn in blue
    suspicion: float = 1.0  # larger is worse; comparable within one gallery


def finding_exhibits(report):
    """Turn the findings of a dataset check into pictures, worst first.

    Parameters
    ----------
    report : helpers.checks.findings.Report
        From `helpers.checks.check_dataset`.

    Returns
    -------
    list of Exhibit
        Errors first, then the worst place of every finding, then the second of every finding.
        A finding about a whole split has no picture.
    """
    splits, ranked = {}, []
    for finding in report.findings:
        for rank, place in enumerate(finding.places):
            ranked.append(((SEVERITIES.index(finding.severity), rank), finding, place))
    exhibits = []
    for _, finding, place in sorted(ranked, key=lambda one: one[0]):
        if place.split not in splits:
            splits[place.split] = _annotations(report.data_dir, place.split)
        item = splits[place.split].get((place.image_id, place.annotation_id))
        title = CODES[finding.code].title
        caption = f"{title} ({finding.code.partition('_')[0]}, {finding.severity}) · {place}"
        boxes = () if place.box_xyxy is None else (place.box_xyxy,)
        objects = () if item is None else (item,)
        exhibits.append(
            Exhibit(place.path, place.image_id, finding.code, caption, boxes, objects=objects)
        )
    return exhibits


def _annotations(data_dir, split):
    """Map (image_id, annotation_id) to the object in a split; empty where it cannot be read."""
    try:
        records = read_split(data_dir, split).records
    except InputError:  # a finding of its own, and other places can still be drawn
        return {}
    return {(one.image_id, item.annotation_id): item for one in records for item in one.objects}


def label_suspects(queries, split, score_threshold=0.3):
    """Rank annotations and detections by how far a model disagrees with the annotation.

    Four disagreements are told apart. *not annotated*: a detection on nothing that has a name.
    *wrong word*: a detection on an object that is annotated as something else. *badly placed*: an
    object whose box a detection of its word only overlaps. *missed*: an object without any of these.

    Parameters
    ----------
    queries : sequence of Query
        Answers of a model that has not seen the pictures, from `helpers.detect.predict_split`.
    split : helpers.data.Split
        The annotations to be judged, of the same pictures. What `queries` says of them is not used.
    score_threshold : float
        In [0, 1]; a detection below it accuses nobody.

    Returns
    -------
    list of Exhibit
        By falling ``suspicion`` in [0, 1]. That of a detection is its score, less what the model
        says for the annotation as it is. That of a missed object is the share of the objects of its
        word that the model does find, less its best score there: a model that misses half of them
        says little about one.
    """
    check_probability(score_threshold, "score_threshold")
    records = {record.image_id: record for record in split.records}
    by_image = {}
    for query in queries:
        if query.image_id not in records:
            message = f"answers about {query.image_id!r}, which is not in the split {split.name!r}"
            raise InputError(message, fix="pass the split that was asked")
        by_image.setdefault(query.image_id, []).append(query)
    pictures = {
        image_id: _Scene(records[image_id], same, score_threshold)
        for image_id, same in by_image.items()
    }
    found = {}
    for scene in pictures.values():
        for word, is_found in scene.found():
            found.setdefault(word, []).append(is_found)
    recall = {word: sum(values) / len(values) for word, values in found.items()}
    suspects = [one for scene in pictures.values() for one in scene.suspects(recall)]
    return sorted(suspects, key=lambda one: one.suspicion, reverse=True)


class _Scene:
    """The objects annotated in one picture, set against all detections in it."""

    def __init__(self, record, queries, score_threshold):
        self.record, self.threshold = record, score_threshold
        self.objects = true_objects(record)
        self.asked = {plain_prompt(query.prompt) for query in queries}
        self.words = [plain_prompt(item.category) for item in self.objects]
        answers = [(query, detection) for query in queries for detection in query.pred]
        self.asked_words = np.array([plain_prompt(query.prompt) for query, _ in answers], dtype=str)
        self.scores = np.array([detection["score"] for _, detection in answers], dtype=float)
        rles = [detection["rle"] for _, detection in answers]
        self.rles = rles
        truth = [true_rle(record, item) for item in self.objects]
        self.ious = mask_ious(rles, truth)
        boxes, own = (np.array([rle_box_xyxy(r) for r in m]).reshape(-1, 4) for m in (rles, truth))
        self.box_ious = sv.box_iou_batch(boxes, own) if rles and truth else self.ious
        self.overlaps = mask_ious(rles, rles)

    def support(self, column):
        """Return the highest score of a detection that agrees with an object, word and place."""
        own = self.asked_words == self.words[column]
        return self.scores[own & (self.ious[:, column] >= HIT)].max(initial=0)

    def found(self):
        """List each annotated word that was asked, and whether its object is detected."""
        columns = (c for c, word in enumerate(self.words) if word in self.asked)
        return [(self.words[c], self.support(c) >= self.threshold) for c in columns]

    def suspects(self, recall):
        """List the `Exhibit` of every disagreement; a detection accuses at most once."""
        accused, rows, placed = set(), [], set()
        order = np.argsort(-self.scores, kind="stable")
        for number in order[self.scores[order] >= self.threshold]:
            if any(self.overlaps[number, other] >= HIT for other in accused):
                continue  # a duplicate says the same again
            verdict = self._verdict(number, placed)
            if verdict is not None:
                accused.add(number)
                kind, value, column = verdict
                placed.update(() if column is None else (column,))
                rows.append(self._exhibit(kind, value, number, column))
        for column, word in enumerate(self.words):
            touching = np.maximum(self.ious, self.box_ious)[:, column] >= NEAR
            near = self.scores[touching].max(initial=0)
            if word in self.asked and column not in placed and near < self.threshold:
                rows.append(self._exhibit("missed", recall[word] * (1 - near), None, column))
        return rows

    def _verdict(self, number, placed):
        """Return kind, suspicion and object of a detection, or None where the annotation agrees."""
        word, score, ious = self.asked_words[number], self.scores[number], self.ious[number]
        own = np.array([name == word for name in self.words], dtype=bool)
        if (ious[own] >= HIT).any():
            return None
        hit = int(ious.argmax()) if len(ious) else None
        if hit is not None and ious[hit] >= HIT:
            value = score * (1 - self.support(hit))
            return None if hit in placed else ("wrong word", value, hit)
        near = np.maximum(ious, self.box_ious[number]) >= NEAR
        free = [c for c in np.flatnonzero(own & near) if c not in placed]
        free = [c for c in free if self.support(c) < self.threshold]
        if free:
            nearest = max(free, key=lambda c: (ious[c], self.box_ious[number, c]))
            return "badly placed", score * (1 - ious[nearest]), nearest
        if (ious[own] >= NEAR).any() or word in map(plain_prompt, self.record.contents):
            return None  # part of what is annotated, or known to be there without annotation
        return "not annotated", score, None

    def _exhibit(self, kind, value, number, column):
        record, item = self.record, None if column is None else self.objects[column]
        score = 0 if number is None else self.scores[number]
        word = item.category if number is None else self.asked_words[number]
        text = {
            "missed": f"“{word}” annotated, nothing detected there",
            "badly placed": f"“{word}” detected beside its annotation (score {score:.2f})",
            "wrong word": f"“{word}” detected (score {score:.2f}), annotated as "
            f"“{item and item.category}”",
            "not annotated": f"“{word}” detected (score {score:.2f}), not annotated",
        }[kind]
        rles = (true_rle(record, item),) if number is None else (self.rles[number],)
        boxes = tuple(tuple(rle_box_xyxy(rle)) for rle in rles)
        caption = f"{value:.2f} {kind} · {record.image_id}: {text}"
        what = (record.path, record.image_id, kind, caption, boxes, rles, tuple(self.objects))
        return Exhibit(*what, float(value))


def plant_label_mistakes(split, other_word, seed=0):
    """Spoil three annotations of a split, to see whether a ranking finds them.

    Parameters
    ----------
    split : helpers.data.Split
        Not changed; needs three images with an object.
    other_word : str
        What one object is called afterwards.
    seed : int
        Of the choice of images.

    Returns
    -------
    helpers.data.Split
        A copy in which one object is gone, one is moved sideways, and one has another word.
    dict of str to str
        "not annotated", "badly placed" and "wrong word" to the ``image_id`` where it was done.
    """
    firsts = [next(iter(true_objects(record)), None) for record in split.records]
    able = [n for n, item in enumerate(firsts) if item and item.category != other_word]
    if len(able) < 3:
        message = f"{len(able)} images have an object not called {other_word!r}, three are needed"
        raise InputError(message, where=split.root, fix="choose a larger split")
    chosen = np.random.default_rng(seed).choice(able, 3, replace=False)
    records, planted = list(split.records), {}
    for kind, number in zip(("not annotated", "badly placed", "wrong word"), chosen, strict=True):
        record = records[number]
        item = firsts[number]
        others = tuple(other for other in record.objects if other is not item)
        spoilt = {"not annotated": (), "wrong word": (replace(item, category=other_word),)}
        spoilt["badly placed"] = (_shifted(record, item),)
        records[number] = replace(record, objects=(*spoilt[kind], *others))
        planted[kind] = record.image_id
    return replace(split, records=tuple(records)), planted


def planted_ranks(suspects, planted):
    """Map each planted kind to the place of its image in a ranking, from 1; None if it is not there.

    Parameters
    ----------
    suspects : list of Exhibit
        From `label_suspects`.
    planted : dict of str to str
        From `plant_label_mistakes`.
    """
    places = [one.image_id for one in suspects]
    return {
        kind: places.index(image_id) + 1 if image_id in places else None
        for kind, image_id in planted.items()
    }


def _shifted(record, item):
    """Move an object sideways, towards the farther edge, with its box."""
    mask = decode_mask(true_rle(record, item), (record.width, record.height), record.path)
    x0, _, x1, _ = item.box_xyxy
    room = max(x0, record.width - x1)
    step = round(min(max(SHIFT_PX, (x1 - x0) / 2), room))
    rle = mask_to_rle(np.roll(mask, step if x0 < record.width - x1 else -step, axis=1))
    return replace(item, rle=rle, box_xyxy=tuple(rle_box_xyxy(rle)))


def exhibit_picture(exhibit):
    """Draw an `Exhibit`: annotation in blue, what is in doubt in orange; grey without a file."""
    try:
        picture = as_picture(exhibit.path)
    except InputError:
        return Image.new("RGB", BARE_SIZE, "#bbbbbb")
    whole = [item for item in exhibit.objects if all(map(math.isfinite, item.box_xyxy))]
    masks = None
    if whole and all(_fits(item, picture.size) for item in whole):
        masks = [decode_mask(item.rle, picture.size, exhibit.path) for item in whole]
    boxes = [_inside(item.box_xyxy, picture.size) for item in whole]
    drawn = annotate(picture, boxes, masks, colour=TRUTH_COLOUR)
    doubts = [box for box in exhibit.boxes_xyxy if all(map(math.isfinite, box))]
    doubts = np.array([_inside(box, picture.size) for box in doubts]).reshape(-1, 4)
    masks = [decode_mask(rle, picture.size, exhibit.path) for rle in exhibit.rles] or None
    if masks is not None:  # at the size of what is drawn on already
        greys = [Image.fromarray(mask).resize(drawn.size) for mask in masks]
        masks = [np.asarray(grey) for grey in greys]
    return annotate(drawn, doubts * drawn.width / picture.width, masks)


def _fits(item, size):
    return item.rle is not None and list(item.rle["size"]) == [size[1], size[0]]


def _inside(box_xyxy, size):
    """Move the corners of a box into a picture, so that a box beside it still shows at its edge."""
    x0, y0, x1, y1 = box_xyxy
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    width, height = size
    return [*np.clip([x0, y0], 0, [width, height]), *np.clip([x1, y1], 0, [width, height])]


def exhibits_figure(exhibits, columns=4):
    """Draw exhibits with their captions, `columns` in a row."""
    return small_figure([(exhibit_picture(one), one.caption) for one in exhibits], columns)


def small_figure(panels, columns=4, side_inches=SIDE_INCHES):
    """Lay (picture, caption) out in a grid whose pictures are small enough to store many.

    Raises
    ------
    InputError
        If there is nothing to draw.
    """
    if not panels:
        raise InputError("nothing to draw", fix="pass at least one picture")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    letters = int(CAPTION_LETTERS * side_inches / SIDE_INCHES)
    captions = [textwrap.wrap(printable(caption), letters) for _, caption in panels]
    text_inches = 0.1 + LINE_INCHES * max(map(len, captions))
    wide, high = columns * side_inches, rows * (side_inches + text_inches)
    figure, pixels = Figure(figsize=(wide, high), dpi=DPI), int(DPI * side_inches)
    for number, ((picture, _), lines) in enumerate(zip(panels, captions, strict=True)):
        row, column = divmod(number, columns)
        corner = (column / columns, 1 - (row + 1) / rows)
        size = (0.97 / columns, 0.98 * side_inches / high)
        ax = figure.add_axes((*corner, *size), anchor="NW")
        ax.set_axis_off()
        smaller = picture.copy()
        smaller.thumbnail((pixels, pixels))
        ax.imshow(smaller)
        look = {"fontsize": CAPTION_POINTS, "loc": "left", "pad": 3, "parse_math": False}
        ax.set_title("\n".join(lines), **look)
    return figure


def figure_picture(figure):
    """Return a figure as a PIL image, which weighs less as a photograph than as a chart."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
