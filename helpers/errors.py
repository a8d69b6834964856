"""The one error that a user of the workbook can cause and mend."""

import math
import unicodedata
from contextlib import contextmanager
from numbers import Real

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, surrogates, separators of lines


class InputError(Exception):
    """Unusable input: a wrong file, value or combination that the user can put right.

    `where` is the file, key or row, `message` names the value, `fix` mends it; the command line
    prints one line and exits with status 2.
    """

    def __init__(self, message, *, where=None, fix=None):
        self.message = " ".join(str(message).split())
        self.where = None if where is None else str(where)
        self.fix = None if fix is None else " ".join(str(fix).split())
        super().__init__(self.message)

    def __str__(self):
        """Return one line, ``where: message. Fix: fix``, leaving out the parts not given."""
        line = self.message if self.where is None else f"{self.where}: {self.message}"
        if self.fix is None:
            return line
        end = "" if line.endswith((".", "!", "?")) else "."
        return f"{line}{end} Fix: {self.fix}"


@contextmanager
def explain(errors, message, *, where, fix):
    """Raise an InputError in place of errors of some types, whose own text follows the message."""
    try:
        yield
    except errors as error:
        raise InputError(f"{message} ({error})", where=where, fix=fix) from error


def printable(text):
    """Escape what a terminal would obey or cannot encode; newlines and tabs stay as they are."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _UNPRINTABLE and character not in "\n\t"
        else character
        for character in str(text)
    )


def check_probability(value, name, where=None):
    """Raise an `InputError` with `name` and `where` unless the value is a number in [0, 1]."""
    if not isinstance(value, Real) or not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}", where=where, fix="give a probability in [0, 1]")
