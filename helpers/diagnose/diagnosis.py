"""Why does this run detect nothing? Gates from cheap to costly, then causes by rank.

Nothing here judges by raw numbers alone: a query logit of -10 is normal for most queries of a
healthy detector. What the model says is compared with what the base says to the same question.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from helpers.causes import CAUSES, STAGES
from helpers.diagnose.adapter_gates import BASE_GATES, CHECKPOINT_GATES
from helpers.diagnose.answer_gates import BEHAVIOUR_GATES
from helpers.diagnose.data_gates import DATA_GATES, PROMPT_GATES
from helpers.diagnose.examination import (
    FAILED,
    LEAST_CONFIDENCE,
    UNDECIDED,
    Examination,
    GateResult,
    pass_gate,
)
from helpers.diagnose.run_gates import CONFIG_GATES, FILE_GATES, RUN_GATES
from helpers.files import progress_bar

GATES = (
    *FILE_GATES,
    *DATA_GATES,
    *PROMPT_GATES,
    *CONFIG_GATES,
    *RUN_GATES,
    *BASE_GATES,
    *CHECKPOINT_GATES,
    *BEHAVIOUR_GATES,
)
"""In the order in which they are asked, from cheap to costly."""
OBSERVED = 0.8  # confidence from which a cause counts as observed, if its evidence is direct
EXPLAINED = 0.5  # factor on a behaviour that an earlier, observed cause may explain
_VERDICTS = {
    "healthy": "no cause found: the run looks healthy",
    "causes": "causes found: see above, the most likely first",
    "undecided": "no cause found, but the gates above were left open: the run may not be healthy",
}


@dataclass(frozen=True)
class FoundCause:
    """A cause named by the diagnosis."""

    code: str  # key of `helpers.causes.CAUSES`
    title: str
    confidence: float  # in [0.5, 1]
    evidence: tuple[str, ...]  # the strongest first
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` says about a run."""

    causes: tuple[FoundCause, ...]  # the most likely first
    gates: tuple[GateResult, ...]  # every gate with what it measured

    @property
    def open_gates(self):
        """The gates that could not be checked, or crashed."""
        return tuple(gate for gate in self.gates if gate.status in UNDECIDED)

    @property
    def verdict(self):
        """One of "healthy", "causes", "undecided"; healthy only if no gate was left open."""
        if self.causes:
            return "causes"
        return "undecided" if self.open_gates else "healthy"

    def to_json(self):
        """Return ``{"healthy", "verdict", "causes", "gates"}`` of plain values."""
        return {
            "healthy": self.verdict == "healthy",
            "verdict": self.verdict,
            "causes": [asdict(cause) for cause in self.causes],
            "gates": [gate.to_json() for gate in self.gates],
        }

    def summary(self):
        """Return the diagnosis as text: gates, causes with evidence and fix, what was left open."""
        lines = []
        for gate in self.gates:
            lines.append(f"{gate.status:<16}{gate.name}: {gate.measured}")
            if gate.status == FAILED:
                lines.append(f"{'':<16}expected: {gate.expected}")
        lines.append("")
        for number, cause in enumerate(self.causes, start=1):
            lines.append(f"{number}. {cause.title} [{cause.code}]")
            lines.append(f"   confidence {cause.confidence:.2f}")
            lines += [f"   evidence: {text}" for text in cause.evidence]
            lines.append(f"   fix: {cause.fix}")
        counts = Counter(gate.status for gate in self.gates)
        numbers = ", ".join(f"{count} {status}" for status, count in counts.most_common())
        lines.append(f"{len(self.gates)} gates: {numbers}")
        lines += [f"{gate.status}: {gate.name} ({gate.measured})" for gate in self.open_gates]
        return "\n".join([*lines, _VERDICTS[self.verdict]])


def diagnose(folder, *, data_dir=None, image=None, prompt=None, progress=False):
    """Examine a run and name the causes of what is wrong with it.

    Parameters
    ----------
    folder : os.PathLike
        Run folder; an interrupted run is examined as far as it goes.
    data_dir, image, prompt : optional
        Another dataset, a picture and a word to ask about it, see `Examination`.
    progress : bool
        Show the gate at work on stderr.

    Returns
    -------
    Diagnosis
        ``causes``, the most likely first, ``gates`` with what each measured, and ``verdict``.
    """
    examination = Examination(folder, data_dir, image, prompt)
    results = []
    with progress_bar(len(GATES), "diagnose", "gate", disable=not progress) as bar:
        for gate in GATES:
            bar.set_postfix_str(gate.name)
            results.append(pass_gate(gate, examination))
            bar.update()
    return Diagnosis(rank(results), tuple(results))


def rank(results):
    """Turn the evidence of all gate results into a tuple of `FoundCause`, the most likely first.

    A cause is as likely as its strongest evidence. Between equals, the earlier stage comes first.
    """
    evidence = [item for result in results for item in result.evidence]
    observed = [_stage(e) for e in evidence if e.is_direct and e.confidence >= OBSERVED]
    first = min(observed, default=len(STAGES))
    by_cause = {}
    for item in evidence:
        weight = EXPLAINED if not item.is_direct and _stage(item) >= first else 1.0
        by_cause.setdefault(item.cause, []).append((item.confidence * weight, item.text))
    causes = []
    for code, cause in CAUSES.items():
        weighted = sorted(by_cause.get(code, []), key=lambda pair: -pair[0])
        if weighted and weighted[0][0] >= LEAST_CONFIDENCE:
            texts = tuple(text for _, text in weighted)
            causes.append(FoundCause(code, cause.title, round(weighted[0][0], 3), texts, cause.fix))
    return tuple(sorted(causes, key=lambda cause: -round(cause.confidence, 1)))


def _stage(evidence):
    return STAGES.index(CAUSES[evidence.cause].stage)
