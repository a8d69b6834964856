"""Read YAML as version 1.2 defines it, so that a config means what it looks like.

PyYAML follows YAML 1.1, where ``5e-5`` is a string, ``no`` is false, ``010`` is eight and a key
given twice silently keeps its last value. Each of these changes a training run without a word.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from helpers.errors import InputError


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
