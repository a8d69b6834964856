"""Settings of a training run that need less memory, the least loss first.

Every one sees the same number of images per optimiser step. Checkpointing changes no number, and a
smaller batch with more accumulation only what dropout draws; fewer absent prompts and a lower
resolution change what is learned.
"""

from __future__ import annotations

_MIN_SHARE_OF_RESOLUTION = 0.5


def ladder(config, shape):
    """List settings that need less and less memory, each on top of the one before.

    Parameters
    ----------
    config : helpers.config.Config
    shape : transformers.Sam3Config
        Of the base.

    Yields
    ------
    name : str
        What the setting changes, for a table.
    changes : dict
        ``section.key`` to value; empty for the config as it is.
    """
    training, changes = config.training, {}
    yield "as it is", {}
    if not training.gradient_checkpointing:
        changes["training.gradient_checkpointing"] = True
        yield "checkpointing", dict(changes)
    images = training.batch_size * training.gradient_accumulation_steps
    for size in range(training.batch_size - 1, 0, -1):
        if images % size == 0:
            changes["training.batch_size"] = size
            changes["training.gradient_accumulation_steps"] = images // size
            yield f"{size} x {images // size} images", dict(changes)
    negatives = config.data.num_negatives
    while negatives > 1:
        negatives //= 2
        changes["data.num_negatives"] = negatives
        yield f"{negatives} negatives", dict(changes)
    backbone = shape.vision_config.backbone_config
    window = backbone.patch_size * backbone.window_size  # a rest of a window would be padded
    largest = (config.model.resolution - 1) // window
    smallest = -(-config.model.resolution * _MIN_SHARE_OF_RESOLUTION // window)
    for multiple in range(largest, int(smallest) - 1, -1):
        changes["model.resolution"] = multiple * window
        yield f"{multiple * window} px", dict(changes)


def changed(config, changes):
    """Replace values of a config.

    Parameters
    ----------
    config : helpers.config.Config
    changes : dict
        ``section.key`` to value.

    Returns
    -------
    helpers.config.Config
    """
    sections = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    updates = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in sections.items()
    }
    return config.model_copy(update=updates)


def set_arguments(changes):
    """Write changes as arguments of the command line.

    Parameters
    ----------
    changes : dict
        ``section.key`` to value.

    Returns
    -------
    list of str
        For example ``["training.batch_size=1"]``, each to follow a ``--set``.
    """
    return [f"{name}={str(value).lower()}" for name, value in changes.items()]
