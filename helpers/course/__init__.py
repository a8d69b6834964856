"""What the notebooks of the course share."""

from helpers.course.notebook import answered, start
