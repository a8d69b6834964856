"""Why does this run detect nothing? Gates from cheap to costly, then causes by rank.

Nothing here judges by raw numbers alone: a query logit of -10 is normal for most queries of a
healthy detector. What the model says is compared with what the base says to the same question.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from helpers.answers import answer_text
from helpers.causes import CAUSES, STAGES
from helpers.diagnose import answer_gates, data_gates, live_gates, run_gates
from helpers.diagnose.patient import NEEDS, Evidence, Inapplicable, Patient, open_patient
from helpers.errors import InputError
from helpers.files import progress_bar
from helpers.show.page import render_page

GATES = (
    *run_gates.FILE_GATES,
    *data_gates.DATA_GATES,
    *data_gates.PROMPT_GATES,
    *run_gates.CONFIG_GATES,
    *run_gates.LOG_GATES,
    *run_gates.RUN_GATES,
    *live_gates.LOSS_GATES,
    *run_gates.BASE_GATES,
    *run_gates.CHECKPOINT_GATES,
    *answer_gates.BEHAVIOUR_GATES,
    *live_gates.DETECT_GATES,
)
"""In the order in which they are asked, from cheap to costly."""
OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
NOT_APPLICABLE, CRASHED = "not applicable", "crashed"
UNDECIDED = (NOT_CHECKED, CRASHED)  # nobody knows whether the run is healthy
LEAST_CONFIDENCE = 0.5  # evidence below is shown with its gate but names no cause
OBSERVED = 0.8  # confidence from which a cause counts as observed, if its evidence is direct
EXPLAINED = 0.5  # factor on a behaviour that an earlier, observed cause may explain
DECISIVE = "words in the picture"  # gate without whose answer no run is called healthy


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
    evidence, needs = (), None
    try:
        measured, evidence = gate.examine(examination)
        status = FAILED if any(item.confidence >= LEAST_CONFIDENCE for item in evidence) else OK
    except InputError as error:
        measured, needs = str(error), getattr(error, "part", None)  # of a `Missing`
        status = NOT_APPLICABLE if isinstance(error, Inapplicable) else NOT_CHECKED
    except Exception as error:  # a pipeline that raises here is part of what is examined
        measured = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        status = CRASHED
    return GateResult(gate.name, status, measured, gate.expected, tuple(evidence), needs)


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
    is_live: bool = False  # whether the patient was given as objects

    @property
    def open_gates(self):
        """The gates that could not be checked, or crashed."""
        return tuple(gate for gate in self.gates if gate.status in UNDECIDED)

    @property
    def verdict(self):
        """One of "healthy", "causes", "undecided"; healthy only if nothing decisive was left open."""
        if self.causes:
            return "causes"
        is_open = any(gate.needs is None or gate.name == DECISIVE for gate in self.open_gates)
        return "undecided" if is_open else "healthy"

    @property
    def asked(self):
        """How many gates were asked and gave an answer."""
        return sum(gate.status in (OK, FAILED) for gate in self.gates)

    @property
    def needs(self):
        """What would open more gates, the cheapest first: text with the number of gates."""
        counts = Counter(gate.needs for gate in self.open_gates)
        return [
            f"{name}, with {argument if self.is_live else option} (gates opened: {counts[part]})"
            for part, (name, option, argument) in NEEDS.items()
            if counts[part]
        ]

    def to_json(self):
        """Return all of it as plain values, ready for `json.dumps`; ``counts`` is by status."""
        return {
            "healthy": self.verdict == "healthy",
            "verdict": self.verdict,
            "causes": [asdict(cause) for cause in self.causes],
            "gates": [gate.to_json() for gate in self.gates],
            "asked": self.asked,
            "counts": dict(Counter(gate.status for gate in self.gates).most_common()),
            "needs": self.needs,
        }

    def summary(self):
        """Return the diagnosis as text: gates, causes with evidence and fix, what was left open."""
        return answer_text("diagnose", self.to_json())

    def ending(self):
        """Return lines: how many gates were asked, why others were not, and the verdict."""
        return answer_text("ending", self.to_json()).split("\n")

    def to_html(self):
        """Return the diagnosis as one page that needs no other file."""
        return render_page("diagnosis", **self.parts())

    def parts(self):
        """Return what a template needs to show this diagnosis."""
        return {"causes": self.causes, "gates": self.gates, "ending": self.ending()}


def diagnose(source, *, progress=False, **given):
    """Examine a run, whoever trained it, and name the causes of what is wrong with it.

    Parameters
    ----------
    source : os.PathLike or Patient
        What `open_patient` recognises, such as a run folder, also of an interrupted run; or a
        `LivePatient`.
    progress : bool
        Show the gate at work on stderr.
    **given
        ``data_dir``, ``image``, ``prompt`` and more of `open_patient`.

    Returns
    -------
    Diagnosis
        ``causes``, the most likely first, ``gates`` with what each measured, and ``verdict``.
    """
    patient = source if isinstance(source, Patient) else open_patient(source, **given)
    results = []
    with (
        patient.at_rest(),
        progress_bar(len(GATES), "diagnose", "gate", disable=not progress) as bar,
    ):
        for gate in GATES:
            bar.set_postfix_str(gate.name)
            results.append(pass_gate(gate, patient))
            bar.update()
    return Diagnosis(rank(results), tuple(results), patient.is_live)


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
