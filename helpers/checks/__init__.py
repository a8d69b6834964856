"""What is wrong with a dataset."""

from helpers.checks.dataset import check_dataset
from helpers.checks.findings import CODES
from helpers.checks.words import check_categories
