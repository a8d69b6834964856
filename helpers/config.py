"""The configuration of a run: strict sections, overlays, and errors that name the closest key."""

import difflib
import hashlib
import io
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from helpers.errors import InputError, explain
from helpers.files import CONFIGS, resolve

_MAX_CHARACTERS = 1_000_000  # of a YAML file; a config has 4,000
_MAX_BRACKETS = 1000  # opened in it; how long nested ones take grows with their square
_SYSTEM_FOLDERS = ("dev", "proc", "sys")


def _not_blank(text):
    """Refuse a text without a visible character, or with one that no file name can have."""
    if not text.strip():
        raise ValueError("the text must not be blank")
    if "\0" in text:
        raise ValueError("the text must not hold a null character")
    return text


def _folder_name(text):
    """Refuse what would lead out of the folder it is a name in."""
    if text in (".", "..") or "/" in text or "\\" in text:
        raise ValueError("the name of a folder is needed, not a path")
    return text


def _output_folder(text):
    """Refuse a folder in which no run belongs."""
    path = PurePath(text)
    if ".." in path.parts:
        raise ValueError("'..' is not allowed here; write an absolute path")
    if path.is_absolute() and (len(path.parts) == 1 or path.parts[1] in _SYSTEM_FOLDERS):
        raise ValueError("no run can be written there")
    return text


Name = Annotated[str, Field(max_length=4096), AfterValidator(_not_blank)]
FolderName = Annotated[str, Field(max_length=255), AfterValidator(_not_blank), AfterValidator(_folder_name)]  # fmt: skip
Revision = Annotated[str, Field(max_length=255, pattern=r"^[\w./-]+$")]
Noun = Annotated[str, Field(max_length=200), AfterValidator(_not_blank)]
Names = Annotated[tuple[Noun, ...], Field(strict=False)]
Threshold = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _refuse_duplicates(words, key):
    folded = [word.strip().casefold() for word in words]
    doubles = sorted({word for word in folded if folded.count(word) > 1})
    if doubles:
        raise ValueError(f"{key} lists {', '.join(doubles)} more than once")


class Section(BaseModel):
    """Base of all sections: no unknown key, no conversion of types, no change after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model, and its square input size in pixels."""

    name: Name
    revision: Revision | None
    resolution: Annotated[int, Field(ge=28, le=4032)]
    # Whether the geometry encoder's token follows every prompt; null: as the base was trained.
    native_prompt: bool | None = None


class LoraSection(Section):
    """Where the low-rank updates sit and how wide they are; scale of the update: alpha / rank."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0, le=65536)]
    dropout: Decay
    target_modules: Annotated[Names, Field(min_length=1)]
    apply_to_vision_encoder: bool
    apply_to_text_encoder: bool
    apply_to_geometry_encoder: bool
    apply_to_detr_encoder: bool
    apply_to_detr_decoder: bool
    apply_to_mask_decoder: bool

    @model_validator(mode="after")
    def _adapts_something(self):
        _refuse_duplicates(self.target_modules, "target_modules")
        if not any(value for key, value in self if key.startswith("apply_")):
            raise ValueError("every apply_to_* is false, so nothing would be trained")
        return self


class DataSection(Section):
    """The images, the prompts asked about them, and the absent prompts added to each image."""

    data_dir: Name
    train_split: FolderName
    val_split: FolderName
    prompt: Noun | None
    prompts_by_category: dict[Noun, Noun] = {}
    num_negatives: Annotated[int, Field(ge=0, le=100)]
    negative_prompts: Names
    replay_words: Names = ()

    @model_validator(mode="after")
    def _splits_and_prompts_differ(self):
        if self.train_split == self.val_split:
            raise ValueError("train_split and val_split are the same, so nothing would be judged")
        if self.prompt is not None and (self.prompts_by_category or self.replay_words):
            keys = "prompts_by_category and replay_words must be empty"
            raise ValueError(f"prompt replaces every category, so {keys}")
        own = () if self.prompt is None else (self.prompt,)
        _refuse_duplicates((*own, *self.negative_prompts), "prompt and negative_prompts")
        _refuse_duplicates(self.replay_words, "replay_words")
        return self


class TrainingSection(Section):
    """Optimiser, schedule and precision, with the names `transformers.TrainingArguments` knows."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    adam_beta1: Decay
    adam_beta2: Decay
    adam_epsilon: Annotated[float, Field(gt=0, le=0.1)]
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e9)]
    num_epochs: Annotated[int, Field(ge=1, le=100_000)]
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)]
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)]
    mixed_precision: Literal["bf16", "fp16", "no"]
    gradient_checkpointing: bool
    feature_cache: Name | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    logging_steps: Annotated[int, Field(ge=1, le=1_000_000)]
    save_total_limit: Annotated[int, Field(ge=1, le=10_000)]


