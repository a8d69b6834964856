"""Whom the diagnosis examines: what can be asked of a run, whoever trained it.

A part that a patient does not offer raises `Missing`, which leaves a gate unchecked and says how to
give it. No setting that a run does not state is replaced by a default of this project.
"""

import tempfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel, get_peft_model_state_dict
from torchvision.ops import box_convert
from transformers import Sam3Model
from transformers.trainer_utils import get_last_checkpoint

from helpers.config import load_config, read_yaml
from helpers.data.coco import find_splits
from helpers.data.dataset import Dataset, PromptCollator, PromptDataset, load_dataset
from helpers.data.masks import tight_boxes
from helpers.detect.predictor import Predictor
from helpers.diagnose.logs import LOG_FILES, read_log, tidy_log
from helpers.errors import InputError, explain
from helpers.files import CONFIGS, read_json, resolve
from helpers.foreign import OF_META, import_source, read_source, yaml_beside
from helpers.model import lora
from helpers.model.audit import adapter_report
from helpers.model.prompted import PromptedSam3, base_of
from helpers.model.sam3 import base_dtype, best_device, load_base
from helpers.train import run as run_folder

NEEDS = {
    "log": ("the training log", "--log FILE", "log="),
    "data": ("the dataset", "--data DIR", "data_dir="),
    "weights": ("the trained weights", "their file or folder as SOURCE", "model=, processor="),
    "words": ("the words of the training", "--words WORD,...", "words="),
    "settings": ("the settings of the training", "--config FILE", "settings="),
    "base": ("the base", "--base NAME", "base="),
    "batches": ("the batches that reached the loss", "LivePatient(batches=)", "batches="),
    "loss": ("the loss as a function", "LivePatient(loss=)", "loss="),
    "detect": ("the detection as a function", "LivePatient(detect=)", "detect="),
}
"""Part to what it is, how the command line and how `LivePatient` take it; the cheapest first."""
_PART_OF = {name: name for name in ("log", "batches", "loss", "detect")}
_PART_OF |= {"data_dir": "data", "base_name": "base", "place": "weights"}
_PART_OF |= {"train_queries": "batches", "trained_words": "words"}
_OWN = ("folder", "files", "trained_parameters")
FOUND = 0.3  # best score of a word that answers
SAMPLE = 12  # images with objects, and as many without, that the costly gates look at
FEW_WITH, FEW_WITHOUT = 6, 2  # of these, how many are asked for many words
TRAIN_SAMPLE = 256  # training images that pass through the loader, about
MAX_BATCHES = 16  # of a live patient that are looked at
SAM3_SIZES = 288, 200  # cells along a mask and queries of the released SAM3
_AS_GIVEN = "give the batch as model and loss get it, see helpers.diagnose.LivePatient"
_UNREADABLE = (AttributeError, TypeError, ValueError, RuntimeError)
_INPUTS = ("pixel_values", "input_ids", "attention_mask")
_SOURCES = (
    "name a run folder, a folder of a PEFT adapter, a *_lora_weights.pt, a checkpoint.pt, a model "
    "folder, a log or a dataset"
)
_OWN_MARKS = {  # files that only a run folder of this project has
    *(run_folder.PROMPTS_FILE, run_folder.METRICS_FILE, run_folder.STOPPED_FILE),
    *(run_folder.CURVES_FILE, run_folder.AUDIT_FILE),
}
SLIP = 0.4  # confidence of evidence that is shown with its gate but names no cause


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


class Inapplicable(InputError):
    """A gate has no answer for this run by its nature, which says nothing against the run."""


class Missing(InputError):
    """A patient does not offer a part, a key of `NEEDS`."""

    def __init__(self, part, is_live=False, what=None):
        name, *ways = NEEDS[part]
        super().__init__(f"needs {what or name}; give it with {ways[is_live]}")
        self.part = part


def stated(question):
    """Return the answer of a function, or None if the patient lacks what it needs."""
    try:
        return question()
    except Missing:
        return None


