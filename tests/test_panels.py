import time

import numpy as np
import pytest

from helpers.detect.detections import RawPrediction
from helpers.errors import InputError
from helpers.show import panels
from helpers.show.panels import LossPanel, threshold_panel

HEIGHT, WIDTH = 30, 40


@pytest.fixture
def image():
    return np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)


def make_raw(prompt="crack", query_prob=(0.1, 0.4, 0.9), presence_logit=10.0):
    query_prob = np.array(query_prob, dtype=np.float32)
    mask_logits = np.full((len(query_prob), 8, 8), -3.0, dtype=np.float32)
    mask_logits[:, :, :4] = 3.0
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


def test_lower_threshold_keeps_more(image):
    panel = threshold_panel(image, [make_raw()], score_threshold=0.5)
    assert panel.readout.value == "kept 1 of 3, highest score 0.900"
    panel.score.value = 0.05
    assert panel.readout.value == "kept 3 of 3, highest score 0.900"
    assert [round(item["score"], 1) for item in panel.detections] == [0.9, 0.4, 0.1]


def test_nothing_kept_is_shown_and_said(image):
    panel = threshold_panel(image, [make_raw()], score_threshold=0.99)
    assert panel.readout.value.startswith("kept 0 of 3")
    assert "data:image/jpeg;base64," in panel.picture.value


def test_mask_threshold_redraws(image):
    panel = threshold_panel(image, [make_raw()])
    before = panel.picture.value
    panel.mask.value = 0.99
    assert panel.picture.value != before


def test_prompt_is_chosen_among_several(image):
    panel = threshold_panel(image, [make_raw(), make_raw("dog", presence_logit=-10.0)])
    assert panel.prompt in panel.widget.children
    panel.prompt.value = "dog"
    assert panel.readout.value == "kept 0 of 3, highest score 0.000"
    assert "Detections of &#x27;dog&#x27;: kept 0 of 3" in panel.picture.value


def test_single_prompt_needs_no_choice(image):
    panel = threshold_panel(image, [make_raw()])
    assert panel.prompt not in panel.widget.children


@pytest.mark.parametrize("name", ["score_threshold", "mask_threshold"])
@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "0.3"])
def test_impossible_first_value_is_refused_not_moved(image, name, value):
    with pytest.raises(InputError, match=name):
        threshold_panel(image, [make_raw()], **{name: value})


def test_impossible_later_value_is_refused_not_moved(image):
    panel = threshold_panel(image, [make_raw()], score_threshold=0.5)
    with pytest.raises(InputError, match=r"score threshold .* is 1\.5"):
        panel.score.value = 1.5
    assert panel.score.value == 0.5


def test_outputs_of_another_image_are_refused(image):
    with pytest.raises(InputError, match="does not fit"):
        threshold_panel(image[:, :20], [make_raw()])


def test_no_outputs_are_refused(image):
    with pytest.raises(InputError, match="outputs of a prompt"):
        threshold_panel(image, [])


def test_error_in_a_callback_reaches_the_caller(image, monkeypatch):
    panel = threshold_panel(image, [make_raw()])
    monkeypatch.setattr(panels, "detect", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        panel.score.value = 0.1


def test_loss_panel_draws_its_first_frame_empty():
    panel = LossPanel()
    assert panel.readout.value == "training has not started"
    assert "data:image/png;base64," in panel.picture.value


def test_loss_panel_reads_out_step_and_loss():
    panel = LossPanel()
    panel.update({"step": 3, "loss": 2.5})
    panel.update({"step": 3, "eval_AP50": 0.5})
    panel.redraw()
    assert panel.readout.value == "step 3: training loss 2.500"
    assert panel.log == [{"step": 3, "loss": 2.5}, {"step": 3, "eval_AP50": 0.5}]


def test_loss_panel_does_not_redraw_at_every_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    panel = LossPanel()
    first = panel.picture.value
    panel.update({"step": 1, "loss": 2.5})
    assert panel.picture.value == first
    now[0] += 2
    panel.update({"step": 2, "loss": 2.0})
    assert panel.picture.value != first


def test_loss_panel_follows_a_trainer_silently(capsys):
    class State:
        global_step = 7

    panel = LossPanel()
    panel.on_log(None, State, None, logs={"loss": 1.25})
    panel.on_train_end(None, State, None)
    assert panel.log == [{"loss": 1.25, "step": 7}]
    assert panel.readout.value == "step 7: training loss 1.250"
    assert capsys.readouterr() == ("", "")
