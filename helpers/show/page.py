"""Pages that need no other file and no network, from the templates in ``pages/``."""

import base64
import io
from pathlib import Path

from matplotlib.figure import Figure

from helpers.answers import templates_in

PAGES = Path(__file__).with_name("pages")


def render_page(name, **values):
    """Return the text of the page ``pages/NAME.html`` with some values filled in."""
    # Escaped, as a file name or a word may hold anything.
    pages = templates_in(PAGES, autoescape=True)
    return pages.get_template(f"{name}.html").render(**values)


def data_uri(picture):
    """Return the data of a figure, as PNG, or of a photograph, as JPEG, as an address."""
    kind, data = encoded(picture)
    return f"data:{kind};base64,{data}"


def encoded(picture):
    """Return the MIME type of a figure, PNG, or of a photograph, JPEG, and its data in base 64."""
    stream, kind = io.BytesIO(), "png" if isinstance(picture, Figure) else "jpeg"
    if kind == "png":
        picture.savefig(stream, format=kind, dpi=100)
    else:
        picture.save(stream, format=kind, quality=88)
    return f"image/{kind}", base64.b64encode(stream.getvalue()).decode()


def with_still(bundle, still):
    """Add to what a notebook shows of a widget a still, picture and sentence, or an empty one."""
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
    text = " ".join(["A panel with sliders: run the notebook to move them.", *still[1:]])
    image = dict(map(encoded, still[:1]))
    return data | {"text/plain": text} | image, metadata | {kind: {"alt": text} for kind in image}
