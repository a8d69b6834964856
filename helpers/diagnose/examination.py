"""A run under examination, and the gates: questions that are asked of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from helpers.data.dataset import PromptCollator, PromptDataset, load_dataset
from helpers.detect.predictor import Predictor
from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.lora import WEIGHTS_FILE, check_tensors, read_adapter_weights
from helpers.model.sam3 import base_dtype, best_device, load_base
from helpers.train import run as run_folder

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
NOT_APPLICABLE, CRASHED = "not applicable", "crashed"
UNDECIDED = (NOT_CHECKED, CRASHED)  # nobody knows whether the run is healthy
LEAST_CONFIDENCE = 0.5  # evidence below is shown with its gate but names no cause
SAMPLE = 12  # images with objects, and as many without, that the costly gates look at
FEW_WITH, FEW_WITHOUT = 6, 2  # of these, how many are asked for many words
TRAIN_SAMPLE = 256  # training images that pass through the loader, about


class Inapplicable(InputError):
    """A gate has no answer for this run by its nature, which says nothing against the run."""


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
    """One question, a function of an `Examination` that returns a text and a list of `Evidence`.

    It raises `Inapplicable` if it does not apply, and `InputError` if what it needs cannot be read.
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

    def to_json(self):
        """Return the four texts as a dict."""
        return {key: value for key, value in vars(self).items() if key != "evidence"}


def pass_gate(gate, examination):
    """Ask one gate and return a `GateResult`; whatever the gate raises is a result too."""
    try:
        measured, evidence = gate.examine(examination)
    except Inapplicable as error:
        return GateResult(gate.name, NOT_APPLICABLE, str(error), gate.expected)
    except InputError as error:
        return GateResult(gate.name, NOT_CHECKED, str(error), gate.expected)
    except Exception as error:  # a pipeline that raises here is part of what is examined
        text = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        return GateResult(gate.name, CRASHED, text, gate.expected)
    status = FAILED if any(item.confidence >= LEAST_CONFIDENCE for item in evidence) else OK
    return GateResult(gate.name, status, measured, gate.expected, tuple(evidence))


