"""Why a run detects nothing."""

from helpers.diagnose.diagnosis import diagnose
from helpers.diagnose.examination import Examination
