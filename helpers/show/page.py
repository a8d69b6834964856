"""Pages that need no other file and no network, from the templates in ``pages/``."""

from pathlib import Path

from helpers.answers.text import templates_in


def render_page(name, **values):
    """Return the text of the page ``pages/NAME.html`` with some values filled in."""
    # Escaped, as a file name or a word may hold anything.
    pages = templates_in(Path(__file__).with_name("pages"), autoescape=True)
    return pages.get_template(f"{name}.html").render(**values)