class Examination:
    """A run, its data and its models, each read once and only if a gate asks for it.

    ``folder`` is a run folder, of an interrupted run with at least ``config.yaml``. ``data_dir`` stands
    in for the dataset of the config. ``image`` is a picture of which one wants to know why nothing is
    found in it, ``prompt`` the word that is asked, by default the names of the categories.
    """

    def __init__(self, folder, data_dir=None, image=None, prompt=None):
        self.folder = resolve(folder)
        if not (self.folder / run_folder.RUN_CONFIG).is_file():
            raise InputError(
                f"holds no {run_folder.RUN_CONFIG}",
                where=self.folder,
                fix="name the folder of a run, or train one with 'python -m helpers train'",
            )
        self.config = run_folder.read_config(self.folder)
        self.data_dir = resolve(data_dir or self.config.data.data_dir)
        if not self.data_dir.is_dir():
            fix = "name the folder of the dataset with --data"
            raise InputError("no such dataset", where=self.data_dir, fix=fix)
        self.image = None if image is None else resolve(image)
        if self.image is not None and not self.image.is_file():
            raise InputError("no such image", where=self.image, fix="check the path")
        self.prompt = prompt
        self._answers = {True: {}, False: {}}

    @cached_property
    def is_finished(self):
        """Whether the run wrote its metrics, which come last."""
        return (self.folder / run_folder.METRICS_FILE).is_file()

    @cached_property
    def files(self):
        """What the run wrote, a `helpers.train.run.RunFiles`; InputError if it is unfinished."""
        return run_folder.read_run(self.folder)

    @cached_property
    def history(self):
        """The log of the run, also of an unfinished one: list of dict."""
        return run_folder.read_history(self.folder)

    @cached_property
    def device(self):
        """Where run and base compute: the accelerator if there is one."""
        return best_device()

    @cached_property
    def loaded(self):
        """The run with its model, a `helpers.train.run.RunResult`; InputError if it cannot load."""
        result = run_folder.load_run(self.folder)
        result.model.to(self.device)
        return result

    @cached_property
    def adapter_weights(self):
        """The tensors of the adapter file by name; InputError if a number in it is not finite."""
        weights = read_adapter_weights(self.files.folder)
        check_tensors(weights, self.files.folder / WEIGHTS_FILE)
        return weights

    @cached_property
    def base(self):
        """A second model without any adapter, and its processor."""
        return self.fresh_base()

    def fresh_base(self, dtype=None):
        """Load a base to train or wrap: on the run's device, by default in the run's precision."""
        settings = self.config.model
        dtype = dtype or base_dtype(self.config.training.mixed_precision)
        own = {"resolution": settings.resolution, "native_prompt": settings.native_prompt}
        model, processor = load_base(settings.name, settings.revision, dtype, **own)
        return model.to(self.device), processor

    @cached_property
    def dataset(self):
        """What the run was trained on or what stands in for it, a `helpers.data.Dataset`."""
        return load_dataset(self.config, self.data_dir)

    @cached_property
    def is_own_data(self):
        """Whether the dataset is the one that the run was trained on."""
        return self.data_dir == resolve(self.config.data.data_dir)

    def split(self, name):
        """Return the split ``train`` or ``valid`` of the dataset, as the config calls them."""
        data = self.config.data
        return self.dataset.split({"train": data.train_split, "valid": data.val_split}[name])

    @cached_property
    def train_dataset(self):
        """The training data as the trainer saw them, a `helpers.data.PromptDataset`."""
        return PromptDataset.from_config(self.config, self.split("train"), *self.base)

    @cached_property
    def collator(self):
        """`helpers.data.PromptCollator` of the base's processor."""
        return PromptCollator(self.base[1])

    @cached_property
    def train_queries(self):
        """What reaches the loss, of images evenly spaced: list of (ImageRecord, query, target)."""
        dataset, queries = self.train_dataset, []
        for index in range(0, len(dataset), max(1, len(dataset) // TRAIN_SAMPLE)):
            batch = self.collator([dataset[index]])
            pairs = zip(batch["queries"], batch["targets"], strict=True)
            queries += [(dataset.records[index], query, target) for query, target in pairs]
        return queries

    @cached_property
    def sample(self):
        """Images to ask about, of the first split that shows an object; those with objects first."""
        for name in ("valid", "train"):
            records = self.split(name).records
            with_objects = [record for record in records if record.objects][:SAMPLE]
            if with_objects:
                return with_objects + [record for record in records if not record.objects][:SAMPLE]
        raise InputError("no image shows an object", where=self.data_dir, fix="annotate some")

    @cached_property
    def unannotated(self):
        """Images without any annotation, of both splits."""
        records = [*self.split("valid").records, *self.split("train").records]
        return [record for record in records if not record.objects][: 2 * SAMPLE]

    @cached_property
    def few(self):
        """Images to ask for many words: some of `sample`, those with objects first."""
        with_objects = [record for record in self.sample if record.objects][:FEW_WITH]
        return with_objects + [record for record in self.sample if not record.objects][:FEW_WITHOUT]

    @cached_property
    def words(self):
        """The words that are asked of the run now."""
        return [self.prompt] if self.prompt else list(self.split("valid").categories)

    @cached_property
    def trained_words(self):
        """The words that the run was trained to find."""
        path = self.folder / run_folder.PROMPTS_FILE
        words = list(read_json(path, fix="train again with --overwrite")["prompts"])
        if not words:
            raise InputError("no prompt was trained with objects", where=self.folder)
        return words

    def raws(self, prompts, *, adapted=True, records=None):
        """Ask run or base on images (`few`): dict of (image_id, prompt) to `RawPrediction`, kept."""
        answers = self._answers[adapted]
        records = self.few if records is None else records
        for record in records:
            missing = [prompt for prompt in prompts if (record.path, prompt) not in answers]
            if missing:
                for raw in self.predictor(adapted).raw(record.path, missing, name=record.image_id):
                    answers[record.path, raw.prompt] = raw  # two splits may share a name
        return {
            (record.image_id, prompt): answers[record.path, prompt]
            for record in records
            for prompt in prompts
        }

    def predictor(self, adapted):
        """Return a `helpers.detect.Predictor` of the run, or of its base."""
        if adapted:
            return Predictor(self.loaded.model, self.loaded.processor)
        return Predictor(*self.base)
