"""Gates: the questions that are asked of a patient, and what becomes of each."""

from collections.abc import Callable
from dataclasses import dataclass

from helpers.diagnose.patient import Examination as Examination
from helpers.diagnose.patient import Inapplicable, Missing
from helpers.errors import InputError

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
NOT_APPLICABLE, CRASHED = "not applicable", "crashed"
UNDECIDED = (NOT_CHECKED, CRASHED)  # nobody knows whether the run is healthy
LEAST_CONFIDENCE = 0.5  # evidence below is shown with its gate but names no cause
SLIP = 0.4  # confidence of such evidence


@dataclass(frozen=True)
class Evidence:
    """A measurement that speaks for a cause."""

    cause: str
    confidence: float  # in (0, 1], and 1.0 only for what was counted or computed
    text: str
    is_direct: bool = True  # False for a behaviour of the model that an earlier cause may explain


def evidence_if(is_fault, cause, confidence, text, is_direct=True):
    """Return a list with one `Evidence`, empty if there is no fault."""
    return [Evidence(cause, confidence, text, is_direct)] if is_fault else []


@dataclass(frozen=True)
class Gate:
    """One question, a function of a `Patient` that returns a text and a list of `Evidence`.

    It raises `Inapplicable` if it does not apply, `Missing` for a part that the patient does not
    offer, and another `InputError` if what it needs cannot be read.
    """

    name: str
    expected: str  # of a healthy run
    examine: Callable


def gate(gates, name, expected):
    """Return a decorator that appends a function to a list of gates."""

    def append(examine):
        gates.append(Gate(name, expected, examine))
        return examine

    return append


@dataclass(frozen=True)
class GateResult:
    """What became of a gate."""

    name: str
    status: str  # one of the five above
    measured: str
    expected: str
    evidence: tuple[Evidence, ...] = ()
    needs: str | None = None  # the part of the patient that is missing, a key of `NEEDS`

    def to_json(self):
        """Return the texts as a dict."""
        return {key: value for key, value in vars(self).items() if key != "evidence"}


def pass_gate(gate, examination):
    """Ask one gate and return a `GateResult`; whatever the gate raises is a result too."""
    try:
        measured, evidence = gate.examine(examination)
    except Inapplicable as error:
        return GateResult(gate.name, NOT_APPLICABLE, str(error), gate.expected)
    except InputError as error:
        needs = error.part if isinstance(error, Missing) else None
        return GateResult(gate.name, NOT_CHECKED, str(error), gate.expected, needs=needs)
    except Exception as error:  # a pipeline that raises here is part of what is examined
        text = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        return GateResult(gate.name, CRASHED, text, gate.expected)
    status = FAILED if any(item.confidence >= LEAST_CONFIDENCE for item in evidence) else OK
    return GateResult(gate.name, status, measured, gate.expected, tuple(evidence))
