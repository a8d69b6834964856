"""The answers of the command line as text, from the templates in this folder."""

from functools import cache
from numbers import Real
from pathlib import Path

from helpers.errors import printable


def answer_text(name, answer):
    """Return the text of an answer.

    Parameters
    ----------
    name : str
        A template, ``NAME.txt``. It knows the keys of the document by their names, and the whole of
        it as ``answer``; ``value | form(".2f")`` is Python's `format`.
    answer : dict or list
        The JSON document of the answer.

    Returns
    -------
    str
        Lines, the last without its newline. No value breaks a line or holds what a terminal would
        obey.
    """
    texts = templates_in(Path(__file__).parent, finalize=_in_line, keep_trailing_newline=True)
    values = answer if isinstance(answer, dict) else {}
    return texts.get_template(f"{name}.txt").render(values, answer=answer).removesuffix("\n")


@cache
def templates_in(folder, **settings):
    """Return the jinja2.Environment of a folder of templates; the library is loaded only now."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    settings |= {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=FileSystemLoader(folder), **settings)
    templates.filters["form"] = _form
    return templates


def _in_line(value):
    return printable(value).replace("\n", "\\n")


def _form(value, spec):
    return format(value if isinstance(value, Real) else _in_line(value), spec)
