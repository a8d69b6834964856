"""How many prompts and objects the images of a run bring, counted without opening an image."""

from __future__ import annotations

from typing import NamedTuple

from helpers.config_data import read_config_split
from helpers.datasets import PromptDataset
from helpers.errors import InputError
from helpers.prompts import absent_candidates, present_prompts

_OBJECTS_WITHOUT_DATA = 5  # of a prompt; the peak of the full model is the same with 3 and with 30


class PromptCounts(NamedTuple):
    """Numbers of one training split, and of the validation beside it.

    Attributes
    ----------
    source : str
        Where they come from.
    train_images, val_images : int or None
        None where the data cannot be read.
    mean_prompts : float
        Per training image.
    max_prompts, max_present : int
        The most of an image, absent ones included, and of present ones.
    max_objects : int
        The most that one prompt has.
    val_prompts : int
        The most that validation asks about an image.
    """

    source: str
    train_images: int | None
    val_images: int | None
    mean_prompts: float
    max_prompts: int
    max_present: int
    max_objects: int
    val_prompts: int


def count_prompts(config):
    """Count the prompts of a run, from its data if there is any to read, else from its config.

    Parameters
    ----------
    config : helpers.config.Config

    Returns
    -------
    PromptCounts

    Raises
    ------
    InputError
        If the dataset is there, but gives no query to train on.
    """
    data = config.data
    try:
        train, valid = (
            read_config_split(config, split) for split in (data.train_split, data.val_split)
        )
    except InputError as error:
        prompts = 1 + data.num_negatives
        return PromptCounts(
            source=f"the config, one present prompt per image ({error.where}: {error.message})",
            train_images=None,
            val_images=None,
            mean_prompts=float(prompts),
            max_prompts=prompts,
            max_present=1,
            max_objects=_OBJECTS_WITHOUT_DATA,
            val_prompts=1 + len(config.evaluation.absent_prompts),
        )
    dataset = PromptDataset(
        train,
        None,  # no image is opened
        resolution=config.model.resolution,
        mask_size=1,
        prompt=data.prompt,
        num_negatives=data.num_negatives,
        negative_prompts=data.negative_prompts,
        seed=config.training.seed,
    )
    present = [present_prompts(one, train.categories, data.prompt) for one in dataset.records]
    prompts = [
        len(asked) + _num_absent(dataset, record, asked)
        for record, asked in zip(dataset.records, present, strict=True)
    ]
    return PromptCounts(
        source=str(train.root),
        train_images=len(dataset),
        val_images=len(valid.records),
        mean_prompts=sum(prompts) / len(prompts),
        max_prompts=max(prompts),
        max_present=max(map(len, present)),
        max_objects=max((len(n) for asked in present for n in asked.values()), default=0),
        val_prompts=len(dataset.own_names) + len(config.evaluation.absent_prompts),
    )


def _num_absent(dataset, record, present):
    """Count the absent prompts that are drawn for an image, as many in every epoch."""
    replaced = dataset.prompt is not None and record.objects
    nouns = dataset.negative_prompts if replaced else dataset.nouns
    wanted = dataset.num_negatives if record.objects else max(dataset.num_negatives, 1)
    return min(wanted, len(set(absent_candidates(record, nouns)) - set(present)))
