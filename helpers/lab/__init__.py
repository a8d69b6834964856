"""Planted faults, patients and the statistics of an experiment."""

from helpers.lab.clinic import Clinic, signs_table
from helpers.lab.faults import LESSON_FAULTS
from helpers.lab.spoil import read_split_wrong_keys, write_broken_copy, write_copy
from helpers.lab.statistics import (
    confusion_figure,
    effect_table,
    effects_figure,
    levels_figure,
    main_effects,
    paired_difference,
    score,
    steps_table,
    word_effects,
)
