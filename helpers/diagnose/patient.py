"""Whom the diagnosis examines: what can be asked of a run, whoever trained it.

A part that a patient does not offer raises `Missing`, which leaves a gate unchecked and says how to
give it. No setting that a run does not state is replaced by a default of this project.
"""

import tempfile
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import Sam3Model

from helpers.config import load_config, read_yaml
from helpers.data.coco import find_splits
from helpers.data.dataset import Dataset, PromptCollator, PromptDataset, load_dataset
from helpers.detect.predictor import Predictor
from helpers.diagnose.logs import LOG_FILES, read_log, tidy_log
from helpers.errors import InputError
from helpers.files import CONFIGS, read_json, resolve
from helpers.model.audit import adapter_report
from helpers.model.lora import (
    BASE_FILE,
    COMPONENTS,
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensors,
    component_of,
    load_adapter,
    read_adapter_weights,
)
from helpers.model.prompted import PromptedSam3, base_of
from helpers.model.sam3 import base_dtype, best_device, load_base
from helpers.train import run as run_folder

NEEDS = {
    "log": ("the training log", "--log FILE", "log="),
    "data": ("the dataset", "--data DIR", "data_dir="),
    "weights": ("the trained weights", "their file or folder as SOURCE", "model="),
    "words": ("the words of the training", "--words WORD,...", "words="),
    "settings": ("the settings of the training", "--config FILE", "settings="),
    "base": ("the base", "--base NAME", "base="),
    "batches": ("the batches that reached the loss", "LivePatient(batches=)", "batches="),
    "loss": ("the loss as a function", "LivePatient(loss=)", "loss="),
    "detect": ("the detection as a function", "LivePatient(detect=)", "detect="),
}
"""Part to what it is, how the command line and how `LivePatient` take it; the cheapest first."""
SAMPLE = 12  # images with objects, and as many without, that the costly gates look at
FEW_WITH, FEW_WITHOUT = 6, 2  # of these, how many are asked for many words
TRAIN_SAMPLE = 256  # training images that pass through the loader, about
MAX_BATCHES = 32  # of a live patient that are looked at
_INPUTS = ("pixel_values", "input_ids", "attention_mask")
SAM3_SIZES = 288, 200  # cells along a mask and queries of the released SAM3
LOG_SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".log")
_SOURCES = (
    "name a run folder, a folder of a PEFT adapter, a *_lora_weights.pt, a checkpoint.pt, a model "
    "folder, a log or a dataset"
)
OWN_MARKS = (
    *(run_folder.PROMPTS_FILE, run_folder.METRICS_FILE, run_folder.STOPPED_FILE),
    *(run_folder.CURVES_FILE, run_folder.AUDIT_FILE),
)
"""Files that only a run folder of this project has."""


class Inapplicable(InputError):
    """A gate has no answer for this run by its nature, which says nothing against the run."""


class Missing(InputError):
    """A patient does not offer a part, a key of `NEEDS`."""

    def __init__(self, part, is_live=False, what=None):
        name, option, argument = NEEDS[part]
        way = argument if is_live else option
        super().__init__(f"needs {what or name}; give it with {way}")
        self.part = part


class part(cached_property):  # noqa: N801 - a decorator
    """A cached property whose failure is kept, too: what cannot be loaded is tried once."""

    def __get__(self, instance, owner=None):
        """Return the value, or raise the InputError of the first try again."""
        kept = f"_failure_of_{self.attrname}"
        if instance is not None and kept in vars(instance):
            raise vars(instance)[kept]
        try:
            return super().__get__(instance, owner)
        except InputError as error:
            vars(instance)[kept] = error
            raise


class Stated:
    """Settings as far as they are stated; any other raises `Missing`."""

    def __init__(self, patient, name, values):
        self._patient, self._name = patient, name
        vars(self).update((str(key), value) for key, value in values.items())

    def __getattr__(self, key):
        """Refuse a key that was not stated."""
        if key.startswith("_"):
            raise AttributeError(key)
        raise self._patient.missing("settings", f"{self._name}{key}, which is not stated")


