"""A dataset as a config says it: its splits with the nouns they are asked by, and its check."""

from __future__ import annotations

from helpers.annotations import read_split
from helpers.category_prompts import rename_categories
from helpers.data_checks import check_dataset


def read_config_split(config, name, data_dir=None):
    """Read a split with the nouns that its categories are asked by.

    Parameters
    ----------
    config : helpers.config.Config
        For ``data.data_dir`` and ``data.prompts_by_category``.
    name : str
        Name of the split.
    data_dir : os.PathLike, optional
        Another dataset.

    Returns
    -------
    helpers.records.Split
        See `helpers.category_prompts.rename_categories`.

    Raises
    ------
    InputError
        See `helpers.annotations.read_split`.
    """
    data = config.data
    split = read_split(data.data_dir if data_dir is None else data_dir, name)
    return rename_categories(split, data.prompts_by_category)


def check_config_data(config, model=None, processor=None, *, data_dir=None, disable_progress=False):
    """Check the dataset of a config with the prompts, nouns and sizes that its training uses.

    Parameters
    ----------
    config : helpers.config.Config
    model : helpers.prompted_sam3.PromptedSam3, optional
        Its base. Without it the sizes are those of a SAM3 at ``model.resolution``.
    processor : transformers.Sam3Processor, optional
        Of the base, see `helpers.data_checks.check_dataset`.
    data_dir : os.PathLike, optional
        Another dataset.
    disable_progress : bool
        True for no progress bar on stderr.

    Returns
    -------
    helpers.findings.Report

    Raises
    ------
    InputError
        See `helpers.data_checks.check_dataset`.
    """
    data = config.data
    sizes = {
        "resolution": config.model.resolution,
        "mask_size": config.model.resolution // 14 * 4,
    }
    if model is not None:
        num_queries = model.config.detr_decoder_config.num_queries
        sizes = {"resolution": model.resolution, "mask_size": model.mask_size}
        sizes |= {"num_queries": num_queries}
    return check_dataset(
        data.data_dir if data_dir is None else data_dir,
        **sizes,
        processor=processor,
        prompt=data.prompt,
        prompts_by_category=data.prompts_by_category,
        num_negatives=data.num_negatives,
        negative_prompts=data.negative_prompts,
        disable_progress=disable_progress,
    )
