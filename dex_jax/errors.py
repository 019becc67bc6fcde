"""The one exception for input that a person can mend."""

from __future__ import annotations


class DexError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    The command-line programs print the sentence and exit with code 2; a library caller sees a ValueError.
    """
