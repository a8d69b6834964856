import numpy as np
import pytest
from tiny_random import tiny_model, tiny_processor, write_dataset

from helpers.data.coco import read_split
from helpers.detect.detections import RawPrediction, output_table
from helpers.detect.predictor import raw_outputs


def raw_of(query_logits, presence_logit, semantic_logits):
    count = len(query_logits)
    return RawPrediction(
        image="a.png",
        prompt="crack",
        height=4,
        width=4,
        query_logits=np.array(query_logits, dtype=np.float32),
        presence_logit=presence_logit,
        boxes_xyxy=np.zeros((count, 4), dtype=np.float32),
        mask_logits=np.zeros((count, 2, 2), dtype=np.float32),
        semantic_logits=np.array(semantic_logits, dtype=np.float32),
    )


def test_numbers_of_one_prediction_by_hand():
    [row] = output_table([raw_of([-11, -1, 0], 0.0, [[0, 0], [0, -50]])]).to_dict("records")
    assert (row["image_id"], row["prompt"]) == ("a.png", "crack")
    assert (row["logit_min"], row["logit_median"], row["logit_max"]) == (-11, -1, 0)
    assert row["presence_prob"] == 0.5
    assert row["max_query_prob"] == 0.5
    assert row["max_score"] == 0.25
    assert row["semantic_mean"] == pytest.approx(0.375)
    assert row["semantic_max"] == 0.5


def test_no_predictions_make_an_empty_table_with_the_same_columns():
    filled = output_table([raw_of([0], 0.0, [[0]])])
    assert output_table([]).columns.tolist() == filled.columns.tolist()
    assert len(output_table([])) == 0


def test_asks_every_image_every_prompt_or_each_its_own(tmp_path):
    records = read_split(write_dataset(tmp_path / "data"), "test").records
    model, processor = tiny_model(), tiny_processor()
    table = output_table(raw_outputs(model, processor, records, ["crack", "moss"]))
    assert table["prompt"].tolist() == ["crack", "moss"] * len(records)
    own = {record.image_id: () for record in records} | {records[1].image_id: ("moss",)}
    [row] = output_table(raw_outputs(model, processor, records, own)).to_dict("records")
    same = table[(table.image_id == records[1].image_id) & (table.prompt == "moss")].iloc[0]
    assert row["image_id"] == records[1].image_id
    assert row["max_score"] == pytest.approx(same["max_score"], rel=1e-4)
