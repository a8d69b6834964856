"""Planted faults, patients and the controlled experiment."""

from helpers.lab.clinic import Clinic, queries_of, signs_table
from helpers.lab.experiment import FACTORS, SUSPECTS, TABLES, cells_of, run_cell
from helpers.lab.faults import LESSON_FAULTS
from helpers.lab.spoil import read_split_wrong_keys, write_broken_copy, write_copy
from helpers.lab.statistics import (
    confusion_figure,
    effect_table,
    effects_figure,
    front_figure,
    levels_figure,
    load_base_row,
    load_table,
    main_effects,
    paired_difference,
    score,
    steps_table,
    tables_folder,
    word_effects,
)
