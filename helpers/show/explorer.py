"""The threshold explorer: pictures, detections and counts that follow three thresholds.

The same JavaScript draws a panel in a notebook and a page that needs no kernel and no network.
"""

from pathlib import Path
from types import SimpleNamespace

import anywidget
import numpy as np
import supervision as sv
import traitlets
from pycocotools import mask as coco_mask

from helpers.data.masks import rle_box_xyxy
from helpers.data.records import plain_prompt
from helpers.detect.detections import detect, reaches
from helpers.detect.metrics import mask_ious, threshold_sweep
from helpers.detect.queries import MAX_DETECTIONS, SCORE_FLOOR, query_of
from helpers.errors import InputError, check_probability
from helpers.show.page import PAGES, data_uri, render_page, with_still
from helpers.show.pictures import annotate, as_picture, decode_mask

LARGEST_SIDE = 640  # of a picture in the explorer, in pixels
STILL_SIDE = 480
MASK_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
LOWEST = 1e-5  # score that the slider of a single picture reaches
EVERY_PROMPT = "every prompt"
_SCRIPT, _STYLE = PAGES / "explorer.js", PAGES / "explorer.css"


class Explorer(anywidget.AnyWidget):
    """A panel of three thresholds; from `explorer_panel` or `threshold_panel`.

    Attributes
    ----------
    score_threshold, mask_threshold, overlap_threshold : float
        In [0, 1]; may be set, and follow the sliders. The mask threshold is shown at the nearest
        one that was computed; two detections that overlap by more are one, the best.
    prompt : str
        One of the prompts, or ``"every prompt"``.
    """

    _esm, _css = _SCRIPT, _STYLE
    content = traitlets.Dict().tag(sync=True)
    score_threshold = traitlets.Float(0.3).tag(sync=True)
    mask_threshold = traitlets.Float(0.5).tag(sync=True)
    overlap_threshold = traitlets.Float(1.0).tag(sync=True)
    prompt = traitlets.Unicode(EVERY_PROMPT).tag(sync=True)

    def __init__(self, pictures, answers, **state):
        self._pictures, self._answers = pictures, answers
        for name in ("score_threshold", "mask_threshold"):
            check_probability(state[name], name)
        super().__init__(**state)

    @traitlets.validate("score_threshold", "mask_threshold", "overlap_threshold")
    def _validate_threshold(self, proposal):
        check_probability(proposal["value"], proposal["trait"].name)
        return proposal["value"]

    @traitlets.validate("prompt")
    def _validate_prompt(self, proposal):
        asked = [query["prompt"] for one in self.content["images"] for query in one["questions"]]
        if proposal["value"] not in (EVERY_PROMPT, *asked):
            fix = f"one of {', '.join(dict.fromkeys(asked))}"
            raise InputError(f"{proposal['value']!r} was not asked", where="prompt", fix=fix)
        return proposal["value"]

    def to_html(self, title):
        """Return the panel as a page with everything inside."""
        return render_page("explorer", title=title, **self.parts())

    def parts(self):
        """Return what a template needs to draw this panel: ``content``, ``script``, ``style``."""
        names = ("content", "score_threshold", "mask_threshold", "overlap_threshold", "prompt")
        files = {"script": _SCRIPT.read_text("utf-8"), "style": _STYLE.read_text("utf-8")}
        return files | {"content": {name: getattr(self, name) for name in names}}

    def still(self):
        """Return the first picture with an object or a kept detection, and what it shows."""
        masks = self._answers[next(iter(self._answers))]
        queries = masks[min(masks, key=lambda one: abs(one - self.mask_threshold))]
        own = [q for q in queries if self.prompt in (EVERY_PROMPT, q.prompt)]
        shown = next((q for q in own if q.gt or q.rles(self.score_threshold)), own[0])
        kept = [d for d in shown.pred if reaches(d["score"], self.score_threshold)]
        picture = as_picture(self._pictures[shown.image_id])
        masks = [decode_mask(d["rle"], picture.size, "detection") for d in kept]
        picture = annotate(
            *(picture, [rle_box_xyxy(d["rle"]) for d in kept], masks or None),
            [f"{d['score']:.2f}" for d in kept],
        )
        picture.thumbnail((STILL_SIDE, STILL_SIDE))
        return picture, f'{Path(shown.image_id).name}, "{shown.prompt}": {len(kept)} detected.'

    def _repr_mimebundle_(self, **kwargs):
        return with_still(super()._repr_mimebundle_(**kwargs), self.still())


