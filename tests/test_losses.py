"""The loss against Meta's recorded numbers, and in the cases where nothing is there to learn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.ops import box_convert, box_iou

from helpers.errors import InputError
from helpers.model.losses import (
    EARLY_WEIGHTS,
    NATIVE_WEIGHTS,
    Divisors,
    hungarian_match,
    loss_divisors,
    sam3_losses,
    target_counts,
    weighted_sum,
)

ORACLES = Path(__file__).parent / "fixtures" / "oracles"
RECORD = json.loads((ORACLES / "losses.json").read_text(encoding="utf-8"))
TENSORS = load_file(ORACLES / "losses.safetensors")
CASES = sorted(RECORD["cases"])
SETTING_TERMS = ("loss_ce", "presence_loss")
GRAD_NAMES = {
    "pred_logits": "pred_logits",
    "pred_boxes": "pred_boxes_cxcywh",
    "pred_masks": "pred_masks",
    "presence_logits": "presence_logits",
    "semantic_seg": "semantic_logits",
}


def load_case(name):
    """Outputs (leaves with gradients) and targets of a recorded case."""
    case = {k.partition("/")[2]: v for k, v in TENSORS.items() if k.startswith(f"{name}/")}
    height, width = RECORD["cases"][name]["pred_mask_hw"]
    num_rows, num_queries, _ = case["pred_logits"].shape
    # Only masks of matched queries are recorded; the others must not matter, so they get a value
    # that would show.
    masks = torch.full((num_rows, num_queries, height, width), 5.0)
    rows, queries = case["exp.match.batch_idx"], case["exp.match.src_idx"]
    masks[rows, queries] = case["matched_masks_q"].float() * RECORD["mask_scale"]
    outputs = _layer(case, "") | {
        "pred_masks": masks.requires_grad_(),
        "semantic_logits": case["semantic_seg"].clone().requires_grad_(),
        "aux": [_layer(case, "aux0."), _layer(case, "aux1.")],
    }
    counts = case["gt.num_boxes"].tolist()
    packed = [case[f"gt.{k}"].split(counts) for k in ("boxes", "masks", "is_valid_mask")]
    targets = [
        {"boxes_cxcywh": b, "masks": m, "mask_valid": v} for b, m, v in zip(*packed, strict=True)
    ]
    return outputs, targets, case


def _layer(case, prefix):
    return {
        "pred_logits": case[f"{prefix}pred_logits"][..., 0].clone().requires_grad_(),
        "pred_boxes_cxcywh": case[f"{prefix}pred_boxes"].clone().requires_grad_(),
        "presence_logits": case[f"{prefix}presence_logits"].clone().requires_grad_(),
    }


def assert_near(actual, expected, kind):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, **RECORD["tolerance"][kind])


def grad_of(tensor):
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def test_weights_are_the_recorded_ones():
    assert RECORD["weights"] == NATIVE_WEIGHTS


@pytest.mark.parametrize("variant", ["native", "early"])
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_the_oracle(name, variant):
    outputs, targets, _ = load_case(name)
    terms = sam3_losses(outputs, targets, variant)
    scalars = RECORD["cases"][name]["scalars"]
    for term in NATIVE_WEIGHTS:
        expected = scalars[f"{variant}.{term}" if term in SETTING_TERMS else term]
        assert_near(terms[term], expected, "scalar losses")
    aux_names = {term for term in terms if term.startswith("aux")}
    if variant == "early":
        assert aux_names == set()
        return
    assert len(aux_names) == 8
    for aux_name in aux_names:
        layer, _, term = aux_name.partition(".")
        recorded = f"{layer}.native.{term}" if term in SETTING_TERMS else aux_name
        assert_near(terms[aux_name], scalars[recorded], "scalar losses")


@pytest.mark.parametrize("name", CASES)
def test_totals_equal_the_oracle(name):
    outputs, targets, _ = load_case(name)
    scalars = RECORD["cases"][name]["scalars"]
    native = sam3_losses(outputs, targets, "native")
    assert_near(native["total"], scalars["native.total_with_2aux"], "totals")
    without_aux = sam3_losses(outputs | {"aux": []}, targets, "native")
    assert_near(without_aux["total"], scalars["native.total"], "totals")
    early = sam3_losses(outputs, targets, "early")
    # The recorded early.total was weighted with the native weights.
    assert_near(weighted_sum(early, NATIVE_WEIGHTS), scalars["early.total"], "totals")
    by_hand = (
        2 * early["loss_ce"]
        + 5 * (early["loss_bbox"] + early["loss_mask"] + early["loss_dice"])
        + 2 * early["loss_giou"]
    )
    torch.testing.assert_close(early["total"], by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["native", "native_with_2aux", "early"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_oracle(name, setting):
    outputs, targets, case = load_case(name)
    scalars = RECORD["cases"][name]["scalars"]
    aux = outputs["aux"]
    if setting == "native":
        outputs = outputs | {"aux": []}
    terms = sam3_losses(outputs, targets, setting.partition("_")[0])
    weighted_sum(terms, NATIVE_WEIGHTS).backward()

    stem, _, suffix = setting.partition("_")
    suffix = f"_{suffix}" if suffix else ""
    for recorded, key in GRAD_NAMES.items():
        expected = scalars[f"{stem}.gradnorm{suffix}.{recorded}"]
        assert_near(grad_of(outputs[key]).norm(), expected, "gradnorm")
    for recorded in ("pred_logits", "presence_logits"):
        expected = case.get(f"exp.{stem}.grad.{recorded}")
        if suffix or expected is None:
            continue
        actual = grad_of(outputs[recorded]).reshape(expected.shape)
        assert_near(actual, expected, "grad elementwise")
    if not suffix:
        return
    for index, layer in enumerate(aux):
        for recorded in ("pred_logits", "pred_boxes", "presence_logits"):
            expected = scalars[f"native.gradnorm_with_2aux.aux{index}.{recorded}"]
            assert_near(grad_of(layer[GRAD_NAMES[recorded]]).norm(), expected, "gradnorm")
        expected = case[f"exp.native.grad_with_2aux.aux{index}.pred_logits"]
        assert_near(layer["pred_logits"].grad[..., None], expected, "grad elementwise")


@pytest.mark.parametrize("name", CASES)
def test_only_early_presence_has_no_gradient(name):
    for variant in ("native", "early"):
        outputs, targets, _ = load_case(name)
        terms = sam3_losses(outputs, targets, variant)
        weighted_sum(terms, NATIVE_WEIGHTS).backward()
        without = [recorded for recorded, key in GRAD_NAMES.items() if outputs[key].grad is None]
        assert without == RECORD["cases"][name]["no_autograd_path"][variant]


# --- the paper's formulas, written with `math` ------------------------------------------------

SIDE, BOX_WIDTH, ROWS, PRESENT, QUERIES = 8, 0.4, 3, 2, 3
CONSTANT = [
    {"matched": 1.0, "others": -2.0, "shift": 0.1, "presence": 0.5, "mask": 0.5},
    {"matched": -1.5, "others": 0.7, "shift": 0.2, "presence": -2.0, "mask": -1.0},
]
"""Query logits at the object and elsewhere, shift of the box, presence and mask logits."""
PERFECT = {"matched": 6.0, "others": -6.0, "shift": 0.0, "presence": 6.0, "mask": 6.0}
WORSE = {
    "a missed object": {"matched": -4.0},
    "false alarms": {"others": 4.0},
    "a box that is off": {"shift": 0.2},
    "inverted masks": {"mask": -6.0},
    "a wrong presence": {"presence": -6.0},
}


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def softplus(logit):
    return math.log1p(math.exp(logit))


def half_focal(logit, alpha):
    """Focal loss, gamma 2, of one logit everywhere where half of the pixels are set."""
    prob = sigmoid(logit)
    inside = alpha * (1 - prob) ** 2 * softplus(-logit)
    return 0.5 * (inside + (1 - alpha) * prob**2 * softplus(logit))


def half_dice(logit):
    """Dice loss, smoothed by 1, of one logit everywhere where half of the pixels are set."""
    pixels, prob = SIDE**2, sigmoid(logit)
    return 1 - (pixels * prob + 1) / (pixels * prob + pixels / 2 + 1)


def formula(variant, matched, others, shift, presence, mask):
    """Terms of the final layer of `example_of` with the same logit everywhere, unweighted."""
    iou = (BOX_WIDTH - shift) / (BOX_WIDTH + shift)
    soft_target = max(0.01, sigmoid(matched) ** 0.25 * iou**0.75)
    at_object = softplus(matched) - soft_target * matched
    elsewhere = softplus(others)
    if variant == "native":
        penalty = (QUERIES - 1) * sigmoid(others) ** 2 * elsewhere
        loss_ce = PRESENT * (10 * at_object + penalty) / (ROWS * 200)
        yes, no = softplus(-presence), softplus(presence)
        presence_loss = 0.5 * (PRESENT * yes + (ROWS - PRESENT) * no) / ROWS
    else:
        with_object = PRESENT * (0.5 * at_object + (QUERIES - 1) * elsewhere)
        without_object = (ROWS - PRESENT) * QUERIES * elsewhere
        loss_ce = (with_object + without_object) / (ROWS * QUERIES + 1e-6)
        presence_loss = 0.0
    return {
        "loss_ce": loss_ce,
        "presence_loss": presence_loss,
        "loss_bbox": shift,
        "loss_giou": 1 - iou,
        "loss_mask": half_focal(mask, 0.25),
        "loss_dice": half_dice(mask),
        "loss_semantic_seg": half_focal(mask, 0.6),
        "loss_semantic_dice": half_dice(mask),
    }


def example_of(matched, others, shift, presence, mask, *, is_right):
    """Outputs and targets; `is_right`: presence and masks answer right instead of constantly."""
    inside = torch.zeros(SIDE, SIDE)
    inside[:, : SIDE // 2] = 1
    present = torch.tensor([True] * PRESENT + [False] * (ROWS - PRESENT))
    logits = torch.full((ROWS, QUERIES), others)
    logits[present, 0] = matched
    boxes = torch.tensor([0.1, 0.1, 0.05, 0.05]).repeat(ROWS, QUERIES, 1)
    boxes[:, 0] = torch.tensor([0.5 + shift, 0.5, BOX_WIDTH, BOX_WIDTH])
    sign = torch.where(present, 1.0, -1.0) if is_right else torch.ones(ROWS)
    pattern = 2 * inside - 1 if is_right else torch.ones(SIDE, SIDE)
    layer = {
        "pred_logits": logits,
        "pred_boxes_cxcywh": boxes,
        "presence_logits": presence * sign[:, None],
    }
    masks = (mask * pattern).expand(ROWS, QUERIES, SIDE, SIDE)
    outputs = layer | {"pred_masks": masks, "semantic_logits": masks[:, :1], "aux": [layer]}
    objects = {
        "boxes_cxcywh": torch.tensor([[0.5, 0.5, BOX_WIDTH, BOX_WIDTH]]),
        "masks": inside[None].to(torch.uint8),
    }
    nothing = {name: value[:0] for name, value in objects.items()}
    return outputs, [objects if here else nothing for here in present.tolist()]


@pytest.mark.parametrize("variant", ["native", "early"])
@pytest.mark.parametrize("example", CONSTANT, ids=["found", "missed"])
def test_every_term_equals_its_formula(variant, example):
    terms = sam3_losses(*example_of(**example, is_right=False), variant)
    expected = formula(variant, **example)
    final = {name: terms[name].item() for name in expected}
    assert final == pytest.approx(expected, rel=1e-4)
    aux = {name: value.item() for name, value in terms.items() if name.startswith("aux0.")}
    layer = {
        name: expected[name] for name in ("loss_ce", "presence_loss", "loss_bbox", "loss_giou")
    }
    assert aux == pytest.approx(
        {f"aux0.{name}": value for name, value in layer.items()} if variant == "native" else {},
        rel=1e-4,
    )
    weights = NATIVE_WEIGHTS if variant == "native" else EARLY_WEIGHTS
    total = sum(weight * expected[name] for name, weight in weights.items())
    total += sum(weights[name] * layer[name] for name in layer) if variant == "native" else 0
    assert terms["total"].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("variant", ["native", "early"])
@pytest.mark.parametrize("name", WORSE)
def test_a_worse_answer_costs_more(variant, name):
    best = sam3_losses(*example_of(**PERFECT, is_right=True), variant)["total"]
    worse = sam3_losses(*example_of(**(PERFECT | WORSE[name]), is_right=True), variant)["total"]
    if (variant, name) == ("early", "a wrong presence"):
        assert worse == best  # the failing script had no presence loss
    else:
        assert worse > best


# --- small cases of our own -------------------------------------------------------------------


def random_outputs(num_rows=2, num_queries=6, size=4, num_aux=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def layer():
        return {
            "pred_logits": draw(num_rows, num_queries).requires_grad_(),
            "pred_boxes_cxcywh": draw(num_rows, num_queries, 4).sigmoid().requires_grad_(),
            "presence_logits": draw(num_rows, 1).requires_grad_(),
        }

    return layer() | {
        "pred_masks": draw(num_rows, num_queries, size, size).requires_grad_(),
        "semantic_logits": draw(num_rows, 1, size, size).requires_grad_(),
        "aux": [layer() for _ in range(num_aux)],
    }


def make_target(num_objects, size=4):
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3]]).repeat(num_objects, 1)
    boxes[:, 0] = torch.linspace(0.3, 0.7, num_objects)
    masks = torch.zeros(num_objects, size, size, dtype=torch.uint8)
    masks[:, size // 4 : size // 2, : size // 2] = 1
    return {"boxes_cxcywh": boxes, "masks": masks}


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_queries", [6, 200])
def test_early_without_objects_is_twice_the_mean_softplus(num_rows, num_queries):
    outputs = random_outputs(num_rows, num_queries, num_aux=0)
    terms = sam3_losses(outputs, [make_target(0)] * num_rows, "early")
    expected = 2 * F.softplus(outputs["pred_logits"]).mean()
    torch.testing.assert_close(terms["total"], expected, rtol=2e-7, atol=0)
    terms["total"].backward()
    expected_grad = 2 * outputs["pred_logits"].detach().sigmoid() / (num_rows * num_queries)
    torch.testing.assert_close(outputs["pred_logits"].grad, expected_grad)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_native_without_objects_teaches_only_presence(num_rows):
    outputs = random_outputs(num_rows)
    terms = sam3_losses(outputs, [make_target(0)] * num_rows, "native")
    expected = 20 * 0.5 * F.softplus(outputs["presence_logits"]).mean()
    expected = expected + 20 * 0.5 * F.softplus(outputs["aux"][0]["presence_logits"]).mean()
    torch.testing.assert_close(terms["total"], expected)
    terms["total"].backward()
    for layer in (outputs, outputs["aux"][0]):
        assert layer["presence_logits"].grad.abs().min() > 0
        assert layer["pred_logits"].grad.abs().max() == 0
        assert layer["pred_boxes_cxcywh"].grad.abs().max() == 0
    assert outputs["pred_masks"].grad.abs().max() == 0
    assert outputs["semantic_logits"].grad.abs().max() == 0


def test_an_empty_row_keeps_its_queries_out_of_a_mixed_batch():
    outputs = random_outputs(3)
    terms = sam3_losses(outputs, [make_target(0), make_target(2), make_target(0)], "native")
    terms["total"].backward()
    for key in ("pred_logits", "pred_boxes_cxcywh", "pred_masks", "semantic_logits"):
        per_row = outputs[key].grad.flatten(1).abs().amax(1)
        assert per_row[1] > 0
        assert per_row[0] == 0
        assert per_row[2] == 0
    assert (outputs["presence_logits"].grad != 0).all()


@pytest.mark.parametrize("variant", ["native", "early"])
@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 1), (2, 0), (3, 1)])
def test_backward_reaches_all_final_outputs_and_stays_finite(variant, counts):
    outputs = random_outputs(len(counts))
    terms = sam3_losses(outputs, [make_target(n) for n in counts], variant)
    assert terms["total"].requires_grad
    terms["total"].backward()
    reached = ["pred_logits", "pred_boxes_cxcywh", "pred_masks"]
    if variant == "native":
        reached += ["presence_logits", "semantic_logits"]
    for key in reached:
        assert torch.isfinite(outputs[key].grad).all()
    assert all(torch.isfinite(value) and value.ndim == 0 for value in terms.values())


@pytest.mark.parametrize("variant", ["native", "early"])
def test_empty_rows_may_have_another_mask_size(variant):
    outputs = random_outputs(2)
    same = sam3_losses(outputs, [make_target(2, size=4), make_target(0, size=4)], variant)
    other = sam3_losses(outputs, [make_target(2, size=4), make_target(0, size=9)], variant)
    assert same["total"] == other["total"]


def test_rows_may_have_masks_of_different_sizes():
    outputs = random_outputs(2)
    both = sam3_losses(outputs, [make_target(1, size=4), make_target(1, size=8)])
    rows = []
    for row, size in enumerate((4, 8)):
        one = {key: value[row : row + 1] for key, value in outputs.items() if key != "aux"}
        rows.append(sam3_losses(one, [make_target(1, size=size)]))
    for term in ("loss_mask", "loss_dice", "loss_semantic_seg"):
        mean = (rows[0][term] + rows[1][term]) / 2
        torch.testing.assert_close(both[term], mean, rtol=1e-5, atol=1e-6)


def test_an_invalid_mask_counts_as_a_box_but_not_as_a_mask():
    outputs = random_outputs(1)
    target = make_target(2)
    target["masks"][1] = 0
    terms = {
        valid: sam3_losses(outputs, [target | {"mask_valid": torch.tensor(valid)}])
        for valid in ((1, 1), (1, 0), (0, 0))
    }
    assert terms[1, 1]["loss_bbox"] == terms[0, 0]["loss_bbox"] > 0
    assert terms[1, 1]["loss_mask"] > terms[1, 0]["loss_mask"] > terms[0, 0]["loss_mask"] == 0
    assert terms[0, 0]["loss_dice"] == 0
    assert terms[0, 0]["total"].requires_grad
    absent_key = sam3_losses(outputs, [target])
    assert absent_key["loss_mask"] == terms[1, 1]["loss_mask"]


def test_no_valid_mask_and_no_union_gives_no_semantic_loss():
    outputs = random_outputs(1)
    target = make_target(1)
    target["masks"][:] = 0
    terms = sam3_losses(outputs, [target | {"mask_valid": torch.zeros(1)}])
    assert terms["loss_semantic_seg"] == terms["loss_semantic_dice"] == 0
    assert terms["loss_bbox"] > 0


def test_a_box_without_area_does_not_make_a_row_present():
    outputs = random_outputs(1)
    target = make_target(1)
    target["boxes_cxcywh"][0, 2] = 0
    terms = sam3_losses(outputs, [target])
    assert terms["loss_ce"] == 0
    expected = 0.5 * F.softplus(outputs["presence_logits"]).mean()
    torch.testing.assert_close(terms["presence_loss"], expected)
    assert terms["loss_bbox"] > 0


@pytest.mark.parametrize(("num_queries", "divisor"), [(6, 200), (199, 200), (300, 300)])
def test_native_score_loss_by_hand(num_queries, divisor):
    outputs = random_outputs(1, num_queries, num_aux=0)
    target = make_target(1)
    [(query_idx, _)] = hungarian_match(outputs, [target])
    logits = outputs["pred_logits"][0].detach()
    prob = logits.sigmoid()
    losses = prob**2 * F.softplus(logits)
    predicted = box_convert(outputs["pred_boxes_cxcywh"][0, query_idx].detach(), "cxcywh", "xyxy")
    iou = box_iou(predicted, box_convert(target["boxes_cxcywh"], "cxcywh", "xyxy"))[0, 0]
    soft = max(0.01, float(prob[query_idx] ** 0.25 * iou**0.75))
    positive = soft * F.softplus(-logits[query_idx]) + (1 - soft) * F.softplus(logits[query_idx])
    losses[query_idx] = 10 * positive
    terms = sam3_losses(outputs, [target], "native")
    torch.testing.assert_close(terms["loss_ce"].detach(), losses.sum() / divisor)


def test_every_divisor_divides_its_own_terms_only():
    outputs, targets = random_outputs(2), [make_target(2), make_target(1)]
    assert target_counts(targets) == [3, 2, 2]
    local = sam3_losses(outputs, targets)
    given = sam3_losses(outputs, targets, divisors=Divisors(6.0, 8.0, 20.0))
    for term in ("loss_bbox", "loss_giou", "loss_mask", "loss_dice", "aux0.loss_bbox"):
        torch.testing.assert_close(given[term], local[term] / 2)
    for term in ("loss_ce", "presence_loss", "aux0.loss_ce"):
        torch.testing.assert_close(given[term], local[term] / 4)
    for term in ("loss_semantic_seg", "loss_semantic_dice"):
        torch.testing.assert_close(given[term], local[term] / 10)


@pytest.mark.parametrize("variant", ["native", "early"])
@pytest.mark.parametrize(
    "counts", [(2, 1, 0), (1, 0, 0), (0, 0, 0)], ids=["objects", "one object", "no object"]
)
def test_mean_over_devices_is_the_loss_of_one_device_with_all_rows(variant, counts):
    targets = [make_target(count) for count in counts]
    outputs = random_outputs(3)
    whole = sam3_losses(outputs, targets, variant)
    parts = [(slice(0, 1), targets[:1]), (slice(1, 3), targets[1:])]
    divisors = loss_divisors(np.sum([target_counts(t) for _, t in parts], 0).tolist(), len(parts))

    def of(part):
        taken = {name: value[part] for name, value in outputs.items() if name != "aux"}
        aux = [{name: v[part] for name, v in layer.items()} for layer in outputs["aux"]]
        return {**taken, "aux": aux}

    losses = [sam3_losses(of(part), t, variant, divisors=divisors) for part, t in parts]
    for name, value in whole.items():
        mean = (losses[0][name] + losses[1][name]) / 2
        torch.testing.assert_close(mean, value, msg=lambda text, name=name: f"{name}: {text}")


def test_more_objects_than_queries_leaves_some_unmatched():
    outputs = random_outputs(1, num_queries=2)
    terms = sam3_losses(outputs, [make_target(5)])
    assert torch.isfinite(terms["total"])
    # 2 pairs, each with 1 - GIoU below 2, over 5 objects
    assert 0 < terms["loss_giou"] < 2 * 2 / 5


def test_half_precision_outputs_give_float32_terms():
    outputs = random_outputs(1, num_aux=0)
    half = {k: v.detach().bfloat16() for k, v in outputs.items() if k != "aux"}
    full = {k: v.float() for k, v in half.items()}
    targets = [make_target(2)]
    for name, value in sam3_losses(half, targets).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, sam3_losses(full, targets)[name])


def test_unmatched_masks_are_never_brought_to_target_size(monkeypatch):
    sizes = []
    original = F.interpolate

    def spy(logits, **kwargs):
        sizes.append(len(logits))
        return original(logits, **kwargs)

    monkeypatch.setattr(F, "interpolate", spy)
    sam3_losses(random_outputs(2, num_queries=50), [make_target(3, size=16), make_target(0)])
    assert sorted(sizes) == [1, 3]


def test_early_weights_are_those_of_the_script():
    assert EARLY_WEIGHTS == {
        "loss_ce": 2,
        "loss_bbox": 5,
        "loss_giou": 2,
        "loss_mask": 5,
        "loss_dice": 5,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pred_logits": torch.zeros(2, 6, 1)}, "pred_logits has shape"),
        ({"presence_logits": torch.zeros(2)}, "presence_logits has shape"),
        ({"pred_masks": torch.zeros(1, 6, 4, 4)}, "2 rows"),
        ({"aux": [{"pred_logits": torch.zeros(2, 6)}]}, r"outputs\['aux'\]\[0\]"),
    ],
)
def test_wrong_outputs_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        sam3_losses(random_outputs(2) | change, [make_target(1), make_target(0)])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (make_target(1) | {"boxes_cxcywh": torch.tensor([[200.0, 100, 50, 60]])}, "200"),
        (make_target(2) | {"boxes_cxcywh": torch.rand(1, 4)}, "numbers of objects differ"),
        (make_target(2) | {"mask_valid": torch.ones(1)}, "numbers of objects differ"),
        ({"boxes_cxcywh": torch.rand(1, 4)}, "missing"),
        (make_target(1) | {"boxes_cxcywh": torch.rand(1, 5)}, "shape"),
    ],
)
def test_wrong_targets_are_refused_with_their_row(target, words):
    with pytest.raises(InputError, match=words) as caught:
        sam3_losses(random_outputs(2), [make_target(1), target])
    assert "targets[1]" in str(caught.value)


def test_unknown_variant_missing_output_and_no_rows_are_refused():
    outputs, targets = random_outputs(1), [make_target(1)]
    with pytest.raises(InputError, match=r"nativ.*'native', 'early'"):
        sam3_losses(outputs, targets, "nativ")
    with pytest.raises(InputError, match="semantic_logits"):
        sam3_losses({k: v for k, v in outputs.items() if k != "semantic_logits"}, targets)
    with pytest.raises(InputError, match="no rows"):
        sam3_losses(outputs, [])


def test_a_diverged_model_is_named_with_its_row():
    outputs = random_outputs(2)
    with torch.no_grad():
        outputs["pred_logits"][1, 0] = float("nan")
    with pytest.raises(InputError, match=r"row 1 .*pred_logits.*learning_rate"):
        sam3_losses(outputs, [make_target(1), make_target(1)])
