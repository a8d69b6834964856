"""When a run folder may be written: anew, over an old run, or on from where one stopped."""

from __future__ import annotations

import os
import shutil

from helpers.config import load_config
from helpers.errors import InputError
from helpers.files import read_json
from helpers.run_folder import METRICS_FILE, RUN_CONFIG, RUN_FILES, VERSIONS_FILE
from helpers.trainer import CHECKPOINTS

_MAY_CHANGE = {
    ("training", "batch_size"),
    ("training", "gradient_accumulation_steps"),
    ("training", "gradient_checkpointing"),
    ("training", "feature_cache"),
    ("training", "num_workers"),
}
"""Keys that change how a step is computed, not what; the number of its images is compared."""


def num_processes():
    """Return how many processes train together, as ``accelerate launch`` and torchrun tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_of(folder, config, *, resume, overwrite):
    """Decide what to do with a run folder before anything is written.

    Parameters
    ----------
    folder : pathlib.Path
    config : helpers.config.Config
        Of the run that is about to start.
    resume, overwrite : bool
        What the user asked for.

    Returns
    -------
    {"new", "interrupted", "finished"}
        ``new`` also for a run that is to be replaced.

    Raises
    ------
    InputError
        If the folder holds a run and neither was asked for, if there is nothing to resume, or if
        the run to resume had another configuration.
    """
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other", fix="choose one")
    if folder.is_file():
        raise InputError("is a file, not a folder", where=folder, fix="choose another output")
    holds_run = any((folder / name).exists() for name in (*RUN_FILES, CHECKPOINTS))
    if resume:
        if not (folder / RUN_CONFIG).is_file():
            raise InputError(
                "holds no run to resume", where=folder, fix="start it without --resume"
            )
        _refuse_other_config(folder, config)
        return "finished" if (folder / METRICS_FILE).is_file() else "interrupted"
    if holds_run and not overwrite:
        raise InputError(
            "already holds a run",
            where=folder,
            fix="choose another output, continue it with --resume, or replace it with --overwrite",
        )
    return "new"


def clear_run(folder):
    """Remove the files of a run from its folder, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _refuse_other_config(folder, config):
    """Raise InputError if a run is to be resumed with other settings.

    Batch size, accumulation and the number of processes may change if the images of a step stay the
    same in number: checkpoints are written between epochs, and the gradient does not depend on how
    a step is spread.
    """
    before = load_config(folder / RUN_CONFIG).model_dump()
    now = config.model_dump()
    started = read_json(folder / VERSIONS_FILE, fix="start a new run").get("num_processes", 1)
    images_per_step = [
        one["training"]["batch_size"] * one["training"]["gradient_accumulation_steps"] * processes
        for one, processes in ((before, started), (now, num_processes()))
    ]
    differing = [
        f"{section}.{key} was {before[section][key]!r} and is {value!r}"
        for section, keys in now.items()
        for key, value in keys.items()
        if section not in ("guards", "output")
        and (section, key) not in _MAY_CHANGE
        and not (key == "revision" and value is None)  # the run has written down which it took
        and before[section][key] != value
    ]
    if images_per_step[0] != images_per_step[1]:
        differing.append(
            "batch_size x gradient_accumulation_steps x processes was {} and is {}".format(
                *images_per_step
            )
        )
    if differing:
        raise InputError(
            f"the run to resume had another configuration: {'; '.join(differing)}",
            where=folder,
            fix="resume with the settings it was started with, or start a new run",
        )
