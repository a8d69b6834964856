"""The threshold explorer as a page: a split behind one slider, without a kernel or a network."""

import numpy as np
import supervision as sv
from pycocotools import mask as coco_mask

from helpers.data.images import open_upright
from helpers.detect.metrics import num_hits
from helpers.show.page import render_page
from helpers.show.panels import data_uri

LARGEST_SIDE = 640  # of a picture on the page, in pixels


def explorer_page(queries, split, score_threshold):
    """Return a page on which a slider moves the score threshold over all pictures of a split.

    Parameters
    ----------
    queries : sequence of helpers.detect.queries.Query
        From `helpers.detect.predict_split` of this split.
    split : helpers.data.Split
    score_threshold : float
        Where the slider stands at first, in [0, 1].

    Returns
    -------
    str
        HTML with everything inside; counts, precision and recall are those of `threshold_sweep`.
    """
    images = {}
    for record in split.records:
        picture, size = open_upright(record.path), {"width": record.width, "height": record.height}
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        image = {"name": record.image_id, "source": data_uri(picture), "questions": []}
        images[record.image_id] = image | size
    for query in queries:
        images[query.image_id]["questions"].append(_question(query))
    content = {"images": list(images.values()), "threshold": score_threshold}
    return render_page("explorer", split=split.name, content=content)


def _question(query):
    """Return a query as plain values, its detections by falling score; ``hits[k]`` of the best k."""
    order = np.argsort(-query.scores, kind="stable")
    found = [query.pred[number] for number in order]
    answer = {"presence": query.presence_prob, "best": query.max_query_prob}
    answer |= {"prompt": query.prompt, "objects": [_outline(rle) for rle in query.gt]}
    answer["detections"] = [{"score": d["score"], "outline": _outline(d["rle"])} for d in found]
    return answer | {"hits": num_hits([one["rle"] for one in found], query.gt)}


def _outline(rle):
    """Return the outlines of a mask: lists of x0, y0, x1, y1, ... in pixels."""
    polygons = sv.mask_to_polygons(coco_mask.decode(rle).astype(bool))
    return [polygon.ravel().tolist() for polygon in polygons]