class part(cached_property):
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

    def __init__(self, is_live, name, values):
        for key in values.keys() & {"dropout", "num_epochs", "learning_rate"}:
            if not isinstance(values[key], int | float | None):
                raise InputError(f"{name}{key} is {values[key]!r:.50}", fix="write a number")
        vars(self).update(values, _is_live=is_live, _name=name)

    def __getattr__(self, key):
        """Refuse a key that was not stated."""
        if key.startswith("_"):
            raise AttributeError(key)
        raise Missing("settings", self._is_live, f"{self._name}{key}, which is not stated")


class Patient:
    """A run, its data and its models, each read once and only if a gate asks for it.

    ``data_dir`` is a dataset in the layout of `helpers.data`; ``words`` are what the training asked
    for; ``log`` is what `helpers.diagnose.logs.read_log` reads; ``settings`` are a YAML, or its
    content, with sections such as ``lora`` and ``training``; ``base`` is a folder or name; ``image``
    and ``prompt`` are a picture in which nothing is found, and the word that is asked now.
    """

    is_own = is_live = is_finished = False
    findings = ()  # of the import, each with ``code`` and ``message``
    base_options = {}  # of `load_base`, beside the name

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
        content = settings or {}
        if not isinstance(content, dict):
            content = read_yaml(resolve(content))
        self.settings = {name: keys for name, keys in content.items() if isinstance(keys, dict)}
        stated = Path(str(self.settings.get("training", {}).get("data_dir")))
        if data_dir is None and stated.is_absolute() and stated.is_dir():
            data_dir = stated  # a relative one lies in a folder that nobody names
        self.image = None if image is None else resolve(image)
        if data_dir is not None:
            self.data_dir = resolve(data_dir)
        for kind, path in (("dataset", vars(self).get("data_dir")), ("image", self.image)):
            if path is not None and not path.exists():
                raise InputError(f"no such {kind}", where=path, fix="check the path")
        if log is not None:
            self.log = read_log(log)
        if name := base or self.settings.get("model", {}).get("name"):
            self.base_name = name
        self.given_words, self.prompt = [*words], prompt
        if words:
            self.trained_words = self.given_words
        self._answers = {True: {}, False: {}}

    def __getattr__(self, name):
        """Say of a part that is not there how to give it."""
        if name in _PART_OF:
            raise Missing(_PART_OF[name], self.is_live)
        if name in _OWN:
            raise Inapplicable("only a run folder of this project records it")
        raise AttributeError(name)

    def at_rest(self):
        """Return the context in which the models are asked."""
        return nullcontext()

    @part
    def config(self):
        """Settings: a `Config`, or what is stated beside the questions that the diagnosis asks."""
        asked = load_config(CONFIGS / "crack_detection_config.yaml")
        names = ("model", "lora", "training")
        sections = {n: Stated(self.is_live, f"{n}.", self.settings.get(n, {})) for n in names}
        sections["data"] = asked.data.model_copy(update={"prompt": None, "prompts_by_category": {}})
        if "num_epochs" in vars(sections["training"]):
            sections["effective_num_epochs"] = sections["training"].num_epochs
        return Stated(self.is_live, "", sections | {"evaluation": asked.evaluation})

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
    def own_names(self):
        """The words that the training asks for objects."""
        queries = [query for _, query, _ in self.train_queries]
        return sorted({query["prompt"] for query in queries if query["is_positive"]})

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
        records = [record for name in self.split_names[::-1] for record in self.split(name).records]
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
        return self.given_words or list(self.split("valid").categories)

    @part
    def device(self):
        """Where run and base compute: the accelerator if there is one."""
        return best_device()

    @part
    def base(self):
        """A second model without any adapter, and its processor."""
        model, processor = load_base(self.base_name, **self.base_options)
        return model.to(self.device), processor

    @part
    def is_adapter(self):
        """Whether the weights are those of a PEFT adapter, and not of a full model."""
        return (self.place / lora.CONFIG_FILE).is_file()

    @part
    def adapter_weights(self):
        """The tensors of the adapter by name, whatever their values."""
        if not self.is_adapter:
            raise Inapplicable("it is a full model, without adapter")
        return lora.read_adapter_weights(self.place)

    @part
    def weights(self):
        """The tensors of the adapter or the full model by name, whatever their values."""
        with suppress(Inapplicable):
            return self.adapter_weights
        is_file = not self.is_live
        return read_source(self.place).tensors if is_file else dict(self.model.named_parameters())

    @part
    def loaded(self):
        """The trained model, with ``model`` and ``processor``."""
        if self.is_adapter:
            model, processor = load_base(self.base_name, **self.base_options)
            model = lora.load_adapter(model, self.place)
        else:
            model, processor = load_base(self.place)
        return SimpleNamespace(model=model.to(self.device), processor=processor)

    @part
    def adapter_report(self):
        """The adapter as it is loaded, see `helpers.model.adapter_report`."""
        if not self.is_adapter:
            raise Inapplicable("it is a full model, without adapter")
        return adapter_report(self.loaded.model)

    @part
    def sizes(self):
        """Cells along a mask and number of queries, of the model or, unknown, of SAM3 itself."""
        try:
            model = self.loaded.model if self.is_live else self.base[0]
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
        pairs = product(records, prompts)
        return {(one.image_id, prompt): answers[one.path, prompt] for one, prompt in pairs}

    def predictor(self, adapted):
        """Return a `helpers.detect.Predictor` of the run, or of its base."""
        if adapted:
            return Predictor(self.loaded.model, self.loaded.processor)
        return Predictor(*self.base)


