"""The folder of a training run: what is in it, and how it is loaded; see also `run_state`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from peft import PeftModel
from transformers import Sam3Processor

from helpers.adapters import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, load_adapter
from helpers.config import Config, load_config
from helpers.errors import InputError
from helpers.files import read_json
from helpers.paths import resolve
from helpers.prompts import absent_candidates, present_prompts
from helpers.sam3 import base_dtype, load_base
from helpers.trainer import CHECKPOINTS
from helpers.training_callbacks import CURVES_FILE

RUN_CONFIG = "config.yaml"
PROMPTS_FILE = "prompts.json"
METRICS_FILE = "metrics.json"
"""Written last: a folder that has it holds a finished run."""
AUDIT_FILE = "adapter_report.csv"
VERSIONS_FILE = "environment.json"
CARD_FILE = "README.md"
STOPPED_FILE = "stopped.json"
"""Why training stopped on its own; gone as soon as the run goes on or starts anew."""
RUN_FILES = (
    METRICS_FILE,
    RUN_CONFIG,
    PROMPTS_FILE,
    CURVES_FILE,
    AUDIT_FILE,
    VERSIONS_FILE,
    CARD_FILE,
    STOPPED_FILE,
    WEIGHTS_FILE,
    CONFIG_FILE,
    BASE_FILE,
)
_TRAIN_AGAIN = "train again with --overwrite"
_TRAIN_FIRST = "name the folder of a finished run, or train one with 'python -m helpers train'"


@dataclass
class RunFiles:
    """What a finished run wrote, without its model.

    Attributes
    ----------
    folder : pathlib.Path
        Holds ``adapter_model.safetensors``, ``adapter_config.json``, ``base.json``,
        ``config.yaml``, ``prompts.json``, ``metrics.json``, ``curves.csv``,
        ``adapter_report.csv``, ``environment.json``, ``README.md`` (the model card) and
        ``checkpoints/``.
    config : helpers.config.Config
        Resolved.
    prompts : dict
        ``prompts``: trained prompt to the number of images that show it; ``negatives``: absent
        prompt to the number of images it may be asked on; ``negatives_per_image``.
    metrics : dict
        ``steps``, ``epochs``, ``best_step``, ``selected_by``, ``valid`` (metrics of the kept
        checkpoint), ``train_loss`` and ``valid_loss`` (``first``, ``last``), ``objects``,
        ``data_fingerprint``, ``trained_parameters``, ``notes``; see `helpers.run_metrics`.
    history : list of dict
        The log, as ``trainer.state.log_history``.
    adapter : pandas.DataFrame
        `helpers.adapters.adapter_report` at the end; ``grad_norm`` is that of the first step.
    """

    folder: Path
    config: Config
    prompts: dict
    metrics: dict
    history: list
    adapter: pd.DataFrame


@dataclass
class RunResult(RunFiles):
    """A finished run in memory: its files and its model.

    Attributes
    ----------
    model : peft.PeftModel
        With the kept checkpoint, in eval mode.
    processor : transformers.Sam3Processor
        Set to the resolution of the config.
    """

    model: PeftModel
    processor: Sam3Processor


def read_run(folder):
    """Read what a finished run wrote, without loading a model.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.

    Returns
    -------
    RunFiles

    Raises
    ------
    InputError
        If the folder is missing, or holds no run, an unfinished one or a damaged one.
    """
    folder = resolve(folder)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, fix=_TRAIN_FIRST)
    if not (folder / METRICS_FILE).is_file():
        if (folder / STOPPED_FILE).is_file():
            stopped = read_json(folder / STOPPED_FILE, fix=_TRAIN_AGAIN)
            raise InputError(
                f"the run was stopped: {stopped['message']}", where=folder, fix=stopped["fix"]
            )
        if (folder / RUN_CONFIG).is_file():
            raise InputError(
                "the run was interrupted and has no adapter yet",
                where=folder,
                fix="continue it with 'python -m helpers train ... --resume'",
            )
        raise InputError(f"holds no {METRICS_FILE}", where=folder, fix=_TRAIN_FIRST)
    return RunFiles(
        folder=folder,
        config=load_config(folder / RUN_CONFIG),
        prompts=read_json(folder / PROMPTS_FILE, fix=_TRAIN_AGAIN),
        metrics=read_json(folder / METRICS_FILE, fix=_TRAIN_AGAIN),
        history=read_history(folder),
        adapter=_read_table(folder / AUDIT_FILE).set_index("component"),
    )


def load_run(folder, base=None, dtype=None):
    """Load a finished run with its base.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.
    base : str, optional
        Another place of the base than the config names.
    dtype : torch.dtype, optional
        Type of the base's weights; by default the one it was trained with.

    Returns
    -------
    RunResult

    Raises
    ------
    InputError
        See `read_run`; also if the base is not the one the run was trained on.
    """
    files = read_run(folder)
    settings = files.config.model
    model, processor = load_base(
        base or settings.name,
        revision=None if base else settings.revision,
        dtype=dtype or base_dtype(files.config.training.mixed_precision),
        resolution=settings.resolution,
    )
    return RunResult(**vars(files), model=load_adapter(model, files.folder), processor=processor)


def read_history(folder):
    """Read ``curves.csv`` back into a log.

    Parameters
    ----------
    folder : os.PathLike
        Run folder.

    Returns
    -------
    list of dict
        One dict per entry, without the names it did not log.
    """
    table = _read_table(Path(folder) / CURVES_FILE)
    table = table.astype({"step": int})
    return [
        {name: value for name, value in row.items() if not pd.isna(value)}
        for row in table.to_dict(orient="records")
    ]


def last_checkpoint(folder):
    """Find the newest checkpoint that was written completely.

    A kill while saving leaves a folder without, or with half of, ``trainer_state.json``, which is
    written last.

    Parameters
    ----------
    folder : pathlib.Path
        Run folder.

    Returns
    -------
    pathlib.Path or None
    """
    found = (folder / CHECKPOINTS).glob("checkpoint-*")
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            read_json(path / "trainer_state.json", fix="")
        except InputError:
            continue
        return path
    return None


def trained_prompts(dataset):
    """List what a training run asks, for the comparison with what is asked of it later.

    Parameters
    ----------
    dataset : helpers.datasets.PromptDataset

    Returns
    -------
    dict
        See `RunResult.prompts`.
    """
    present, absent = Counter(), Counter()
    for record in dataset.records:
        asked = present_prompts(record, dataset.split.categories, dataset.prompt)
        present.update(asked.keys())
        nouns = dataset.own_names
        if dataset.num_negatives:
            nouns = (*nouns, *dataset.negative_prompts)
        if dataset.num_negatives or not record.objects:
            absent.update(set(absent_candidates(record, nouns)) - set(asked))
    return {
        "prompts": dict(sorted(present.items())),
        "negatives": dict(sorted(absent.items())),
        "negatives_per_image": dataset.num_negatives,
    }


def _read_table(path):
    """Read a CSV file of a run."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=path, fix=_TRAIN_AGAIN) from error
