"""The configuration of a run: strict sections, overlays, and errors that name the closest key."""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from helpers.config_schema import (
    DataSection,
    EvaluationSection,
    GuardSection,
    LoraSection,
    LossSection,
    ModelSection,
    OutputSection,
    ScaleSection,
    Section,
    TrainingSection,
)
from helpers.errors import InputError
from helpers.files import CONFIGS, resolve


class Yaml12Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalar types of YAML 1.2 and unique keys.

    A number with leading zeros stays a string: nobody can tell which number was meant.
    """

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        """Build a dict as `yaml.SafeLoader` does, refusing a key that occurs twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice or is no name", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
):
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def parse_yaml(text, *, where):
    """Parse one YAML document.

    Parameters
    ----------
    text : str
        The document. ``5e-5`` is a float, ``no`` and ``yes`` are strings, ``010`` is a string.
    where : str or os.PathLike
        Named in the error.

    Returns
    -------
    object
        Dicts, lists, strings, numbers, booleans and None.

    Raises
    ------
    InputError
        If the text is no YAML or gives a key twice; the line and column are named.
    """
    try:
        return yaml.load(text, Loader=Yaml12Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = (
            where if mark is None else f"{where}, line {mark.line + 1}, column {mark.column + 1}"
        )
        problem = getattr(error, "problem", None) or error
        raise InputError(
            f"not valid YAML ({problem})", where=place, fix="mend this line"
        ) from error


def read_yaml(path):
    """Read a YAML file whose top level is a mapping.

    Parameters
    ----------
    path : os.PathLike
        A UTF-8 text file.

    Returns
    -------
    dict
        Empty for an empty file.

    Raises
    ------
    InputError
        If the file is missing, is no UTF-8 text, is no YAML, or holds anything but a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror or error})", where=path, fix="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=path, fix="save it as UTF-8") from error
    content = parse_yaml(text, where=path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(
            f"holds a {type(content).__name__} where sections are expected",
            where=path,
            fix="write 'section:' with indented 'key: value' lines",
        )
    return content


class Config(Section):
    """A resolved configuration, read-only; `load_config` builds it.

    Attributes
    ----------
    model, lora, data, training, loss, evaluation, guards, output, scale : Section
        The sections of the YAML file; ``config.training.num_epochs`` is a value in it.
    """

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
        """Return the resolved configuration as YAML text that `load_config` reads back.

        Returns
        -------
        str
            Sections and keys in the order of the classes.
        """
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save(self, path):
        """Write the resolved configuration; `load_config` on the file gives an equal one.

        Parameters
        ----------
        path : os.PathLike
            Its folder is made if need be.

        Returns
        -------
        pathlib.Path
            The file written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf-8")
        return path

    def fingerprint(self):
        """Return 12 hexadecimal digits of the SHA-256 of what decides the result of a run.

        Returns
        -------
        str
            Equal for equal configurations, whatever files and overlays they came from. The guards
            are left out: they stop a run or let it go on as it is. So are the feature cache, and an
            empty ``data.prompts_by_category``, which a config from before that key lacks.
        """
        training = self.training.model_copy(update={"feature_cache": None})
        copy = self.model_copy(update={"guards": None, "training": training})
        text = copy.to_yaml().replace("guards: null\n", "").replace("  feature_cache: null\n", "")
        text = text.replace("  prompts_by_category: {}\n", "")
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def load_config(path, profile=None, overrides=()):
    """Read a config file, lay a profile and overrides over it, and check everything.

    Parameters
    ----------
    path : str or os.PathLike
        The YAML file, see `helpers.files.resolve`.
    profile : str or os.PathLike, optional
        Name of a file in ``configs/profiles`` without its ending, or a path.
    overrides : sequence of str
        ``"section.key=value"``, the value in YAML: ``"training.num_epochs=3"``.

    Returns
    -------
    Config
        The resolved configuration.

    Raises
    ------
    InputError
        If a file is missing or no YAML, a key is unknown (the closest valid one is named) or
        missing, or a value has the wrong type or is impossible.
    """
    path = resolve(path)
    values, origins = {}, {}
    _overlay(values, origins, read_yaml(path), path)
    if profile is not None:
        profile_path = _profile_path(profile)
        _overlay(values, origins, read_yaml(profile_path), profile_path)
    for override in overrides:
        _overlay(values, origins, _parse_override(override), f"override {override!r}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error.errors()[0], origins, path) from error


def _profile_path(profile):
    """Find a profile by name in `CONFIGS` or by path, or raise an InputError that lists them."""
    named = CONFIGS / "profiles" / f"{profile}.yaml"
    if named.is_file():
        return named
    if resolve(profile).is_file():
        return resolve(profile)
    names = sorted(file.stem for file in named.parent.glob("*.yaml"))
    raise InputError(f"there is no profile {str(profile)!r}", fix=f"use one of {', '.join(names)}")


def _parse_override(text):
    """Turn ``section.key=value`` into ``{section: {key: value}}``."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise InputError(
            f"the override {text!r} is not understood",
            fix="write section.key=value, for example training.num_epochs=3",
        )
    return {section: {key: parse_yaml(value, where=f"override {text!r}")}}


def _overlay(values, origins, layer, where):
    """Merge one layer into ``values`` in place; ``origins`` maps (section, key) to who set it last."""
    for section, keys in layer.items():
        if section not in Config.model_fields:
            raise _unknown_key(str(section), str(section), Config.model_fields, where)
        if not isinstance(keys, dict):
            raise InputError(
                f"section '{section}' holds {keys!r} and no keys",
                where=where,
                fix=f"indent its keys below '{section}:'",
            )
        valid = Config.model_fields[section].annotation.model_fields
        for key, value in keys.items():
            if key not in valid:
                raise _unknown_key(f"{section}.{key}", str(key), valid, where)
            values.setdefault(section, {})[key] = value
            origins.pop((section, key), None)  # the newest setter comes last in the dict
            origins[section, key] = where


def _unknown_key(full_name, key, valid, where):
    """Build the InputError for a key that no section has, naming the closest valid one."""
    elsewhere = [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        if key in field.annotation.model_fields
    ]
    close = elsewhere or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    fix = f"did you mean '{close[0]}'?" if close else f"valid keys are {', '.join(valid)}"
    return InputError(f"unknown key '{full_name}'", where=where, fix=fix)


def _explain(problem, origins, path):
    """Turn the first problem pydantic reports into an InputError naming file, key and value."""
    section, *rest = problem["loc"]
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        message = "the text must not be blank"
    if problem["type"] == "missing":
        return InputError(f"the key '{key}' is missing", where=path, fix="add it to the file")
    if not rest:  # a rule between keys: the one set last is the likely culprit
        where = [setter for (name, _), setter in origins.items() if name == section][-1]
        return InputError(f"section '{section}': {message}", where=where, fix="change one of them")
    kind = type(problem["input"]).__name__
    return InputError(
        f"'{key}' is {problem['input']!r} ({kind}): {message}",
        where=origins[section, rest[0]],
        fix=f"correct the value of '{section}.{rest[0]}'",
    )
