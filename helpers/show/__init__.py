"""Pictures, charts and panels."""

from helpers.show.charts import (
    draw_lines,
    history_frame,
    threshold_figure,
)
from helpers.show.explorer import Explorer, explorer_panel, threshold_panel
from helpers.show.panels import target_picture, targets_figure
from helpers.show.pictures import (
    TRUTH_COLOUR,
    annotate,
    comparison_figure,
    describe,
    gallery_figure,
    prediction_figure,
)
from helpers.show.report import headline, report_page
