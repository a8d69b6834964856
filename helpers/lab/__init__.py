"""Faults planted on purpose, and patients to cure."""

from helpers.lab.careless import Careless
from helpers.lab.faults import LESSON_FAULTS
from helpers.lab.spoil import read_split_wrong_keys