class LossSection(Section):
    """Which loss is minimised: SAM3's own, or the one the failing script used."""

    variant: Literal["native", "early"]


class EvaluationSection(Section):
    """Thresholds in probability, the prompts asked although absent, and the deciding metric."""

    score_threshold: Threshold
    mask_threshold: Threshold
    absent_prompts: Names
    metric_for_best: Literal["cgF1", "pmF1", "AP", "AP50", "AP75"]

    @model_validator(mode="after")
    def _metric_can_be_computed(self):
        _refuse_duplicates(self.absent_prompts, "absent_prompts")
        if self.metric_for_best == "cgF1" and not self.absent_prompts:
            raise ValueError("metric_for_best cgF1 needs at least one entry in absent_prompts")
        return self


class OutputSection(Section):
    """Where a run is written."""

    output_dir: Annotated[Name, AfterValidator(_output_folder)]


class GuardSection(Section):
    """Which faults stop a training run as soon as they show; see `helpers.train.guards`."""

    no_objects: bool
    box_and_mask_terms: bool
    vanishing_loss: bool
    adapter_at_zero: bool
    not_finite: bool
    at_clamp: bool
    only_positive_prompts: bool
    dominant_term: bool


class ScaleSection(Section):
    """Multipliers of the schedule, set by a profile so that one config serves both bases."""

    learning_rate: Annotated[float, Field(gt=0, le=1e6)]
    num_epochs: Annotated[float, Field(gt=0, le=1000)]
    warmup_steps: Annotated[float, Field(ge=0, le=1000)]


# What decides no number of the result: where things lie, what is written down, what only stops a
# run, and how its steps are computed. The scale is part of the effective values.
_WITHOUT_EFFECT = {
    "data": {"data_dir"},
    "training": {"feature_cache", "gradient_checkpointing", "num_workers"}
    | {"logging_steps", "save_total_limit"},
    "guards": True,
    "output": True,
    "scale": True,
}


class Config(Section):
    """A resolved configuration, read-only, section by section; `load_config` builds it."""

    model: ModelSection
    lora: LoraSection
    data: DataSection
    training: TrainingSection
    loss: LossSection
    evaluation: EvaluationSection
    guards: GuardSection
    output: OutputSection
    scale: ScaleSection

    @property
    def effective_learning_rate(self):
        """float: peak learning rate after the profile's multiplier."""
        return self.training.learning_rate * self.scale.learning_rate

    @property
    def effective_num_epochs(self):
        """int: epochs after the profile's multiplier, rounded, at least 1."""
        return max(1, round(self.training.num_epochs * self.scale.num_epochs))

    @property
    def effective_warmup_steps(self):
        """int: optimiser steps of warm-up after the profile's multiplier, rounded, at least 0."""
        return round(self.training.warmup_steps * self.scale.warmup_steps)

    def to_yaml(self):
        """Return the resolved configuration as YAML text that `load_config` reads back."""
        return yaml_text(self.model_dump(mode="json"))

    def replace(self, changes):
        """Return a checked copy with other values, from ``"section.key"`` to value."""
        values = self.model_dump()
        for name, value in changes.items():
            section, _, key = name.partition(".")
            values[section][key] = value
        return type(self).model_validate(values)

    def fingerprint(self):
        """Return 12 hexadecimal digits, equal for configs that give the same result on the same data."""
        values = self.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
        for key in ScaleSection.model_fields:
            values["training"][key] = getattr(self, f"effective_{key}")
        for section, key in (("data", "replay_words"), ("model", "native_prompt")):
            if not values[section][key]:  # runs from before there were any keep their fingerprint
                del values[section][key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def load_config(path, profile=None, overrides=()):
    """Read a config file, lay a profile and overrides over it, and return the checked `Config`.

    `path` is a YAML file, see `helpers.files.resolve`; `profile` the name of a file in
    ``configs/profiles`` without its ending, or a path; `overrides` a mapping such as
    ``{"training.num_epochs": 3}``, or a sequence of such pairs and of texts
    ``"training.num_epochs=3"``, whose value is YAML: no place for a path, as ``#`` starts a comment.
    """
    path, values, origins = resolve(path), {}, {}
    _overlay(values, origins, read_yaml(path), path)
    if profile is not None:
        profile_path = _profile_path(profile)
        _overlay(values, origins, read_yaml(profile_path), profile_path)
    for override in overrides.items() if isinstance(overrides, Mapping) else overrides:
        _overlay(values, origins, *_parse_override(override))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error.errors()[0], origins, path) from error
    if (rate := config.effective_learning_rate) > 1:
        message = f"training.learning_rate x scale.learning_rate is {rate:g}, more than 1"
        raise InputError(message, where=path, fix="lower one of them")
    return config