def explorer_panel(
    answers, split, *, score_threshold=0.3, mask_threshold=0.5, validation=None, calibrated=None
):
    """Make a panel on which three thresholds move over all pictures of a split.

    Parameters
    ----------
    answers : dict of str to dict of float to list of Query
        Name of a model to mask threshold to its `Query`, from
        `helpers.detect.predict_split_at`. Several models must have been asked the same questions.
    split : helpers.data.Split
    score_threshold, mask_threshold : float
        In [0, 1], where the sliders stand at first.
    validation : list of Query, optional
        Of the validation split: the buttons choose their threshold there, and nowhere else.
    calibrated : dict of str to dict, optional
        Word to ``threshold``, ``low`` and ``high`` of the first model: marked on its curves.

    Returns
    -------
    Explorer
        Counts, precision and recall are those of `helpers.detect.threshold_sweep`.
    """
    pictures = {record.image_id: record.path for record in split.records}
    state = {"score_threshold": score_threshold, "mask_threshold": mask_threshold}
    content = _content(answers, pictures, SCORE_FLOOR) | {"calibrated": calibrated or {}}
    if validation is not None:
        content["validation"] = {EVERY_PROMPT: _sweep_rows(validation)}
        for prompt in dict.fromkeys(query.prompt for query in validation):
            own = [query for query in validation if query.prompt == prompt]
            content["validation"][prompt] = _sweep_rows(own)
    return Explorer(pictures, answers, content=content, **state)


def threshold_panel(image, raws, *, objects=(), score_threshold=0.3, mask_threshold=0.5):
    """Make a panel on which three thresholds move over computed outputs for one picture.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or os.PathLike
    raws : sequence of helpers.detect.detections.RawPrediction
        Outputs for this image, one per prompt.
    objects : sequence of helpers.data.records.ObjectAnnotation
        Of the picture: those that a prompt asks for are drawn with it.
    score_threshold, mask_threshold : float
        In [0, 1], where the sliders stand at first.

    Returns
    -------
    Explorer
    """
    if not raws:
        raise InputError("a panel needs outputs of a prompt", fix="pass Predictor.raw(...)")
    check_probability(mask_threshold, "mask_threshold")
    picture, first = as_picture(image), raws[0]
    if picture.size != (first.width, first.height):
        message = (
            f"outputs for {first.width} x {first.height} pixels, the picture has {picture.size}"
        )
        raise InputError(message, fix="pass the picture that was asked")
    record = SimpleNamespace(image_id=first.image, width=first.width, height=first.height)
    answers = {
        level: [
            query_of(
                *(raw, detect(raw, LOWEST, level, MAX_DETECTIONS), record),
                [one for one in objects if plain_prompt(one.category) == plain_prompt(raw.prompt)],
            )
            for raw in raws
        ]
        for level in sorted({*MASK_THRESHOLDS, mask_threshold})
    }
    pictures, answers = {record.image_id: picture}, {"this model": answers}
    state = {"score_threshold": score_threshold, "mask_threshold": mask_threshold}
    content = _content(answers, pictures, LOWEST)
    return Explorer(pictures, answers, content=content, **state)


def _content(answers, pictures, lowest):
    """Gather what the script draws as plain values."""
    images = {}
    for image_id, source in pictures.items():
        picture = as_picture(source)
        size = {"width": picture.width, "height": picture.height}
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        image = {"name": str(image_id), "source": data_uri(picture), "questions": []}
        images[image_id] = image | size
    masks = list(next(iter(answers.values())))
    # The same question to every model, at every mask threshold.
    for same in zip(
        *(zip(*by_mask.values(), strict=True) for by_mask in answers.values()), strict=True
    ):
        query = same[0][0]
        question = {"prompt": query.prompt, "objects": [_outline(rle) for rle in query.gt]}
        question["answers"] = [_answer(at_masks) for at_masks in same]
        images[query.image_id]["questions"].append(question)
    content = {"images": list(images.values()), "models": list(answers)}
    return content | {"masks": masks, "lowest": lowest}


def _answer(queries):
    """Return the same answer at some mask thresholds: scores by descent, and masks at each."""
    first = queries[0]
    order = np.argsort(-first.scores, kind="stable")
    answer = {"presence": first.presence_prob, "best": first.max_query_prob}
    answer |= {"scores": first.scores[order].tolist(), "masks": []}
    for query in queries:
        rles = [query.pred[number]["rle"] for number in order]
        ious = {"ious": mask_ious(rles, query.gt), "overlaps": mask_ious(rles, rles)}
        mask = {name: table.round(6).tolist() for name, table in ious.items()}
        answer["masks"].append(mask | {"outlines": [_outline(rle) for rle in rles]})
    return answer


def _sweep_rows(queries):
    """Return precision, recall and F1 of some queries at each of up to 100 scores of theirs."""
    scores = np.unique(np.concatenate([query.scores for query in queries]))
    cuts = scores[np.linspace(0, len(scores) - 1, min(len(scores), 100)).astype(int)]
    table = threshold_sweep(queries, cuts).astype(object)
    return table.where(table.notna(), None).to_dict(orient="records")


def _outline(rle):
    """Return the outlines of a mask: lists of x0, y0, x1, y1, ... in pixels."""
    polygons = sv.mask_to_polygons(coco_mask.decode(rle).astype(bool))
    return [polygon.ravel().tolist() for polygon in polygons]
