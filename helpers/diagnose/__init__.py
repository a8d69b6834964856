"""Why a run detects nothing."""

from helpers.diagnose.diagnosis import diagnose
from helpers.diagnose.live_gates import overfit_one_batch
from helpers.diagnose.patient import Examination, LivePatient, open_patient
