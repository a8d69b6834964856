"""Why a run detects nothing."""

from helpers.diagnose.diagnosis import diagnose
from helpers.diagnose.patient import Examination, LivePatient, open_patient