def yaml_text(values):
    """Write nested dicts as YAML, in their order."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.dump(values, text)
    return text.getvalue()


def parse_yaml(text, *, where):
    """Return the content of a document of YAML 1.2; InputError if it is none or gives a key twice."""
    if len(text) > _MAX_CHARACTERS or text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise InputError("too long or too deep for a configuration", where=where, fix="shorten it")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    except (RecursionError, ValueError, TypeError) as error:  # 10,000 digits, a list as key
        mark, problem = None, str(error) or type(error).__name__
    place = where if mark is None else f"{where}, line {mark.line + 1}, column {mark.column + 1}"
    raise InputError(f"not valid YAML ({problem[:200]})", where=place, fix="correct this line")


def read_yaml(path):
    """Return the mapping in a UTF-8 YAML file; an `InputError` if there is none."""
    path = Path(path)
    with explain((OSError, ValueError), "cannot be read as text", where=path, fix="check the path"):
        text = path.read_text(encoding="utf-8-sig")
    content = parse_yaml(text, where=path)
    if not isinstance(content, dict | None):
        message = f"holds a {type(content).__name__} where sections are expected"
        fix = "write 'section:' with indented 'key: value' lines"
        raise InputError(message, where=path, fix=fix)
    return content or {}


def _short(value):
    """Write a value as Python would, with its middle cut out if it is long or deep."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 160
    return shortener.repr(value)


def _profile_path(profile):
    """Find a profile by name in `CONFIGS` or by path, or raise an InputError that lists them."""
    named = CONFIGS / "profiles" / f"{profile}.yaml"
    for path in (named, resolve(profile)):
        if path.is_file():
            return path
    fix = f"use one of {', '.join(sorted(file.stem for file in named.parent.glob('*.yaml')))}"
    raise InputError(f"there is no profile {_short(str(profile))}", fix=fix)


def _parse_override(override):
    """Turn ``section.key=value`` or (name, value) into ``{section: {key: value}}`` and its place."""
    is_text = isinstance(override, str)
    name, equals, value = override.partition("=") if is_text else (override[0], "=", override[1])
    where = f"override {_short(override if is_text else f'{name}={value}')}"
    section, dot, key = str(name).strip().partition(".")
    if not (equals and dot and section and key):
        fix = "write section.key=value, for example training.num_epochs=3"
        raise InputError(f"the {where} is not understood", fix=fix)
    if is_text:
        value = parse_yaml(value, where=where)
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    return {section: {key: value}}, where


def _overlay(values, origins, layer, where):
    """Merge a layer into ``values`` in place; ``origins`` maps (section, key) to who set it last."""
    for section, keys in layer.items():
        if section not in Config.model_fields:
            raise _unknown_key(str(section), str(section), Config.model_fields, where)
        if not isinstance(keys, dict):
            message = f"section '{section}' holds {_short(keys)} and no keys"
            raise InputError(message, where=where, fix=f"indent its keys below '{section}:'")
        valid = Config.model_fields[section].annotation.model_fields
        for key, value in keys.items():
            if key not in valid:
                raise _unknown_key(f"{section}.{key}", str(key), valid, where)
            values.setdefault(section, {})[key] = value
            origins.pop((section, key), None)  # the newest setter comes last in the dict
            origins[section, key] = where


def _unknown_key(full_name, key, valid, where):
    """Build the InputError for a key that no section has, naming the closest valid one."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    elsewhere = [f"{name}.{key}" for name in sections if key in sections[name].model_fields]
    close = elsewhere or difflib.get_close_matches(key[:100], valid, n=1, cutoff=0.5)
    fix = f"did you mean '{close[0]}'?" if close else f"valid keys are {', '.join(valid)}"
    return InputError(f"unknown key {_short(full_name)}", where=where, fix=fix)


def _explain(problem, origins, path):
    """Turn the first problem pydantic reports into an InputError naming file, key and value."""
    section, *rest = problem["loc"]
    key = ".".join(str(part)[:100] for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return InputError(f"the key '{key}' is missing", where=path, fix="add it to the file")
    if not rest:  # a rule between keys: the one set last is the likely culprit
        where = [setter for (name, _), setter in origins.items() if name == section][-1]
        return InputError(f"section '{section}': {message}", where=where, fix="change one of them")
    value, where = problem["input"], origins[section, rest[0]]
    message = f"'{key}' is {_short(value)} ({type(value).__name__}): {message}"
    return InputError(message, where=where, fix=f"correct the value of '{section}.{rest[0]}'")
