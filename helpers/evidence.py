"""What a gate of the diagnosis measures, and the evidence it gives for causes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"


@dataclass(frozen=True)
class Evidence:
    """A measurement that speaks for a cause.

    Attributes
    ----------
    cause : str
        Key of `helpers.causes.CAUSES`.
    confidence : float
        In (0, 1]; 1.0 only for what was counted or computed, not inferred.
    text : str
        The numbers, in one sentence.
    is_direct : bool
        True if the cause itself was observed (a count, a self-test of the code); False if only a
        behaviour of the model was, which an earlier cause may explain.
    """

    cause: str
    confidence: float
    text: str
    is_direct: bool = True


@dataclass(frozen=True)
class Gate:
    """One question of the diagnosis.

    Attributes
    ----------
    name : str
        The question's subject, a few words.
    expected : str
        What a healthy run shows.
    examine : callable
        Takes a `helpers.examination.Examination`, returns ``(measured, evidence)``: a text with the
        numbers, and a list of `Evidence`, empty if all is well. It raises
        `helpers.errors.InputError` with the reason if it cannot be asked of this run.
    """

    name: str
    expected: str
    examine: Callable


@dataclass(frozen=True)
class GateResult:
    """What became of a gate: its name, ``status`` (ok, failed, not checked), what it measured."""

    name: str
    status: str
    measured: str
    expected: str
    evidence: tuple[Evidence, ...] = ()

    def to_json(self):
        """Return the four texts as a dict."""
        return {
            "name": self.name,
            "status": self.status,
            "measured": self.measured,
            "expected": self.expected,
        }
