"""The threshold explorer as Python sees it; what the browser draws is in test_browser.py."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny_random import write_dataset

from helpers.data import read_split
from helpers.data.records import ObjectAnnotation
from helpers.detect import threshold_sweep
from helpers.detect.detections import RawPrediction
from helpers.detect.queries import Query
from helpers.errors import InputError
from helpers.show import explorer_panel, threshold_panel
from helpers.show.explorer import EVERY_PROMPT, MASK_THRESHOLDS

HEIGHT, WIDTH = 30, 40


@pytest.fixture
def image():
    return np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)


def make_raw(prompt="crack", query_prob=(0.1, 0.4, 0.9), presence_logit=10.0):
    query_prob = np.array(query_prob, dtype=np.float32)
    mask_logits = np.full((len(query_prob), 8, 8), -3.0, dtype=np.float32)
    mask_logits[:, :, :4] = 1.5  # probability 0.82
    return RawPrediction(
        image="wall.jpg",
        prompt=prompt,
        height=HEIGHT,
        width=WIDTH,
        query_logits=np.log(query_prob / (1 - query_prob)),
        presence_logit=presence_logit,
        boxes_xyxy=np.tile(
            np.array([2.0, 3.0, 20.0, 25.0], dtype=np.float32), (len(query_prob), 1)
        ),
        mask_logits=mask_logits,
        semantic_logits=mask_logits[0],
    )


def answer_of(panel, number=0):
    (question,) = [panel.content["images"][0]["questions"][number]]
    return question["answers"][0]


def test_the_content_is_plain_json_best_detection_first(image):
    panel = threshold_panel(image, [make_raw()])
    content = json.loads(json.dumps(panel.content, allow_nan=False))
    answer = content["images"][0]["questions"][0]["answers"][0]
    assert np.allclose(answer["scores"], [0.9, 0.4, 0.1], atol=1e-4)
    assert content["masks"] == list(MASK_THRESHOLDS)
    assert [len(level["outlines"]) for level in answer["masks"]] == [3] * 5


def test_a_higher_mask_threshold_has_smaller_outlines_and_none_above_every_pixel(image):
    answer = answer_of(threshold_panel(image, [make_raw()]))
    widths = []
    for level in answer["masks"]:
        outline = level["outlines"][0]
        widths.append(max(outline[0][::2], default=0) if outline else 0)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[2] > 0 == widths[4]


def test_objects_of_the_word_are_drawn_and_compared(image):
    box_xyxy = (0.0, 0.0, WIDTH / 2, float(HEIGHT))
    crack, moss = (ObjectAnnotation(word, box_xyxy, None) for word in ("Crack", "moss"))
    raws = [make_raw(), make_raw("dog")]
    panel = threshold_panel(image, raws, objects=[crack, moss])
    cracks, dogs = panel.content["images"][0]["questions"]
    assert (len(cracks["objects"]), len(dogs["objects"])) == (1, 0)
    assert cracks["answers"][0]["masks"][2]["ious"][0][0] > 0.8
    assert np.allclose(cracks["answers"][0]["masks"][2]["overlaps"], 1)


def test_a_mask_threshold_of_ones_own_is_computed(image):
    panel = threshold_panel(image, [make_raw()], mask_threshold=0.42)
    assert 0.42 in panel.content["masks"]
    assert panel.mask_threshold == 0.42


@pytest.mark.parametrize("name", ["score_threshold", "mask_threshold"])
@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "0.3"])
def test_impossible_first_value_is_refused_not_moved(image, name, value):
    with pytest.raises(InputError, match=name):
        threshold_panel(image, [make_raw()], **{name: value})


def test_impossible_later_value_is_refused_not_moved(image):
    panel = threshold_panel(image, [make_raw()], score_threshold=0.5)
    with pytest.raises(InputError, match=r"score_threshold is 1\.5"):
        panel.score_threshold = 1.5
    with pytest.raises(InputError, match="'dog' was not asked"):
        panel.prompt = "dog"
    assert (panel.score_threshold, panel.prompt) == (0.5, EVERY_PROMPT)
    panel.prompt = "crack"


def test_outputs_of_another_image_are_refused(image):
    with pytest.raises(InputError, match="pass the picture that was asked"):
        threshold_panel(image[:, :20], [make_raw()])


def test_no_outputs_are_refused(image):
    with pytest.raises(InputError, match="outputs of a prompt"):
        threshold_panel(image, [])


def still_of(panel):
    data, metadata = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "VBox" not in data["text/plain"]
    assert metadata["image/jpeg"]["alt"] == data["text/plain"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))), float)


def test_the_still_shows_what_is_kept(image):
    none, one = (threshold_panel(image, [make_raw()], score_threshold=t) for t in (0.99, 0.5))
    assert np.ptp(still_of(none)) < 10 < np.ptp(still_of(one))
    texts = [panel._repr_mimebundle_()[0]["text/plain"] for panel in (none, one)]
    assert [re.search(r"\"crack\": \d detected", text)[0] for text in texts] == [
        '"crack": 0 detected',
        '"crack": 1 detected',
    ]


def test_the_buttons_get_the_curve_of_the_validation_split(tmp_path):
    write_dataset(tmp_path)
    split = read_split(tmp_path, "test")
    record = split.records[0]
    gt = [item.rle for item in record.objects]
    pred = [{"rle": gt[0], "score": 0.8}, {"rle": gt[0], "score": 0.4}]
    query = Query(record.image_id, "crack", record.height, record.width, gt, pred)
    panel = explorer_panel({"a": {0.5: [query]}}, split, validation=[query])
    rows = panel.content["validation"]["crack"]
    assert [row["threshold"] for row in rows] == [0.4, 0.8]
    assert [row["precision"] for row in rows] == threshold_sweep([query], [0.4, 0.8])[
        "precision"
    ].tolist()
    assert panel.content["validation"][EVERY_PROMPT] == rows
