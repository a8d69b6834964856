"""The frame of a panel that is a picture where no kernel runs."""

import ipywidgets as widgets

from helpers.show.page import with_still


class StillBox(widgets.VBox):
    """Controls above a picture; ``still``, it and its sentence, is seen without a kernel."""

    def __init__(self, *children):
        super().__init__(children)
        self.still = ()

    def _repr_mimebundle_(self, **kwargs):
        return with_still(super()._repr_mimebundle_(**kwargs), self.still)
