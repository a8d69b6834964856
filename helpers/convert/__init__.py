"""From any common format to the layout that training reads."""

from helpers.convert.conversion import convert, detect_format
