import pandas as pd
import pytest

from helpers.config import load_config
from helpers.files import CONFIGS
from helpers.train.report import checklist, epoch_means, least_early_loss
from helpers.train.run import RunFiles, read_run
from notebooks.examples import checklist_frame

# The document's items, in its order.
ITEMS = {
    "modules": "LoRA is applied to modules",
    "trainable": "Trainable parameters",
    "epoch 1": "Loss in epoch 1",
    "epoch 5": "Loss in epoch 5",
    "epoch 10": "Loss from epoch 10 on",
    "loss": "Training loss over the epochs",
    "valid loss": "Validation loss",
    "completed": "Training completed all epochs without errors",
    "final loss": "Final training loss",
    "confidence": "Inference produces detections with confidence",
    "prompts": 'Text prompts like "crack", "defect" work',
}
NAMES = list(ITEMS)


def make_run(losses, *, variant="native", share=0.025, moved=1.0, epochs=None, **valid):
    """Build the files of a run with one logged loss per epoch and box and mask terms of 0.1."""
    config = load_config(
        CONFIGS / "crack_detection_config.yaml",
        profile="tiny",
        overrides=[
            f"training.num_epochs={len(losses) if epochs is None else epochs}",
            "scale.num_epochs=1.0",
            f"loss.variant={variant}",
        ],
    )
    terms = dict.fromkeys(("loss_bbox", "loss_giou", "loss_mask", "loss_dice"), 0.1)
    history = []
    for number, loss in enumerate(losses, start=1):
        history.append({"epoch": number - 0.5, "step": number, "loss": loss, **terms})
        history.append({"epoch": float(number), "step": number, "eval_loss": loss + 1})
    adapter = pd.DataFrame(
        {"modules": [4.0], "share": [share], "B_nonzero": [moved]}, index=["total"]
    )
    prompts = {"prompts": {"crack": 3}, "negatives": {}, "negatives_per_image": 0}
    metrics = {"epochs": float(len(losses)), "valid": valid}
    return RunFiles(None, config, prompts, metrics, history, adapter)


def passed(run, **options):
    return dict(zip(NAMES, [row["passed"] for row in checklist(run, **options)], strict=True))


def test_a_run_that_does_all_the_document_says():
    run = make_run(
        [0.9, 0.8, 0.6, 0.5, 0.4, *[0.3] * 4, 0.2], variant="early", max_score_present=0.7
    )
    verdicts = passed(run, words={"crack": 1.0, "defect": 0.9})
    assert verdicts == dict.fromkeys(NAMES, True)


def test_a_run_that_does_the_opposite():
    run = make_run(
        [1.5 + number for number in range(10)],
        variant="early",
        share=0.08,
        moved=0.5,
        epochs=12,
        max_score_present=0.2,
    )
    verdicts = passed(run, words={"crack": 1.0, "defect": 0.1})
    assert verdicts == dict.fromkeys(NAMES, False)


def test_native_loss_is_refuted_by_the_terms_both_share_or_left_open():
    run = make_run([20.0] * 5)
    assert least_early_loss(run.history) == pytest.approx({n: 1.7 for n in range(1, 6)})
    verdicts = passed(run)
    assert verdicts["epoch 1"] is False
    assert verdicts["final loss"] is False
    assert verdicts["epoch 10"] is None
    for entry in run.history:
        entry.update(dict.fromkeys(("loss_bbox", "loss_giou", "loss_mask", "loss_dice"), 0.01))
    verdicts = passed(run)
    assert verdicts["epoch 1"] is None
    assert verdicts["epoch 5"] is None
    assert verdicts["final loss"] is None


def test_a_log_without_terms_leaves_the_native_loss_open():
    run = make_run([20.0] * 5)
    for entry in run.history:
        entry.pop("loss_mask", None)
    assert least_early_loss(run.history) == {}
    assert passed(run)["final loss"] is None


def test_epoch_means_average_within_an_epoch():
    history = [
        {"epoch": 0.5, "loss": 4.0},
        {"epoch": 1.0 + 1e-9, "loss": 2.0},
        {"epoch": 1.5, "loss": 1.0},
        {"epoch": 1.5, "eval_loss": 9.0},
    ]
    assert epoch_means(history, "loss") == {1: 3.0, 2: 1.0}
    assert epoch_means([], "loss") == {}


def test_one_epoch_has_no_trend():
    verdicts = passed(make_run([2.0]))
    assert verdicts["loss"] is None
    assert verdicts["valid loss"] is None


def test_prompts_are_not_called_working_unless_all_were_asked():
    good = {"max_score_present": 0.8, "max_score_present_share_above": 0.95}
    assert passed(make_run([2.0, 1.0], **good))["prompts"] is None
    poor = {"max_score_present": 0.8, "max_score_present_share_above": 0.8}
    assert passed(make_run([2.0, 1.0], **poor))["prompts"] is False
    empty = passed(make_run([2.0, 1.0]))
    assert empty["prompts"] is None
    assert empty["confidence"] is None


def test_table_names_its_verdicts():
    table = checklist_frame(make_run([2.0, 1.0], max_score_present=0.7))
    assert list(table.columns) == ["document says", "measured", "verdict"]
    assert table.loc["Training loss over the epochs", "verdict"] == "yes"
    assert table.loc["Loss from epoch 10 on", "verdict"] == "not checkable"
    assert table.loc["Trainable parameters", "measured"] == "2.50%"


def test_is_worked_off_from_a_run_folder(run_folder):
    from_folder = checklist(read_run(run_folder))
    assert [row["item"] for row in from_folder] == list(ITEMS.values())
    rows = dict(zip(NAMES, from_folder, strict=True))
    assert rows["completed"]["passed"] is True
    assert "with the document's weights" in rows["epoch 1"]["measured"]
