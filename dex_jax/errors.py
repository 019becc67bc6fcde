"""The one exception for input that a person can mend, and how programs end."""

from __future__ import annotations

import errno
import io
import numbers
import os
import sys
from collections.abc import Callable
from typing import Any

from dex_jax import interrupts

OK, BAD_INPUT = 0, 2
_LONGEST = 1200


class DexError(ValueError):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    The command-line programs print the sentence and exit with code 2; a library caller sees a ValueError.
    """

    def __init__(self, sentence: str):
        # What a sentence quotes may hold line breaks, codes that would steer the terminal, or no end of names.
        line = " ".join("".join(c if c.isprintable() else " " for c in sentence).split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 204]} ... {line[-200:]}")


def exit_code(command: Callable[[], int | None], stopped: str = "Stopped.") -> int:
    """Runs a program's work and says what ended it early: what `command` returned, 0 for None, is the exit code.

    It is 2 for bad input, a DexError, for a full disk and for a stdout that is closed, and 0 when nobody reads stdout
    any more. Ctrl-C ends the process with 130, and `stopped` on stderr, if it is not empty.
    """
    if sys.stdout is None:
        print("error: stdout is closed, where all is written: leave it open", file=sys.stderr)
        return BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # a file or pipe, which Windows would write in the system's code page
    try:
        with interrupts.heeded(stopped):
            code = command() or OK
            sys.stdout.flush()  # here, where a reader that is gone is no error
            return code
    except DexError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        unread = isinstance(error, BrokenPipeError)
        if not unread and error.errno != errno.ENOSPC:
            raise
        # Nothing more may be written, not even by the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if unread:
            return OK
        print(f"error: nothing more can be written ({error.strerror}): make room on the disk", file=sys.stderr)
        return BAD_INPUT


def whole_number(**fields: Any) -> None:
    """A DexError that names the first of the fields that is no whole number of at least 1."""
    for name, value in fields.items():
        if not is_whole(value):
            raise DexError(f"{name} must be a whole number of at least 1, not {value!r}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number of at least 1, of Python or NumPy."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) >= 1
