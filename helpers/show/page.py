"""Pages that need no other file and no network, from the templates in ``pages/``."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("pages")),
    autoescape=True,  # a file name or a word may hold anything
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(name, **values):
    """Return the text of the page ``pages/NAME.html`` with some values filled in."""
    return _TEMPLATES.get_template(f"{name}.html").render(**values)