class Examination(Patient):
    """A run folder of this project, of an interrupted run with at least ``config.yaml``.

    ``data_dir`` stands in for the dataset of the config; for ``image`` and ``prompt`` see `Patient`.
    """

    is_own = is_adapter = True
    split_names = ("train", "valid")

    def __init__(self, folder, data_dir=None, image=None, prompt=None):
        self.folder = resolve(folder)
        if not (self.folder / run_folder.RUN_CONFIG).is_file():
            fix = "name the folder of a run, or train one with 'python -m helpers train'"
            raise InputError(f"holds no {run_folder.RUN_CONFIG}", where=self.folder, fix=fix)
        self.place, self.config = self.folder, run_folder.read_config(self.folder)
        self.base_options = self.config.model.model_dump(exclude={"name"})
        self.base_options["dtype"] = base_dtype(self.config.training.mixed_precision)
        data_dir, base = resolve(data_dir or self.config.data.data_dir), self.config.model.name
        super().__init__(data_dir=data_dir, base=base, image=image, prompt=prompt)

    @part
    def is_finished(self):
        """Whether the run wrote its metrics, which come last."""
        return (self.folder / run_folder.METRICS_FILE).is_file()

    @part
    def files(self):
        """What the run wrote, a `helpers.train.run.RunFiles`; InputError if it is unfinished."""
        return run_folder.read_run(self.folder)

    @part
    def log(self):
        """The log of the run, also of an unfinished one, see `helpers.diagnose.logs.read_log`."""
        return tidy_log(run_folder.read_history(self.folder))

    @part
    def adapter_report(self):
        """What the run recorded of its adapter, with the gradient of the first step."""
        return self.files.adapter

    @part
    def trained_parameters(self):
        """What the run recorded of its optimiser."""
        if counts := self.files.metrics.get("trained_parameters"):
            return counts
        raise InputError("the run recorded no number of trained parameters", fix="train again")

    @part
    def dataset(self):
        """What the run was trained on or what stands in for it, a `helpers.data.Dataset`."""
        return load_dataset(self.config, self.data_dir)

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
    def train_queries(self):
        """What reaches the loss, of images evenly spaced: list of (ImageRecord, query, target)."""
        dataset, collate, queries = self.train_dataset, PromptCollator(self.base[1]), []
        for index in range(0, len(dataset), max(1, len(dataset) // TRAIN_SAMPLE)):
            batch = collate([dataset[index]])
            pairs = zip(batch["queries"], batch["targets"], strict=True)
            queries += [(dataset.records[index], query, target) for query, target in pairs]
        return queries

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


class Foreign(Patient):
    """A PEFT folder over the names of `Sam3Model`, or a folder of a full model, whoever wrote it."""

    def __init__(self, place, findings=(), keeper=None, **given):
        super().__init__(**given)
        self.place, self.findings, self._keeper = Path(place), findings, keeper
        if not self.is_adapter:
            return
        content, path = read_json(self.place / lora.CONFIG_FILE), self.place / lora.BASE_FILE
        lora.check_config(content, {}, self.place / lora.CONFIG_FILE)
        identity = read_json(path) if path.is_file() else {}
        self.base_options = {
            "resolution": identity.get("resolution"),
            "native_prompt": bool(identity.get("native_prompt")),  # as `load_adapter` does
        }
        noted = identity.get("name") or content.get("base_model_name_or_path")
        if given.get("base") is None and noted:
            self.base_name = str(noted)
        if keeper is None and "lora_dropout" in content:  # an import knows nothing of it
            own = {"dropout": content["lora_dropout"]}
            self.settings["lora"] = own | self.settings.get("lora", {})


class LivePatient(Patient):
    """Objects of a training in a notebook; whatever is left out is not examined.

    Parameters
    ----------
    model : transformers.Sam3Model or peft.PeftModel of one, optional
        As trained, or before training.
    processor : transformers.Sam3Processor, optional
    batches : iterable of dict, optional
        What the loop reads, of which 16 are looked at. Each has ``pixel_values`` (I, 3, S, S),
        ``input_ids`` and ``attention_mask`` (B, T), and ``targets`` or ``labels``, B dicts: ``boxes``
        (or ``boxes_cxcywh``) (n, 4), or ``masks`` (n, h, w), or both. Row b belongs to image b, or to
        ``image_index[b]``. It may have ``image_ids``, I file names of the dataset.
    loss : callable, optional
        ``loss(outputs, targets)`` of the model's outputs and the targets of a batch: a scalar, or a
        dict of terms with their sum as ``loss`` or ``total``.
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
        if model is not None and not isinstance(base_of(model), Sam3Model):
            name = type(base_of(model)).__name__
            raise InputError(f"the model is a {name}", fix="give a Sam3Model, with or without PEFT")
        self._model, self._processor, self._batches = model, processor, batches
        if isinstance(model, PeftModel):
            own = model.active_peft_config
            self.settings["lora"] = {"dropout": own.lora_dropout} | self.settings.get("lora", {})
            if own.base_model_name_or_path and "base_name" not in vars(self):
                self.base_name = own.base_model_name_or_path
        self.base_options = {"native_prompt": getattr(base_of(model), "native_prompt", False)}
        for name, function in (("loss", loss), ("detect", detect)):
            if function is not None and not callable(function):
                raise InputError(f"{name} is {function!r:.60}", fix="give a function")
            if function is not None:
                setattr(self, name, function)

    @part
    def model(self):
        """The model as it was given."""
        if self._model is None or self._processor is None:
            raise Missing("weights", is_live=True)
        return self._model

    @part
    def loaded(self):
        """The model in the form that is asked, sharing all weights with the one given."""
        return SimpleNamespace(model=prompted_view(self.model), processor=self._processor)

    @part
    def device(self):
        """Where the model is."""
        return next(self.model.parameters()).device

    def predictor(self, adapted):
        """Return a predictor of the model; of the base it holds, or of the one that was named."""
        if adapted or not isinstance(self.model, PeftModel):
            return super().predictor(adapted)
        predictor = super().predictor(adapted=True)
        predictor.raw = self._peft_model.disable_adapter()(predictor.raw)  # off while it is asked
        return predictor

    @contextmanager
    def at_rest(self):
        """Put back afterwards which modules of the model were in training."""
        modules = [] if self._model is None else self._model.modules()
        modes = {module: module.training for module in modules}
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def _peft_model(self):
        if not isinstance(self.model, PeftModel):
            raise Inapplicable("the model carries no adapter of PEFT")
        return self.model

    @part
    def adapter_weights(self):
        """The tensors of the adapter in memory, by the names that PEFT would save."""
        weights = get_peft_model_state_dict(self._peft_model, save_embedding_layers=False)
        return {name: tensor.detach().cpu() for name, tensor in weights.items()}

    @part
    def adapter_report(self):
        """The adapter in memory, with the gradients that the last backward pass left."""
        return adapter_report(self._peft_model)

    @part
    def trained_parameters(self):
        """How many parameters a training would change, ``all`` and of ``lora``."""
        named = self._peft_model.named_parameters()
        sizes = {n: p.numel() for n, p in named if p.requires_grad and "modules_to_save" not in n}
        lora = sum(size for name, size in sizes.items() if ".lora_" in name)
        return {"all": sum(sizes.values()), "lora": lora}

    @part
    def batches(self):
        """The first batches: list of dict of ``inputs``, ``targets`` as given, ``rows``."""
        if self._batches is None or self._processor is None:
            raise Missing("batches", is_live=True, what="the batches, and processor=")
        with explain(_UNREADABLE, "a batch cannot be read", where="batches", fix=_AS_GIVEN):
            batches = [self._batch(batch) for batch in islice(self._batches, MAX_BATCHES)]
        if not batches:
            raise InputError("there is no batch", where="batches", fix="give the loader itself")
        return batches

    @property
    def trains_masks(self):
        """Whether any target of the batches has masks, be they empty."""
        return any(t.get("masks") is not None for batch in self.batches for t in batch["targets"])

    def _batch(self, batch):
        """Check one batch and gather, row by row, what its words and objects are."""
        keys = list(batch.keys()) if hasattr(batch, "keys") else [type(batch).__name__]
        named = "labels" if "labels" in keys and "targets" not in keys else "targets"
        if lacking := [name for name in (*_INPUTS, named) if name not in keys]:
            raise _bad_batch(f"a batch lacks {', '.join(lacking)}; it has {', '.join(keys)}")
        inputs, targets = {name: batch[name] for name in _INPUTS}, batch[named]
        num_rows, num_images = len(inputs["input_ids"]), len(inputs["pixel_values"])
        index = batch["image_index"] if "image_index" in keys else range(num_rows)
        index = [int(image) for image in index]
        if len(targets) != num_rows:
            raise _bad_batch(f"a batch has {num_rows} prompts and {len(targets)} targets")
        if len(index) != num_rows or max(index) >= num_images:
            raise _bad_batch(f"{num_rows} prompts, {num_images} images and no image_index for them")
        inputs["image_index"] = torch.tensor(index)
        names = batch["image_ids"] if "image_ids" in keys else [None] * num_images
        decode, rows = self._processor.tokenizer.decode, []
        for image, ids, target in zip(index, inputs["input_ids"], targets, strict=True):
            objects, word = _objects(target), decode(ids, skip_special_tokens=True).strip()
            is_positive = bool(len(objects["boxes_cxcywh"]))
            query = {"prompt": word, "is_positive": is_positive, "image_id": names[image]}
            rows.append((query, objects))
        return {"inputs": inputs, "targets": targets, "rows": rows}

    @part
    def train_queries(self):
        """What reaches the loss: list of (ImageRecord or None, query, target)."""
        rows = [row for batch in self.batches for row in batch["rows"]]
        records = {}
        if any(query["image_id"] is not None for query, _ in rows):
            for record in self.split("train").records:
                records |= {record.image_id: record, record.path.name: record}
        return [(records.get(str(query["image_id"])), query, objects) for query, objects in rows]

    @part
    def trained_words(self):
        """The words that have objects in the batches."""
        return self.own_names


def _bad_batch(message):
    return InputError(message, where="batches", fix=_AS_GIVEN)


def _objects(target):
    """Return the objects of one target as float ``boxes_cxcywh``, ``masks`` and ``mask_valid``."""
    boxes, masks = target.get("boxes_cxcywh", target.get("boxes")), target.get("masks")
    if boxes is None and masks is None:
        raise _bad_batch(f"a target lacks boxes; it has {', '.join(map(str, target))}")
    masks = torch.zeros(0) if masks is None else torch.as_tensor(masks).cpu()
    masks = masks.reshape(-1, *masks.shape[-2:]) if masks.numel() else torch.zeros(0, 0, 0)
    if boxes is None:  # a loop that trains outlines alone
        boxes = box_convert(tight_boxes(masks), "xyxy", "cxcywh") if len(masks) else []
    boxes = torch.as_tensor(boxes).detach().float().cpu().reshape(-1, 4)
    masks = masks if len(masks) else torch.zeros(len(boxes), 0, 0)
    if len(masks) != len(boxes):
        raise _bad_batch(f"a target has {len(boxes)} boxes and {len(masks)} masks")
    return {"boxes_cxcywh": boxes, "masks": masks, "mask_valid": masks.flatten(1).bool().any(1)}


def prompted_view(model):
    """Return a `PromptedSam3` that shares every module with a `Sam3Model`, which stays as it is."""
    view = base_of(model)
    if not isinstance(view, PromptedSam3):
        view = copy(view)  # a new object around the same modules
        view.__class__ = PromptedSam3
    return view


def open_patient(source, *, config=None, log=None, alpha=None, orientation=None, **given):
    """Recognise what somebody has in hand of a training, and return it as a `Patient`.

    Parameters
    ----------
    source : os.PathLike
        Run folder of this project; PEFT folder; ``*_lora_weights.pt`` of Sompote/SAM3_LoRA or its
        folder; ``checkpoint.pt`` of Meta's trainer; folder of a `Sam3Model`; a log; or a dataset.
    config, log : os.PathLike, optional
        ``settings`` and ``log`` of `Patient`; found by themselves if they lie beside the weights.
    **given
        ``data_dir``, ``base``, ``words``, ``image``, ``prompt`` of `Patient`; for what has to be
        imported ``alpha`` and ``orientation``, too.

    Returns
    -------
    Patient
        InputError if the source is none of these.
    """
    path = resolve(source)
    if not path.exists():
        raise InputError("no such file or folder", where=path, fix=_SOURCES)
    path = path / "adapter" if (path / "adapter" / lora.CONFIG_FILE).is_file() else path
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    weights = [n for n in names if n.endswith((".pt", ".pth"))] or [*path.glob("checkpoints/*.pt")]
    if path.is_dir() and not weights and not names & {"config.json", lora.CONFIG_FILE}:
        path = Path(get_last_checkpoint(path) or path)  # of a Trainer that saved nothing else
        names = {entry.name for entry in path.iterdir()}
    folder = path if path.is_dir() else path.parent
    if names & _OWN_MARKS or (run_folder.RUN_CONFIG in names and not weights):
        own = ("data_dir", "image", "prompt")
        return Examination(path, **{name: given.get(name) for name in own})
    given["settings"] = config
    if path.is_file() and path.suffix.lower() in (".json", ".jsonl", ".csv", ".txt", ".log"):
        return Patient(**given, log=path if log is None else log)
    for name in LOG_FILES if log is None else ():
        with suppress(InputError):  # such as one of a validation that logs no loss
            log = read_log(folder / name) if log is None else log
    given["log"] = log
    if "config.json" in names or (lora.CONFIG_FILE in names and not _is_to_import(path)):
        return Foreign(path, **given)
    if path.is_file() or weights or lora.CONFIG_FILE in names:
        return _imported(path, folder, given, alpha=alpha, orientation=orientation)
    if log is not None:
        return Patient(**given)
    try:
        find_splits(path)
    except InputError as error:
        message = "is no run, adapter, model, log or dataset that is known here"
        raise InputError(f"{message} ({error.message})", where=path, fix=_SOURCES) from error
    return Patient(**given | {"data_dir": path})


def _is_to_import(folder):
    """Return whether a folder of PEFT has its weights in torch's file, or in the names of Meta's code."""
    if (folder / lora.WEIGHTS_FILE).is_file():
        with suppress(InputError):  # damaged: the diagnosis says so
            return any(map(OF_META.search, lora.read_adapter_weights(folder)))
        return False
    return True


def _imported(path, folder, given, **options):
    """Return the patient of weights that have to be imported, into a folder that goes with it."""
    keeper = tempfile.TemporaryDirectory(prefix="imported-")
    given["settings"] = given["settings"] or yaml_beside(folder)
    place = Path(keeper.name) / "model"
    report = import_source(path, place, config=given["settings"], base=given.get("base"), **options)
    return Foreign(place, report.findings, keeper, **given)
