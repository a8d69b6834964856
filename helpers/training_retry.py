"""Train again with less memory when memory runs out."""

from __future__ import annotations

import gc

import torch

from helpers.errors import InputError
from helpers.paths import resolve
from helpers.plan_ladder import changed, ladder, set_arguments
from helpers.run_folder import last_checkpoint
from helpers.run_state import num_processes
from helpers.sam3 import base_config
from helpers.training import OutOfMemory, train


def train_within_memory(config, *, on_retry=None, output_dir=None, overwrite=False, **options):
    """Train; if memory runs out before the first checkpoint, start again with a smaller step.

    First activations are checkpointed, then the batch gets smaller and accumulation longer, so that
    an optimiser step sees the same number of images. What is learned from is never changed.

    Parameters
    ----------
    config : helpers.config.Config
    on_retry : callable, optional
        Called with a sentence before each new attempt.
    output_dir, overwrite, **options
        See `helpers.training.train`.

    Returns
    -------
    helpers.run_folder.RunResult
        Its ``config`` is the one that fitted.

    Raises
    ------
    InputError
        See `helpers.training.train`. An `OutOfMemory` if nothing smaller is left, if a checkpoint
        would be lost, or with several processes, of which the others would wait for ever.
    """
    while True:
        try:
            return train(config, output_dir=output_dir, overwrite=overwrite, **options)
        except OutOfMemory as error:
            smaller = smaller_step(config)
            folder = resolve(output_dir or config.output.output_dir)
            if smaller is None or num_processes() > 1 or last_checkpoint(folder) is not None:
                raise
            message = error.message
        gc.collect()  # the failed attempt's model; its frames are gone only now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if on_retry is not None:
            on_retry(f"{message}; trying again with {' '.join(set_arguments(smaller))}")
        config, overwrite = changed(config, smaller), True


def smaller_step(config):
    """Return the next change that needs less memory and leaves what is learned as it is.

    Parameters
    ----------
    config : helpers.config.Config

    Returns
    -------
    dict or None
        ``section.key`` to value, all in ``training``; None if there is none.
    """
    try:
        shape = base_config(config.model.name, config.model.revision)
    except InputError:
        return None
    for _, changes in ladder(config, shape):
        if changes and all(name.startswith("training.") for name in changes):
            return changes
    return None
