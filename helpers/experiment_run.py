"""One run of the experiment: train a cell, judge it, and return its row of the table."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import torch

from helpers.annotations import read_split
from helpers.evaluation import coco_ap, evaluate_queries
from helpers.paths import ROOT
from helpers.prediction import Predictor
from helpers.prediction_queries import predict_split
from helpers.sam3 import load_base
from helpers.tiny_score import detection_queries
from helpers.training import train
from helpers.wrong_reader import read_split_wrong_keys

RETENTION_WALLS = 32
_OF_EVALUATION = {
    "detected_share": "max_score_present_share_above",
    "max_score": "max_score_present",
    "AP50": "AP50",
    "union_iou": "union_iou",
    "cgF1": "cgF1",
    "IL_MCC": "IL_MCC",
    "false_positive_rate": "max_score_absent_share_above",
}
RESPONSES = (*_OF_EVALUATION, "presence_prob", "max_query_prob", "retention_AP", "retention_AP50")
"""What is measured on the test split and, for retention, on walls with the base's own concepts."""


def run_cell(cell, profile, data_dir, folder):
    """Train and judge one cell.

    Parameters
    ----------
    cell : helpers.experiment_designs.Cell
    profile : str
    data_dir : os.PathLike
    folder : pathlib.Path
        Gets the run.

    Returns
    -------
    dict
        Factors, seed, `RESPONSES`, ``final_loss`` (of the last logged step), ``parameters`` (of
        LoRA), ``steps``, ``seconds``, ``config_hash``, ``code_version``, ``profile``.
    """
    started = time.perf_counter()
    config = cell.config(profile, data_dir)
    read = read_split if cell.objects_read else read_split_wrong_keys
    result = train(
        config,
        output_dir=folder,
        overwrite=True,
        train_split=read(data_dir, config.data.train_split),
        val_split=read(data_dir, config.data.val_split),
        allow_empty=not cell.objects_read,
        progress=False,
    )
    row = {"design": cell.design, **cell.factors, "seed": cell.seed}
    row |= judge(result.model, result.processor, config, data_dir)
    row |= {
        "final_loss": result.metrics["train_loss"]["last"],
        "parameters": int(result.adapter.loc["total", "parameters"]),
        "rank": config.lora.rank,
        "steps": result.metrics["steps"],
        "seconds": round(time.perf_counter() - started, 1),
        "profile": profile,
        "config_hash": config.fingerprint(),
        "code_version": code_version(),
    }
    return row


def judge(model, processor, config, data_dir):
    """Measure the responses of one model, the same questions for every model.

    Parameters
    ----------
    model : helpers.sam3.PromptedSam3 or peft.PeftModel
    processor : transformers.Sam3Processor
    config : helpers.config.Config
        Its absent prompts and thresholds are used; the prompts are the category names, whatever
        was asked in training.
    data_dir : os.PathLike

    Returns
    -------
    dict of str to float
        `RESPONSES`.
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = config.evaluation
    queries = predict_split(
        model,
        processor,
        read_split(data_dir, "test"),
        absent_prompts=settings.absent_prompts,
        mask_threshold=settings.mask_threshold,
    )
    metrics = evaluate_queries(queries, settings.score_threshold)
    row = {name: metrics[source] for name, source in _OF_EVALUATION.items()}
    present = [query for query in queries if query["gt"]]
    for name in ("presence_prob", "max_query_prob"):
        row[name] = sum(query[name] for query in present) / len(present)
    retention = coco_ap(detection_queries(Predictor(model, processor), RETENTION_WALLS, True))
    return row | {f"retention_{name}": retention[name] for name in ("AP", "AP50")}


def run_base(cell, profile, data_dir):
    """Judge the base without any adapter by the questions of a cell.

    Parameters
    ----------
    cell, profile, data_dir
        See `run_cell`.

    Returns
    -------
    dict
        `RESPONSES` and the columns that say what was measured.
    """
    config = cell.config(profile, data_dir)
    settings = config.model
    model, processor = load_base(settings.name, settings.revision, resolution=settings.resolution)
    row = judge(model, processor, config, data_dir)
    return row | {"profile": profile, "code_version": code_version()}


def code_version():
    """Return the commit the code is at, with ``-dirty`` if files differ from it.

    Returns
    -------
    str
        ``unknown`` outside a git checkout.
    """
    if not (Path(ROOT) / ".git").exists():
        return "unknown"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"
