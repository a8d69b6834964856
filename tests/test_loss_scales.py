from dataclasses import replace

import pytest
import torch
from tiny_random import tiny_model, tiny_processor, write_dataset

from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.model.losses import WEIGHTS
from notebooks.examples import losses_beside_silence, silenced


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the losses with the objects as annotated, and with all objects lost."""
    split = read_split(write_dataset(tmp_path_factory.mktemp("data")), "valid")
    records = tuple(replace(record, objects=()) for record in split.records)
    model, processor = tiny_model(), tiny_processor()
    tables = []
    for one in (split, replace(split, records=records)):
        dataset = PromptDataset.for_evaluation(one, model, processor, absent_prompts=["dog"])
        tables.append(losses_beside_silence(model, dataset, PromptCollator(processor)))
    return tables


def test_silence_wins_where_the_objects_were_lost(measured):
    _, lost = measured
    assert list(lost.columns) == list(WEIGHTS)
    assert (lost.loc["silent"] < 0.01).all()
    assert (lost.loc["model"] > lost.loc["silent"]).all()


def test_silence_is_punished_by_the_native_loss_where_objects_are_read(measured):
    read, lost = measured
    assert read.loc["silent", "native"] > read.loc["model", "native"]
    assert read.loc["silent", "native"] > lost.loc["silent", "native"]


def test_silenced_outputs_keep_boxes_and_masks_and_leave_the_input_alone():
    layer = {
        "pred_logits": torch.zeros(1, 3),
        "presence_logits": torch.zeros(1, 1),
        "pred_boxes_cxcywh": torch.rand(1, 3, 4),
    }
    outputs = layer | {"pred_masks": torch.rand(1, 3, 2, 2), "aux": [layer]}
    quiet = silenced(outputs)
    scores = quiet["pred_logits"].sigmoid() * quiet["presence_logits"].sigmoid()
    assert scores.max() < 1e-9
    assert quiet["aux"][0]["pred_logits"].max() == -12
    assert quiet["pred_masks"] is outputs["pred_masks"]
    assert outputs["pred_logits"].max() == 0
