"""COCO average precision of prompts on pictures, through pycocotools without its printing."""

from __future__ import annotations

import contextlib
import io

from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.errors import InputError
from helpers.evaluation_queries import check_queries

NO_PRESENT_PROMPT = "no present prompt: no query has an object"


def coco_ap(queries, iou_type="segm"):
    """Compute COCO average precision with pycocotools' defaults.

    Every prompt is a category and ``image_id`` the picture, so a detection of an absent prompt
    costs precision only when that prompt is present on another picture (COCO leaves out
    categories without an object).

    Parameters
    ----------
    queries : list of dict
        See `helpers.evaluation_queries`. Give all scores, not only those above a threshold. The
        100 best detections of each query count.
    iou_type : {"segm", "bbox"}
        Masks or boxes. Boxes that a query does not give are those around its masks.

    Returns
    -------
    dict
        ``AP`` (mean over IoU 0.50:0.95), ``AP50``, ``AP75``, in [0, 1]. When no query has an
        object they are None and a fourth key, ``reason``, says so.

    Raises
    ------
    InputError
        For another `iou_type`, a prompt that occurs twice on one picture, and whatever
        `helpers.evaluation_queries.check_queries` refuses.
    """
    if iou_type not in ("segm", "bbox"):
        raise InputError(f"unknown iou_type {iou_type!r}", fix="use 'segm' or 'bbox'")
    check_queries(queries)
    pairs = [(query["image_id"], query["prompt"]) for query in queries]
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise InputError(
            f"prompt {twice[1]!r} occurs twice on image {twice[0]!r}",
            where="queries",
            fix="merge the objects of one prompt on one picture into one query",
        )
    if not any(query["gt"] for query in queries):
        return {"AP": None, "AP50": None, "AP75": None, "reason": NO_PRESENT_PROMPT}
    gt, pred = _coco_pair(queries)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(gt, pred, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = ("AP", "AP50", "AP75")
    return {name: float(evaluator.stats[index]) for index, name in enumerate(names)}


def _coco_pair(queries):
    """Build the COCO data sets of the objects and of the detections."""
    image_ids = _numbered(query["image_id"] for query in queries)
    category_ids = _numbered(query["prompt"] for query in queries)
    gt, pred = [], []
    for query in queries:
        ids = {
            "image_id": image_ids[query["image_id"]],
            "category_id": category_ids[query["prompt"]],
            "iscrowd": 0,
        }
        boxes = query.get("gt_boxes_xyxy")
        for index, rle in enumerate(query["gt"]):
            box = None if boxes is None else boxes[index]
            gt.append(ids | _shape(rle, box) | {"id": len(gt) + 1})
        for one in query["pred"]:
            shape = _shape(one["rle"], one.get("box_xyxy"))
            pred.append(ids | shape | {"id": len(pred) + 1, "score": one["score"]})
    images = [
        {"id": image_ids[query["image_id"]], "height": query["height"], "width": query["width"]}
        for query in queries
    ]
    return _dataset(gt, images, category_ids), _dataset(pred, images, category_ids)


def _numbered(values):
    """Give each distinct value a number from 1, in order of appearance."""
    return {value: number for number, value in enumerate(dict.fromkeys(values), start=1)}


def _shape(rle, box_xyxy):
    """Describe mask and box as COCO does: RLE, x y w h in pixels, area in pixels."""
    if box_xyxy is None:
        box_xywh = mask_utils.toBbox(rle).tolist()
    else:
        left, top, right, bottom = (float(value) for value in box_xyxy)
        box_xywh = [left, top, right - left, bottom - top]
    return {"segmentation": rle, "bbox": box_xywh, "area": float(mask_utils.area(rle))}


def _dataset(annotations, images, category_ids):
    """Index annotations as pycocotools wants them."""
    coco = COCO()
    coco.dataset = {
        "images": images,
        "categories": [{"id": number} for number in category_ids.values()],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
