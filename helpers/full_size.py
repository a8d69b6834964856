"""A base of the full size with random weights: all of SAM3 but what it learned, with no download."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Sam3Config, Sam3Model, Sam3Processor

from helpers.files import staged_folder
from helpers.paths import TINY_BASE, resolve

NUM_PARAMETERS = 840_376_374


def write_random_base(folder, seed=0):
    """Write a base with the architecture of ``facebook/sam3`` and random weights.

    Time and memory of a step do not depend on the values of the weights, so they can be measured on
    it. It detects nothing. The tokenizer is that of the embedded base, whose ids are all valid.

    Parameters
    ----------
    folder : os.PathLike
        Gets 1.7 GB, in bfloat16; `helpers.sam3.load_base` reads it.
    seed : int
        For the weights.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Sam3Model(Sam3Config())
    finally:
        torch.set_default_dtype(default)
    with staged_folder(folder) as staging:
        model.save_pretrained(staging)
        processor = Sam3Processor.from_pretrained(TINY_BASE)
        processor.save_pretrained(staging)
    return folder


if __name__ == "__main__":
    print(write_random_base(resolve(sys.argv[1])))
