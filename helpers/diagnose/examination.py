"""A run under examination: everything the gates look at, loaded when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from helpers.config import load_config
from helpers.data import dataset as datasets
from helpers.detect import queries as prediction_queries
from helpers.detect.predictor import Predictor
from helpers.errors import InputError
from helpers.files import read_json, resolve
from helpers.model.sam3 import base_dtype, load_base
from helpers.train import run as run_folder

OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
NOT_APPLICABLE, CRASHED = "not applicable", "crashed"
UNDECIDED = (NOT_CHECKED, CRASHED)
"""While a gate stands like this, nobody knows whether the run is healthy."""


class Inapplicable(InputError):
    """A gate has no answer for this run by its nature, which says nothing against the run."""


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
        Takes a `helpers.diagnose.examination.Examination`, returns ``(measured, evidence)``: a text with the
        numbers, and a list of `Evidence`, empty if all is well. It raises `Inapplicable` if it does
        not apply to this run, and `helpers.errors.InputError` if something that it needs cannot be
        read: then the run cannot be called healthy.
    """

    name: str
    expected: str
    examine: Callable


@dataclass(frozen=True)
class GateResult:
    """What became of a gate: its name, one of the five statuses above, and what it measured."""

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


SAMPLE = 12
"""Images with objects, and as many without, that the costly gates look at."""
FEW_WITH, FEW_WITHOUT = 6, 2
"""Images of the sample that are asked for many words."""

LOOKED_AT = 256
"""Training images that are passed through the loader, about: all of them in a small dataset."""


