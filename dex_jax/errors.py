"""The exception for input that a person can mend."""

from __future__ import annotations

import numbers
from typing import Any

_LONGEST = 1200


class DexError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    The command-line programs print the sentence and exit with code 2; a library caller sees a ValueError.
    """

    def __init__(self, sentence: str):
        # A sentence may quote line breaks, codes that would steer the terminal, or endless names.
        line = " ".join("".join(c if c.isprintable() else " " for c in sentence).split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 204]} ... {line[-200:]}")


def whole_number(**fields: Any) -> None:
    """Raise DexError for the first of the fields that is no whole number of at least 1."""
    for name, value in fields.items():
        if not is_whole(value):
            raise DexError(f"{name} must be a whole number of at least 1, not {value!r}")


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number of at least 1, of Python or NumPy."""
    return is_integer(value) and int(value) >= 1