class Patient:
    """A run, its data and its models, each read once and only if a gate asks for it.

    Parameters
    ----------
    data_dir : os.PathLike, optional
        Dataset in the layout of `helpers.data`.
    words : sequence of str
        What the training asked for.
    log : os.PathLike, pandas.DataFrame or list of dict, optional
        See `helpers.diagnose.logs.read_log`.
    settings : os.PathLike or dict, optional
        YAML, or its content, with sections such as ``lora`` and ``training``.
    base : str, optional
        Folder or name of the base.
    image, prompt : os.PathLike, str, optional
        A picture in which nothing is found, and the word that is asked now.
    """

    is_own = is_live = is_finished = False
    findings = ()  # of the import, each with ``code`` and ``message``

    def __init__(
        self,
        *,
        data_dir=None,
        words=(),
        log=None,
        settings=None,
        base=None,
        image=None,
        prompt=None,
    ):
        self._data_dir, self._log, self._base_name = data_dir, log, base
        self._words, self.prompt = [*words], prompt
        self._settings = settings if isinstance(settings, dict) else None
        if settings is not None and self._settings is None:
            self._settings = read_yaml(resolve(settings))
        if data_dir is not None and not resolve(data_dir).is_dir():
            fix = "name the folder of the dataset with --data"
            raise InputError("no such dataset", where=resolve(data_dir), fix=fix)
        self.image = None if image is None else resolve(image)
        if self.image is not None and not self.image.is_file():
            raise InputError("no such image", where=self.image, fix="check the path")
        self._answers = {True: {}, False: {}}

    def missing(self, name, what=None):
        """Return the error for a part that is not offered."""
        return Missing(name, self.is_live, what)

    # what only a run folder of this project has
    @property
    def folder(self):
        """The run folder; raises `Inapplicable` for what anybody else trained."""
        raise Inapplicable("only a run folder of this project records it")

    files = is_own_data = folder

    # settings and log
    @part
    def config(self):
        """Settings: a `Config`, or what is stated beside the questions that the diagnosis asks."""
        asked = load_config(CONFIGS / "crack_detection_config.yaml")
        values = {"lora": self.lora_settings}
        for name, section in (self._settings or {}).items():
            if isinstance(section, dict):
                values[name] = values.get(name, {}) | section
        names = ("model", "lora", "training", "loss")
        sections = {name: Stated(self, f"{name}.", values.get(name, {})) for name in names}
        config = Stated(self, "", sections | {"evaluation": asked.evaluation})
        own = {"prompt": None, "prompts_by_category": {}}
        config.data = SimpleNamespace(negative_prompts=asked.data.negative_prompts, **own)
        if "num_epochs" in vars(config.training):
            config.effective_num_epochs = config.training.num_epochs
        return config

    @property
    def lora_settings(self):
        """What the weights themselves state of ``lora``: a dict."""
        return {}

    @part
    def log(self):
        """The log, see `helpers.diagnose.logs.read_log`."""
        if self._log is None:
            raise self.missing("log")
        return read_log(self._log)

    @part
    def history(self):
        """Validations as `Examination.history` holds them, from a log with a detection metric."""
        if "metric" not in self.log:
            raise Inapplicable("the log holds no metric of detections")
        name = f"eval_{self.config.evaluation.metric_for_best}"
        return [{"eval_loss": None, name: value} for value in self.log["metric"].dropna()]

    # data
    @part
    def data_dir(self):
        """Folder of the dataset: the one given, or the one that the settings state if it is here."""
        stated = (self._settings or {}).get("training") or {}
        for place in (self._data_dir, isinstance(stated, dict) and stated.get("data_dir")):
            if place and resolve(place).is_dir():
                return resolve(place)
        raise self.missing("data")

    @part
    def dataset(self):
        """What the run was trained on or what stands in for it, a `helpers.data.Dataset`."""
        return Dataset(self.data_dir, self.config)

    @property
    def split_names(self):
        """The splits that are looked at: those that there are."""
        names = self.dataset.names
        return [name for name in ("train", "valid") if name in names] or names[:1]

    def split(self, name):
        """Return the split ``train`` or ``valid`` of the dataset; one stands in for the other."""
        names = self.split_names
        return self.dataset.split(name if name in names else names[0])

    @part
    def train_queries(self):
        """What reaches the loss: list of (ImageRecord or None, query, target)."""
        raise self.missing("batches")

    @part
    def own_names(self):
        """The words that the training asks for objects."""
        return sorted(
            {query["prompt"] for _, query, _ in self.train_queries if query["is_positive"]}
        )

    @part
    def sample(self):
        """Images to ask about, of the first split that shows an object; those with objects first."""
        for name in ("valid", "train"):
            records = self.split(name).records
            with_objects = [record for record in records if record.objects][:SAMPLE]
            if with_objects:
                return with_objects + [record for record in records if not record.objects][:SAMPLE]
        raise InputError("no image shows an object", where=self.data_dir, fix="annotate some")

    @part
    def unannotated(self):
        """Images without any annotation, of both splits."""
        records = [*self.split("valid").records, *self.split("train").records]
        return [record for record in records if not record.objects][: 2 * SAMPLE]

    @part
    def few(self):
        """Images to ask for many words: some of `sample`, those with objects first."""
        with_objects = [record for record in self.sample if record.objects][:FEW_WITH]
        return with_objects + [record for record in self.sample if not record.objects][:FEW_WITHOUT]

    @property
    def words(self):
        """The words that are asked of the run now."""
        if self.prompt:
            return [self.prompt]
        return list(self._words or self.split("valid").categories)

    @property
    def asked_words(self):
        """The words that were said to be asked now; none if nothing was said."""
        return [self.prompt] if self.prompt else []

    @part
    def trained_words(self):
        """The words that the run was trained to find."""
        if not self._words:
            raise self.missing("words")
        return self._words

    # weights and models
    @part
    def device(self):
        """Where run and base compute: the accelerator if there is one."""
        return best_device()

    @part
    def adapter_weights(self):
        """The tensors of the adapter by name, as PEFT writes them."""
        raise self.missing("weights")

    @part
    def raw_weights(self):
        """The tensors of the file of weights, whatever their values."""
        raise self.missing("weights")

    @part
    def adapter_report(self):
        """The adapter as `helpers.model.adapter_report` describes it, as far as weights tell."""
        names = [name for name in self.adapter_weights if ".lora_B" in name]
        rows = {}
        for component in (*COMPONENTS, "total"):
            tensors = [
                self.adapter_weights[name].float()
                for name in names
                if component in ("total", component_of(module_of(name)))
            ]
            moved = [bool(tensor.any()) for tensor in tensors]
            rows[component] = {
                "modules": len(tensors),
                "grad_norm": float("nan"),
                "B_norm": sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5,
                "B_nonzero": sum(moved) / len(moved) if moved else float("nan"),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    @part
    def trained_parameters(self):
        """How many parameters were trained, ``all`` and of ``lora``: a dict."""
        raise Inapplicable("the weights alone do not tell what else was trained")

    @part
    def loaded(self):
        """The trained model, with ``model`` and ``processor``."""
        raise self.missing("weights")

    @part
    def base_name(self):
        """Folder or name of the base."""
        stated = (self._settings or {}).get("model") or {}
        name = self._base_name or (isinstance(stated, dict) and stated.get("name"))
        if not name:
            raise self.missing("base")
        return name

    @part
    def base(self):
        """A second model without any adapter, and its processor."""
        return self.fresh_base()

    def fresh_base(self, dtype=None):
        """Load a base to train or wrap, on the device of the run."""
        model, processor = load_base(self.base_name, dtype=dtype)
        return model.to(self.device), processor

    def at_rest(self):
        """Return the context in which the models are asked."""
        return nullcontext()

    @part
    def sizes(self):
        """Cells along a mask and number of queries, of the base or, unknown, of SAM3 itself."""
        try:
            model = self.base[0]
        except InputError:
            return SAM3_SIZES
        return model.mask_size, model.config.detr_decoder_config.num_queries

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

    # the pipeline as it runs
    @part
    def loss(self):
        """Function of (outputs, targets) that returns the loss."""
        raise self.missing("loss")

    @part
    def detect(self):
        """Function of (picture, word) that returns detections."""
        raise self.missing("detect")

    @part
    def batches(self):
        """The first batches that reach the loss: list of dict, see `LivePatient`."""
        raise self.missing("batches")


def module_of(name):
    """Return the module of the base that a tensor of a PEFT file belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


class Examination(Patient):
    """A run folder of this project, of an interrupted run with at least ``config.yaml``.

    ``data_dir`` stands in for the dataset of the config; for ``image`` and ``prompt`` see `Patient`.
    """

    is_own, folder = True, None  # of each
    split_names = ("train", "valid")

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
        super().__init__(data_dir=self.data_dir, image=image, prompt=prompt)

    @part
    def is_finished(self):
        """Whether the run wrote its metrics, which come last."""
        return (self.folder / run_folder.METRICS_FILE).is_file()

    @part
    def files(self):
        """What the run wrote, a `helpers.train.run.RunFiles`; InputError if it is unfinished."""
        return run_folder.read_run(self.folder)

    @part
    def history(self):
        """The log of the run, also of an unfinished one: list of dict."""
        return run_folder.read_history(self.folder)

    @part
    def log(self):
        """The log, see `helpers.diagnose.logs.read_log`."""
        return tidy_log(self.history)

    @part
    def loaded(self):
        """The run with its model, a `helpers.train.run.RunResult`; InputError if it cannot load."""
        result = run_folder.load_run(self.folder)
        result.model.to(self.device)
        return result

    @part
    def adapter_weights(self):
        """The tensors of the adapter file by name; InputError if a number in it is not finite."""
        weights = read_adapter_weights(self.files.folder)
        check_tensors(weights, self.files.folder / WEIGHTS_FILE)
        return weights

    @property
    def raw_weights(self):
        """Say that another gate looks at the file."""
        raise Inapplicable("'files of the run' looks at them")

    @part
    def adapter_report(self):
        """What the run recorded of its adapter, with the gradient of the first step."""
        return self.files.adapter

    @part
    def trained_parameters(self):
        """What the run recorded of its optimiser."""
        counts = self.files.metrics.get("trained_parameters")
        if counts is None:
            where = self.folder / run_folder.METRICS_FILE
            raise InputError(
                "holds no number of trained parameters", where=where, fix="train again"
            )
        return counts

    @part
    def base_name(self):
        """Folder or name of the base."""
        return self.config.model.name

    def fresh_base(self, dtype=None):
        """Load a base to train or wrap: on the run's device, by default in the run's precision."""
        settings = self.config.model
        dtype = dtype or base_dtype(self.config.training.mixed_precision)
        model, processor = load_base(
            settings.name, settings.revision, dtype=dtype, resolution=settings.resolution
        )
        return model.to(self.device), processor

    @part
    def sizes(self):
        """Cells along a mask and number of queries, of the base."""
        model = self.base[0]
        return model.mask_size, model.config.detr_decoder_config.num_queries

    @part
    def dataset(self):
        """What the run was trained on or what stands in for it, a `helpers.data.Dataset`."""
        return load_dataset(self.config, self.data_dir)

    @part
    def is_own_data(self):
        """Whether the dataset is the one that the run was trained on."""
        return self.data_dir == resolve(self.config.data.data_dir)

    def split(self, name):
        """Return the split ``train`` or ``valid`` of the dataset, as the config calls them."""
        data = self.config.data
        return self.dataset.split({"train": data.train_split, "valid": data.val_split}[name])

    @part
    def train_dataset(self):
        """The training data as the trainer saw them, a `helpers.data.PromptDataset`."""
        return PromptDataset.from_config(self.config, self.split("train"), *self.base)

    @part
    def own_names(self):
        """The words that the training asks for objects."""
        return list(self.train_dataset.own_names)

    @part
    def collator(self):
        """`helpers.data.PromptCollator` of the base's processor."""
        return PromptCollator(self.base[1])

    @part
    def train_queries(self):
        """What reaches the loss, of images evenly spaced: list of (ImageRecord, query, target)."""
        dataset, queries = self.train_dataset, []
        for index in range(0, len(dataset), max(1, len(dataset) // TRAIN_SAMPLE)):
            batch = self.collator([dataset[index]])
            pairs = zip(batch["queries"], batch["targets"], strict=True)
            queries += [(dataset.records[index], query, target) for query, target in pairs]
        return queries

    @property
    def words(self):
        """The words that are asked of the run now."""
        return [self.prompt] if self.prompt else list(self.split("valid").categories)

    @part
    def trained_words(self):
        """The words that the run was trained to find."""
        path = self.folder / run_folder.PROMPTS_FILE
        words = list(read_json(path, fix="train again with --overwrite")["prompts"])
        if not words:
            raise InputError("no prompt was trained with objects", where=self.folder)
        return words

    @property
    def loss(self):
        """Say that loss and detection of this project are tested where they are."""
        raise Inapplicable("'make test' asks it of this project's own loss and detection")

    detect = batches = loss


class AdapterPatient(Patient):
    """A PEFT folder over the module names of `Sam3Model`, whoever wrote it."""

    def __init__(self, folder, findings=(), stated_by_file=True, **options):
        super().__init__(**options)
        self.adapter_folder, self.findings = Path(folder), findings
        self._content = read_json(self.adapter_folder / CONFIG_FILE)
        self._stated_by_file = stated_by_file

    @property
    def lora_settings(self):
        """Rank, alpha and dropout of ``adapter_config.json``."""
        keys = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        if not self._stated_by_file:
            return {}
        return {name: self._content[key] for name, key in keys.items() if key in self._content}

    @part
    def adapter_weights(self):
        """The tensors of the adapter file by name; InputError if a number in it is not finite."""
        check_tensors(self.raw_weights, self.adapter_folder / WEIGHTS_FILE)
        return self.raw_weights

    @part
    def raw_weights(self):
        """The tensors of the adapter file by name, whatever their values."""
        return read_adapter_weights(self.adapter_folder)

    @part
    def identity(self):
        """What `helpers.model.lora.save_adapter` noted of the base; empty if another wrote it."""
        path = self.adapter_folder / BASE_FILE
        return read_json(path) if path.is_file() else {}

    @part
    def base_name(self):
        """Folder or name of the base: given, noted beside the adapter, or stated by settings."""
        noted = self.identity.get("name") or self._content.get("base_model_name_or_path")
        return self._base_name or noted or super().base_name

    def fresh_base(self, dtype=None):
        """Load a base at the resolution of the training, if it is noted."""
        resolution = self.identity.get("resolution")
        model, processor = load_base(self.base_name, dtype=dtype, resolution=resolution)
        return model.to(self.device), processor

    @part
    def loaded(self):
        """The adapter on its base."""
        model, processor = self.fresh_base()
        model = load_adapter(model, self.adapter_folder)
        return SimpleNamespace(model=model.to(self.device), processor=processor)


class ModelPatient(Patient):
    """A folder of a full model: fine-tuned without LoRA, or merged."""

    def __init__(self, folder, findings=(), **options):
        super().__init__(**options)
        self.model_folder, self.findings = Path(folder), findings

    @property
    def adapter_weights(self):
        """Say that there is no adapter."""
        raise Inapplicable("it is a full model, without adapter")

    @part
    def raw_weights(self):
        """The parameters by name."""
        return dict(self.loaded.model.named_parameters())

    @part
    def loaded(self):
        """The model of the folder; a processor is taken from the base if there is none."""
        model, processor = load_base(self.model_folder)
        return SimpleNamespace(model=model.to(self.device), processor=processor)


class LivePatient(Patient):
    """Objects of a training in a notebook; whatever is left out is not examined.

    Parameters
    ----------
    model : transformers.Sam3Model or peft.PeftModel of one, optional
        As trained, or before training.
    processor : transformers.Sam3Processor, optional
    batches : iterable of dict, optional
        What the loop reads, of which 32 are looked at. Each has ``pixel_values`` (I, 3, S, S),
        ``input_ids`` and ``attention_mask`` (B, T), and ``targets`` (or ``labels``), a list of B
        dicts: ``boxes`` (or ``boxes_cxcywh``) (n, 4), and maybe ``masks`` (n, h, w). Row b belongs
        to image b, or to ``image_index[b]``. It may have ``image_ids``, I file names of the dataset.
    loss : callable, optional
        ``loss(outputs, targets)`` of the model's outputs and the targets of a batch: a scalar, or a
        dict of terms, of which ``loss`` or ``total`` counts, or else their sum.
    detect : callable, optional
        ``detect(picture, word)`` of a PIL image, and ``threshold=`` if it takes one. It returns dicts
        of ``score``, ``box`` (x0, y0, x1, y1 in pixels), and maybe ``mask`` (height, width), or one
        dict of ``scores``, ``boxes``, ``masks``, as the processor's own post-processing does.
    **options
        ``data_dir``, ``words``, ``log``, ``settings``, ``base``, ``image``, ``prompt``: see `Patient`.
    """

    is_live = True

    def __init__(
        self, *, model=None, processor=None, batches=None, loss=None, detect=None, **options
    ):
        super().__init__(**options)
        self._model, self._processor, self._batches = model, processor, batches
        for name, function in (("loss", loss), ("detect", detect)):
            if function is not None:
                if not callable(function):
                    raise InputError(f"{name} is {function!r:.60}", fix="give a function")
                setattr(self, name, function)

    @part
    def model(self):
        """The model as it was given."""
        if self._model is None:
            raise self.missing("weights", "the model")
        if not isinstance(base_of(self._model), Sam3Model):
            name = type(base_of(self._model)).__name__
            raise InputError(f"the model is a {name}", fix="give a Sam3Model, with or without PEFT")
        return self._model

    @part
    def processor(self):
        """The processor as it was given."""
        if self._processor is None:
            raise self.missing("weights", "the processor, given with processor=, and the model")
        return self._processor

    @part
    def loaded(self):
        """The model in the form that is asked, sharing all weights with the one given."""
        return SimpleNamespace(model=prompted_view(self.model), processor=self.processor)

    @part
    def device(self):
        """Where the model is."""
        return next(self.model.parameters()).device

    @part
    def sizes(self):
        """Cells along a mask and number of queries, of the model."""
        model = prompted_view(self.model)
        return model.mask_size, model.config.detr_decoder_config.num_queries

    def predictor(self, adapted):
        """Return a predictor of the model; of the base that was named, or with the adapter off."""
        if adapted or self._base_name:
            return super().predictor(adapted)
        if not isinstance(self.model, PeftModel):
            raise self.missing("base")
        predictor = BarePredictor(self.loaded.model, self.processor)
        predictor.peft_model = self.model
        return predictor

    @contextmanager
    def at_rest(self):
        """Keep the model in eval mode, and put back which of its modules were in training."""
        modules = list(self._model.modules()) if isinstance(self._model, nn.Module) else []
        modes = [module.training for module in modules]
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

    @part
    def adapter_weights(self):
        """The tensors of the adapter in memory, by the names that PEFT would save."""
        if not isinstance(self.model, PeftModel):
            raise Inapplicable("the model carries no adapter of PEFT")
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {name: tensor.detach().cpu() for name, tensor in weights.items()}

    @property
    def raw_weights(self):
        """The tensors of the adapter in memory."""
        return self.adapter_weights

    @part
    def adapter_report(self):
        """The adapter in memory, with the gradients that the last backward pass left."""
        if not isinstance(self.model, PeftModel):
            raise Inapplicable("the model carries no adapter of PEFT")
        return adapter_report(self.model)

    @part
    def trained_parameters(self):
        """How many parameters a training would change."""
        counts = {"all": 0, "lora": 0}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                counts["all"] += parameter.numel()
                counts["lora"] += parameter.numel() if ".lora_" in name else 0
        if not counts["lora"]:
            raise Inapplicable("no parameter of LoRA is set to be trained")
        return counts

    @part
    def batches(self):
        """The first batches: list of dict of ``inputs``, ``targets`` as given, ``rows``."""
        if self._batches is None:
            raise self.missing("batches")
        batches = [self._batch(batch) for batch in islice(self._batches, MAX_BATCHES)]
        if not batches:
            raise InputError("there is no batch", where="batches", fix="give the loader itself")
        return batches

    def _batch(self, batch):
        """Check one batch and gather, row by row, what its words and objects are."""
        if not hasattr(batch, "keys"):
            message = f"a batch is a {type(batch).__name__}"
            raise InputError(message, where="batches", fix="give dicts, see LivePatient")
        keys = [key for key in ("targets", "labels") if key in batch]
        lacking = [name for name in _INPUTS if name not in batch] + ([] if keys else ["targets"])
        if lacking:
            message = (
                f"a batch lacks {', '.join(lacking)}; it has {', '.join(map(str, batch.keys()))}"
            )
            fix = "give the batch as the model and the loss get it, see LivePatient"
            raise InputError(message, where="batches", fix=fix)
        inputs, targets = {name: batch[name] for name in _INPUTS}, batch[keys[0]]
        num_rows, num_images = len(inputs["input_ids"]), len(inputs["pixel_values"])
        if isinstance(targets, dict) or len(targets) != num_rows:
            message = f"a batch has {num_rows} prompts and other targets than one dict for each"
            raise InputError(message, where="batches", fix="see LivePatient")
        index = batch["image_index"] if "image_index" in batch else range(num_rows)
        index = [int(one) for one in index] if num_images > 1 else [0] * num_rows
        if len(index) != num_rows or max(index) >= num_images:
            message = f"a batch pairs {num_rows} prompts with {num_images} images in no known way"
            raise InputError(message, where="batches", fix="add image_index, see LivePatient")
        inputs["image_index"] = torch.tensor(index)
        queries = [query.get("image_id") for query in batch.get("queries", ())]
        names = batch["image_ids"] if "image_ids" in batch else None
        if names is None and len(queries) == num_rows:
            names = {image: queries[row] for row, image in enumerate(index)}
        words = [
            self.tokenizer.decode(ids, skip_special_tokens=True) for ids in inputs["input_ids"]
        ]
        rows = []
        for image, word, target in zip(index, words, targets, strict=True):
            objects = _objects(target)
            query = {"prompt": word.strip(), "is_positive": bool(len(objects["boxes_cxcywh"]))}
            query["image_id"] = None if names is None else str(names[image])
            rows.append((query, objects))
        return {"inputs": inputs, "targets": targets, "rows": rows}

    @part
    def tokenizer(self):
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @part
    def train_queries(self):
        """What reaches the loss: list of (ImageRecord or None, query, target)."""
        rows = [row for batch in self.batches for row in batch["rows"]]
        records = {}
        if any(query["image_id"] for query, _ in rows):
            for record in self.split("train").records:
                records |= {record.image_id: record, record.path.name: record}
        return [(records.get(query["image_id"]), query, objects) for query, objects in rows]

    @property
    def asked_words(self):
        """The word that is asked now, or else the words given; the batches tell those trained."""
        return super().asked_words or self._words

    @part
    def trained_words(self):
        """The words that have objects in the batches; without batches, those given."""
        return super().trained_words if self._batches is None else self.own_names


def _objects(target):
    """Return the objects of one target as float ``boxes_cxcywh``, ``masks`` and ``mask_valid``."""
    names = [
        name for name in ("boxes_cxcywh", "boxes") if hasattr(target, "keys") and name in target
    ]
    if not names:
        found = (
            ", ".join(map(str, target.keys())) if hasattr(target, "keys") else repr(type(target))
        )
        raise InputError(
            f"a target lacks boxes; it has {found}", where="batches", fix="see LivePatient"
        )
    boxes = torch.as_tensor(target[names[0]]).detach().float().cpu().reshape(-1, 4)
    masks = target["masks"] if "masks" in target else torch.zeros(len(boxes), 0, 0)
    masks = torch.as_tensor(masks).detach().cpu()
    valid = masks.flatten(1).any(1) if masks.numel() else torch.zeros(len(boxes), dtype=torch.bool)
    return {"boxes_cxcywh": boxes, "masks": masks, "mask_valid": valid}


class BarePredictor(Predictor):
    """Ask a model with the adapter of its `peft_model` switched off."""

    def raw(self, *args, **options):
        """Ask as `Predictor.raw` does."""
        with self.peft_model.disable_adapter():
            return super().raw(*args, **options)


def prompted_view(model):
    """Return a `PromptedSam3` that shares every module with a `Sam3Model`, which stays as it is."""
    base = base_of(model)
    if isinstance(base, PromptedSam3):
        return base
    view = copy(base)  # a new object around the same modules
    view.__class__ = PromptedSam3
    return view


def open_patient(source, *, config=None, data_dir=None, log=None, base=None, words=(), image=None, prompt=None):  # fmt: skip
    """Recognise what somebody has in hand of a training, and return it as a `Patient`.

    Parameters
    ----------
    source : os.PathLike
        Run folder of this project; PEFT folder; ``*_lora_weights.pt`` of Sompote/SAM3_LoRA or its
        folder; ``checkpoint.pt`` of Meta's trainer; folder of a `Sam3Model`; a log; or a dataset.
    config, data_dir, log, base, words, image, prompt : optional
        What the source does not hold; see `Patient`, where ``config`` is ``settings``.

    Returns
    -------
    Patient
        InputError if the source is none of these.
    """
    path = resolve(source)
    own = {"image": image, "prompt": prompt}
    if not path.exists():
        raise InputError("no such file or folder", where=path, fix=_SOURCES)
    given = own | {"data_dir": data_dir, "base": base, "words": words, "settings": config}
    if path.is_file():
        if path.suffix.lower() in LOG_SUFFIXES:
            return Patient(**given, log=log or path)
        return _imported(path, path.parent, log, given)
    names = {entry.name for entry in path.iterdir()}
    torch_files = sorted([*path.glob("*.pt"), *path.glob("*.pth"), *path.glob("checkpoints/*.pt")])
    is_own = names.intersection(OWN_MARKS)
    if is_own or (run_folder.RUN_CONFIG in names and not torch_files):
        return Examination(path, data_dir, **own)
    if CONFIG_FILE in names or torch_files or "config.json" in names:
        return _imported(path, path, log, given)
    if logs := [path / name for name in LOG_FILES if name in names]:
        return Patient(**given, log=log or logs[0])
    try:
        find_splits(path)
    except InputError as error:
        message = "is no run, adapter, model, log or dataset that is known here"
        raise InputError(f"{message} ({error.message})", where=path, fix=_SOURCES) from error
    return Patient(**given | {"data_dir": path}, log=log)


def _imported(path, folder, log, given):
    """Return the patient of a file or folder of weights, imported if it is no PEFT folder."""
    beside = [folder / name for name in LOG_FILES if (folder / name).is_file()]
    given = given | {"log": log or (beside[0] if beside else None)}
    if (path / CONFIG_FILE).is_file():
        return AdapterPatient(path, **given)
    if (path / "config.json").is_file():
        return ModelPatient(path, **given)
    from helpers.foreign import import_source

    place = tempfile.TemporaryDirectory(prefix="imported-")
    settings = given["settings"]
    report = import_source(path, Path(place.name) / "model", config=settings, base=given["base"])
    if settings is None:
        yamls = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
        given["settings"] = yamls[0] if len(yamls) == 1 else None
    target = Path(place.name) / "model"
    options = given | {"findings": report.findings}
    if (target / CONFIG_FILE).is_file():
        patient = AdapterPatient(target, stated_by_file=False, **options)
    else:
        patient = ModelPatient(target, **options)
    patient.place = place  # removed with the patient
    return patient