class Examination:
    """A run, its data and its model, each read once and only if a gate asks for it.

    Functions are called through their modules, so that what is examined is the pipeline as it
    stands in this process.

    Parameters
    ----------
    folder : os.PathLike
        Run folder; of an interrupted run at least ``config.yaml``.
    data_dir : os.PathLike, optional
        Dataset in place of that of the config.
    image : os.PathLike, optional
        A picture of which one wants to know why nothing is found in it.
    prompt : str, optional
        The word that is asked; by default the names of the categories.

    Raises
    ------
    InputError
        If the folder holds no run, or there is no such dataset or image.
    """

    def __init__(self, folder, data_dir=None, image=None, prompt=None):
        self.folder = resolve(folder)
        if not (self.folder / run_folder.RUN_CONFIG).is_file():
            raise InputError(
                f"holds no {run_folder.RUN_CONFIG}",
                where=self.folder,
                fix="name the folder of a run, or train one with 'python -m helpers train'",
            )
        self.config = load_config(self.folder / run_folder.RUN_CONFIG)
        self.data_dir = resolve(data_dir or self.config.data.data_dir)
        if not self.data_dir.is_dir():
            fix = "name the folder of the dataset with --data"
            raise InputError("no such dataset", where=self.data_dir, fix=fix)
        self.image = None if image is None else resolve(image)
        if self.image is not None and not self.image.is_file():
            raise InputError("no such image", where=self.image, fix="check the path")
        self.prompt = prompt

    @cached_property
    def is_finished(self):
        """bool: whether the run wrote its metrics, which come last."""
        return (self.folder / run_folder.METRICS_FILE).is_file()

    @cached_property
    def files(self):
        """`helpers.train.run.RunFiles`: what the run wrote; InputError if it is unfinished."""
        return run_folder.read_run(self.folder)

    @cached_property
    def device(self):
        """torch.device: where run and base compute, the accelerator if there is one."""
        is_there = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if is_there else torch.device("cpu")

    @cached_property
    def num_processes(self):
        """int: how many processes trained together; 1 if the run did not record it."""
        path = self.folder / run_folder.VERSIONS_FILE
        return read_json(path, fix="train again with --overwrite").get("num_processes", 1)

    @cached_property
    def loaded(self):
        """`helpers.train.run.RunResult`: the run with its model; InputError if it cannot load."""
        result = run_folder.load_run(self.folder)
        result.model.to(self.device)
        return result

    @cached_property
    def base(self):
        """tuple: a second model without any adapter, and its processor; no gate changes it."""
        return self.fresh_base()

    def fresh_base(self, dtype=None):
        """Load a base to train or wrap: on the run's device, by default in the run's precision."""
        settings = self.config.model
        dtype = dtype or base_dtype(self.config.training.mixed_precision)
        model, processor = load_base(
            settings.name, settings.revision, dtype=dtype, resolution=settings.resolution
        )
        return model.to(self.device), processor

    def split(self, name):
        """Read a split through the pipeline's own reader.

        Parameters
        ----------
        name : {"train", "valid", "test"}
            ``train`` and ``valid`` are looked up in the config.

        Returns
        -------
        helpers.data.records.Split
        """
        data = self.config.data
        name = {"train": data.train_split, "valid": data.val_split}.get(name, name)
        return self.dataset.split(name)

    @cached_property
    def dataset(self):
        """`helpers.data.dataset.Dataset`: what the run was trained on, or what stands in for it."""
        return datasets.load_dataset(self.config, self.data_dir)

    @cached_property
    def train_dataset(self):
        """`helpers.data.dataset.PromptDataset`: the training data as the trainer saw them."""
        return datasets.PromptDataset.from_config(self.config, self.split("train"), *self.base)

    @cached_property
    def train_queries(self):
        """What reaches the loss in an epoch: list of (ImageRecord, query dict, target dict).

        Of at most `LOOKED_AT` training images, evenly spaced; query and target are those of
        `helpers.data.dataset.PromptCollator`.
        """
        dataset, collected = self.train_dataset, []
        for index in range(0, len(dataset), max(1, len(dataset) // LOOKED_AT)):
            batch = self.collator([dataset[index]])
            pairs = zip(batch["queries"], batch["targets"], strict=True)
            collected += [(dataset.records[index], query, target) for query, target in pairs]
        return collected

    @cached_property
    def collator(self):
        """`helpers.data.dataset.PromptCollator`: of the base's processor."""
        return datasets.PromptCollator(self.base[1])

    @cached_property
    def sample(self):
        """Images to ask about, those with objects first: list of helpers.data.records.ImageRecord.

        Of the validation split, or of the training split where that shows no object.
        """
        for name in ("valid", "train"):
            records = self.split(name).records
            shown = [record for record in records if record.objects][:SAMPLE]
            if shown:
                return shown + [record for record in records if not record.objects][:SAMPLE]
        raise InputError("no image shows an object", where=self.data_dir, fix="annotate some")

    @cached_property
    def unannotated(self):
        """Images without any annotation, of validation and training split, a list of records."""
        records = [*self.split("valid").records, *self.split("train").records]
        return [record for record in records if not record.objects][: 2 * SAMPLE]

    @cached_property
    def few(self):
        """Images to ask for many words: some of `sample`, those with objects first."""
        shown = [record for record in self.sample if record.objects][:FEW_WITH]
        return shown + [record for record in self.sample if not record.objects][:FEW_WITHOUT]

    @cached_property
    def asked(self):
        """The words that are asked of the run now: list of str."""
        return [self.prompt] if self.prompt else list(self.split("valid").categories)

    def raws(self, prompts, *, adapted=True, records=None):
        """Ask prompts on some images, with or without the adapter.

        Parameters
        ----------
        prompts : sequence of str
        adapted : bool
            False asks the base.
        records : sequence of helpers.data.records.ImageRecord, optional
            By default `sample`.

        Returns
        -------
        dict of (str, str) to helpers.detect.detections.RawPrediction
            By ``image_id`` and prompt; answers are kept, so asking twice costs nothing.
        """
        known = self._answers[adapted]
        records = self.sample if records is None else records
        for record in records:
            missing = [one for one in prompts if (record.path, one) not in known]
            if missing:
                for raw in self._ask(record, missing, adapted):
                    known[record.path, raw.prompt] = raw  # two splits may share a name
        return {
            (record.image_id, prompt): known[record.path, prompt]
            for record in records
            for prompt in prompts
        }

    @cached_property
    def _answers(self):
        return {True: {}, False: {}}

    def _ask(self, record, prompts, adapted):
        """Ask one image."""
        if adapted:
            predictor = Predictor(self.loaded.model, self.loaded.processor)
        else:
            predictor = Predictor(*self.base)
        return predictor.raw(record.path, prompts, name=record.image_id)

    @cached_property
    def queries(self):
        """The run judged on the sample: list of dict, see `helpers.detect.queries`."""
        split = self.split("valid" if self.split("valid").num_objects else "train")
        chosen = {record.image_id for record in self.sample}
        return prediction_queries.predict_split(
            self.loaded.model,
            self.loaded.processor,
            _only(split, chosen),
            absent_prompts=self.config.evaluation.absent_prompts,
            mask_threshold=self.config.evaluation.mask_threshold,
        )


def _only(split, image_ids):
    """Return a split with only some of its images."""
    records = tuple(record for record in split.records if record.image_id in image_ids)
    return replace(split, records=records)
