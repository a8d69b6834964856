from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_random import save_tiny_base, tiny_run_config, write_dataset

from helpers.data.coco import read_split
from helpers.data.masks import segmentation_to_rle
from helpers.detect import predictor as prediction
from helpers.errors import InputError
from helpers.lab.clinic import (
    CureReport,
    VitalSigns,
    deviations,
    prepare_questions,
    take_signs,
)
from helpers.lab.planting import replaced
from helpers.train.training import train

HEALTHY = VitalSigns(found=1.0, outlined=0.8, false_alarms=0.0, AP50=0.6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signs")
    base = save_tiny_base(folder / "base")
    config = tiny_run_config(base, write_dataset(folder / "bars"))
    return train(config, output_dir=folder / "run").folder


@pytest.fixture(scope="module")
def truth(run):
    return read_split(run.parent / "bars", "valid")


@pytest.fixture(scope="module")
def questions(truth):
    return prepare_questions(truth, ["moss"])


def test_the_same_signs_deviate_nowhere():
    assert deviations(HEALTHY, HEALTHY) == {}


@pytest.mark.parametrize(
    ("signs", "named"),
    [
        (VitalSigns(0.89, 0.8, 0.0, 0.6), "found is 0.89, at least 0.90"),
        (VitalSigns(1.0, 0.69, 0.0, 0.6), "outlined is 0.69, at least 0.70"),
        (VitalSigns(1.0, 0.8, 0.11, 0.6), "false_alarms is 0.11, at most 0.10"),
        (VitalSigns(1.0, 0.8, 0.0, 0.44), "AP50 is 0.44, at least 0.45"),
        (VitalSigns(1.0, 0.8, 0.0, 0.6, remark="raised ValueError"), "raised ValueError"),
    ],
)
def test_each_sign_beyond_its_margin_is_named(signs, named):
    [text] = deviations(signs, HEALTHY).values()
    assert text.startswith(named)


def test_better_than_healthy_is_no_deviation():
    assert deviations(VitalSigns(1.0, 1.0, 0.0, 0.9), HEALTHY) == {}


def test_report_says_whether_detections_came_back():
    ill = VitalSigns(found=0.2)
    still = CureReport(HEALTHY, ill, ill)
    assert not still.cured
    assert still.sentence.startswith("Still ill: found is 0.20, at least 0.90 is healthy; outlined")
    back = CureReport(HEALTHY, ill, HEALTHY)
    assert back.cured
    assert back.sentence == (
        "Cured: every sign is healthy again (found 0.20 to 1.00, outlined 0.00 to 0.80, AP50 0.00 to 0.60)."
    )
    assert list(back.table.index) == ["healthy run", "on admission", "now"]
    assert list(back.table["found"]) == [1.0, 0.2, 1.0]


def test_every_image_is_asked_for_what_it_shows_and_for_what_it_does_not(truth, questions):
    assert len(questions) == len(truth.records)
    for record, present, absent in questions:
        assert present == (["crack"] if record.objects else [])
        assert absent == (["moss"] if record.objects else ["crack", "moss"])


def test_truth_without_objects_is_refused(truth):
    empty = replace(truth, records=tuple(replace(one, objects=()) for one in truth.records))
    with pytest.raises(InputError, match="no image shows an object"):
        prepare_questions(empty, [])


def detections(record, is_right):
    rles = [item.rle for item in record.objects] if is_right else [empty_rle(record)]
    return [{"score": 0.9, "box_xyxy": [0, 0, 1, 1], "mask_rle": dict(rle)} for rle in rles]


def empty_rle(record):
    corner = [[0, 0, 2, 0, 2, 2, 0, 2]]
    return segmentation_to_rle(corner, record.height, record.width)


def test_shares_are_counted_from_what_the_predictor_answers(run, truth, questions, monkeypatch):
    """Two of three images show cracks: one is outlined, one found in a wrong place, moss is seen."""
    shown = [record for record in truth.records if record.objects]
    by_path = {record.path: record for record in truth.records}

    def predict(self, image, prompts, threshold):
        record = by_path[image]
        for prompt in prompts:
            found = []
            if prompt == "crack" and record.objects:
                found = detections(record, record is shown[0])
            if prompt == "moss" and record is shown[0]:
                found = detections(record, False)
            yield SimpleNamespace(
                image=str(image), prompt=prompt, height=record.height, width=record.width,
                detections=found, presence_prob=0.8, max_query_prob=0.7, max_score=0.9,
            )  # fmt: skip

    monkeypatch.setattr(prediction.Predictor, "predict", predict)
    signs = take_signs(run, truth, questions)
    assert signs.found == 1.0
    assert signs.outlined == 0.5
    assert signs.false_alarms == pytest.approx(1 / 4)  # moss thrice, crack once
    assert (signs.presence, signs.best_query) == pytest.approx((0.8, 0.7))
    assert signs.remark == ""


def test_a_pipeline_that_raises_is_a_sign(run, truth, questions):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    with replaced("detect.metrics.evaluate_queries", broken):
        signs = take_signs(run, truth, questions)
    assert signs.remark == "raised RuntimeError"
    assert signs.AP50 == 0
    assert deviations(signs, signs) == {"remark": "raised RuntimeError"}


def test_a_run_that_cannot_be_loaded_detects_nothing(tmp_path, truth, questions):
    signs = take_signs(tmp_path, truth, questions)
    assert signs == VitalSigns(remark="raised InputError")
