"""The prompt bench: what it asks once, what it answers to a bad word, and its heat map."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.data import read_split
from helpers.detect import Predictor
from helpers.errors import InputError
from helpers.show.page import WIDGET_STILL_TEXT
from notebooks.prompt_bench import (
    MODELS,
    NOTHING,
    PromptBench,
    matrix_figure,
    matrix_sentence,
)


@pytest.fixture(scope="module")
def test_split(data_dir):
    return read_split(data_dir, "test")


@pytest.fixture
def bench(run, test_split):
    words = {"trained": ["crack", "joint"], "score_threshold": 0.1}
    return PromptBench(run.model, run.processor, test_split, **words)
