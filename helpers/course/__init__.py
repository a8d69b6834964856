"""What the notebooks of the course share."""

from helpers.course.examples import (
    import_dataset,
    lay_out,
    losses_beside_silence,
    open_photograph,
    queries_by_category,
)
from helpers.course.notebook import answered, start
