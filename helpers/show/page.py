"""Pages that need no other file and no network, from the templates in ``pages/``."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

PAGES = Path(__file__).with_name("pages")
_TEMPLATES = Environment(
    loader=FileSystemLoader(PAGES),
    autoescape=True,  # a file name or a word may hold anything
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(name, **values):
    """Return the text of the page ``pages/NAME.html`` with some values filled in."""
    return _TEMPLATES.get_template(f"{name}.html").render(**values)


def data_uri(picture):
    """Return the data of a figure, as PNG, or of a photograph, as JPEG, as an address."""
    stream, kind = io.BytesIO(), "png" if isinstance(picture, Figure) else "jpeg"
    if kind == "png":
        picture.savefig(stream, format=kind, dpi=100)
    else:
        picture.save(stream, format=kind, quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind};base64,{data}"
