"""The assignment of queries to objects."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.errors import InputError
from helpers.model.losses import hungarian_match, matching_cost

ORACLES = Path(__file__).parent / "fixtures" / "oracles"
CASES = sorted(json.loads((ORACLES / "losses.json").read_text(encoding="utf-8"))["cases"])
TENSORS = load_file(ORACLES / "losses.safetensors")


@pytest.mark.parametrize("prefix", ["", "aux0.", "aux1."])
@pytest.mark.parametrize("name", CASES)
def test_pairs_equal_the_oracle(name, prefix):
    case = {k.partition("/")[2]: v for k, v in TENSORS.items() if k.startswith(f"{name}/")}
    counts = case["gt.num_boxes"].tolist()
    outputs = {
        "pred_logits": case[f"{prefix}pred_logits"][..., 0],
        "pred_boxes_cxcywh": case[f"{prefix}pred_boxes"],
    }
    targets = [{"boxes_cxcywh": boxes} for boxes in case["gt.boxes"].split(counts)]
    matches = hungarian_match(outputs, targets)
    assert [len(query_idx) for query_idx, _ in matches] == counts
    rows = torch.repeat_interleave(torch.tensor(counts))
    offset = torch.repeat_interleave(
        torch.tensor(counts).cumsum(0) - torch.tensor(counts), torch.tensor(counts)
    )
    assert torch.equal(rows, case[f"exp.{prefix}match.batch_idx"])
    assert torch.equal(torch.cat([q for q, _ in matches]), case[f"exp.{prefix}match.src_idx"])
    packed = torch.cat([t for _, t in matches]) + offset
    assert torch.equal(packed, case[f"exp.{prefix}match.tgt_idx"])


def make_outputs(num_rows=1, num_queries=3):
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
    return {
        "pred_logits": torch.zeros(num_rows, num_queries),
        "pred_boxes_cxcywh": boxes[:num_queries].repeat(num_rows, 1, 1),
    }


def test_each_object_gets_the_query_on_top_of_it_in_the_order_of_the_objects():
    boxes = torch.tensor([[0.79, 0.8, 0.2, 0.2], [0.21, 0.2, 0.2, 0.2]])
    [(query_idx, target_idx)] = hungarian_match(make_outputs(), [{"boxes_cxcywh": boxes}])
    assert query_idx.tolist() == [2, 0]
    assert target_idx.tolist() == [0, 1]


def test_the_score_decides_between_equal_boxes():
    outputs = make_outputs()
    outputs["pred_boxes_cxcywh"][:] = 0.5
    outputs["pred_logits"] = torch.tensor([[-2.0, 3.0, 1.0]])
    [(query_idx, _)] = hungarian_match(outputs, [{"boxes_cxcywh": torch.full((1, 4), 0.5)}])
    assert query_idx.tolist() == [1]


@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 2, 0), (1, 0)])
def test_rows_without_objects_have_empty_int64_pairs(counts):
    targets = [{"boxes_cxcywh": torch.rand(n, 4) * 0.5 + 0.1} for n in counts]
    matches = hungarian_match(make_outputs(len(counts)), targets)
    assert [len(q) for q, _ in matches] == list(counts)
    assert all(i.dtype == torch.int64 for pair in matches for i in pair)


def test_more_objects_than_queries_matches_every_query_once():
    boxes = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.2
    [(query_idx, target_idx)] = hungarian_match(make_outputs(), [{"boxes_cxcywh": boxes}])
    assert sorted(query_idx.tolist()) == [0, 1, 2]
    assert target_idx.tolist() == sorted(set(target_idx.tolist()))


def test_cost_by_hand():
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    logit = torch.zeros(1)
    # p = 1/2: class -(.25 - .75) * .25 * log(1/2) = -.0866 (x2); L1 0; GIoU 1 (x -2)
    expected = 2 * (0.25 - 0.75) * 0.25 * 0.6931472 - 2
    assert matching_cost(logit, box, box).item() == pytest.approx(expected, abs=1e-5)
    away = torch.tensor([[0.5, 0.9, 0.2, 0.2]])
    # L1 .4 (x5); IoU 0, hull .2 x .6 of which .08 covered: GIoU -1/3
    expected += 2 + 5 * 0.4 + 2 / 3
    assert matching_cost(logit, box, away).item() == pytest.approx(expected, abs=1e-5)


def test_matching_takes_no_part_in_the_gradient():
    outputs = make_outputs()
    outputs["pred_logits"].requires_grad_()
    [(query_idx, _)] = hungarian_match(outputs, [{"boxes_cxcywh": torch.full((1, 4), 0.5)}])
    assert not query_idx.requires_grad
    assert outputs["pred_logits"].grad_fn is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["pred_logits", "pred_boxes_cxcywh"])
def test_a_prediction_that_is_not_finite_is_named_with_its_row(key, value):
    outputs = make_outputs(2)
    outputs[key] = outputs[key].clone()
    outputs[key][1].view(-1)[0] = value
    with pytest.raises(InputError, match=rf"row 1 .*{key}.*learning_rate"):
        hungarian_match(outputs, [{"boxes_cxcywh": torch.full((1, 4), 0.4)}] * 2)


def test_a_target_that_is_not_finite_is_named_as_a_data_error():
    boxes = torch.tensor([[0.5, float("nan"), 0.1, 0.1]])
    with pytest.raises(InputError, match=r"row 0 .*target boxes_cxcywh.*helpers check"):
        hungarian_match(make_outputs(), [{"boxes_cxcywh": boxes}])


def test_two_boxes_without_area_are_named():
    outputs = make_outputs()
    outputs["pred_boxes_cxcywh"][0, 0, 2:] = 0
    boxes = outputs["pred_boxes_cxcywh"][0, :1].clone()
    with pytest.raises(InputError, match="no area"):
        hungarian_match(outputs, [{"boxes_cxcywh": boxes}])
