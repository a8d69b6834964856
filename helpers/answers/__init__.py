"""What the commands say: a template for each, which is filled in from the JSON document."""

from helpers.answers.text import answer_text
