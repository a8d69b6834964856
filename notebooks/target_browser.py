"""A panel to browse what the loss is given, image by image and prompt by prompt."""

from types import SimpleNamespace

import ipywidgets as widgets

from helpers.errors import InputError
from helpers.show.panels import describe_target, image_html, target_picture
from notebooks.still import StillBox

WIDE = {"style": {"description_width": "initial"}}
WIDE |= {"layout": {"width": "32em", "max_width": "100%"}}


def browse_panel(batch, image_processor):
    """Make a panel of `target_picture` with the parts ``image``, ``prompt`` and ``widget``."""
    if not batch["queries"]:
        raise InputError("the batch has no query", fix="collate at least one image with a prompt")
    rows = {}
    for row, query in enumerate(batch["queries"]):
        rows.setdefault(query["image_id"], {})[query["prompt"]] = row
    panel = SimpleNamespace(readout=widgets.Label(), picture=widgets.HTML())
    look = {"description": "image", "continuous_update": False, **WIDE}
    panel.image = widgets.SelectionSlider(options=list(rows), **look)
    first = list(rows[panel.image.value])
    panel.prompt = widgets.Dropdown(options=first, description="prompt", **WIDE)
    panel.widget = StillBox(panel.image, panel.prompt, panel.readout, panel.picture)

    def draw(_change=None):
        row = rows[panel.image.value][panel.prompt.value]
        panel.readout.value = describe_target(batch, row)
        picture = target_picture(batch, row, image_processor)
        sentence = f"{panel.image.value}, {panel.readout.value}."
        panel.picture.value, panel.widget.still = image_html(picture, sentence), (picture, sentence)

    def offer_prompts(_change):
        panel.prompt.options = list(rows[panel.image.value])
        draw()  # the first prompt may be the same word as before, which is no change

    panel.image.observe(offer_prompts, names="value")
    panel.prompt.observe(draw, names="value")
    draw()
    return panel
