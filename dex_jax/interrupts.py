"""Ctrl-C in programs, which restores the terminal and exits with code 130 within two seconds, whatever goes on.

Python's own handler waits until the main thread is back from C++, which compiles for half a minute, and then raises
where nobody expects it: in an import, in a callback, or while compilers still run, which crashes the process. So a
thread of its own hears of the signal and ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from dex_jax.errors import DexError

OK, BAD_INPUT = 0, 2
INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""

GRACE = 1.0
"""Number of seconds in which a program that requested it may end by itself."""

_stopped = threading.Event()
_gentle = threading.Event()
_at_end: list[Callable[[], None]] = []


def at_end(function: Callable[[], None]) -> Callable[[], None]:
    """Register a function, which must be quick, to be called before Ctrl-C ends the process."""
    _at_end.append(function)
    return function


@contextlib.contextmanager
def heeded(sentence: str = "Stopped.") -> Iterator[None]:
    """Let Ctrl-C end the process with exit code 130: at once, or within `gently` after GRACE seconds at most.

    Files that programs write are whole or not there (io/whole_files.py), so nothing is lost but what was not done. The
    sentence goes to stderr, unless it is empty.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    _stopped.clear()

    patient = False

    def watch() -> None:
        nonlocal patient
        with heard:
            while (number := heard.recv(1)) != bytes([signal.SIGINT]):
                if not number:
                    return
            patient = _gentle.is_set()
            _stopped.set()
            if patient:
                heard.settimeout(GRACE)
                with contextlib.suppress(OSError):
                    heard.recv(1)  # a second Ctrl-C does not wait
            end_process(sentence)

    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    watching = threading.Thread(target=watch, daemon=True, name="Ctrl-C")
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, before)
        if _stopped.is_set():
            if not patient:
                watching.join()  # It ends the process; work whose helpers it has ended fails before that.
            end_process("")
        told.close()


@contextlib.contextmanager
def gently() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C only make the given function true; work that does not end within GRACE seconds is ended."""
    _gentle.set()
    try:
        yield _stopped.is_set
    finally:
        _gentle.clear()


def end_process(sentence: str, code: int = INTERRUPTED) -> None:
    """End the process without Python's own exit, which would crash on threads that compile."""
    # Whoever holds a stream's lock may be waiting for a reader that is gone.
    timer = threading.Timer(0.3, os._exit, (code,))
    timer.daemon = True
    timer.start()
    for function in _at_end:
        function()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        for number in (1, 2):
            if os.isatty(number):
                os.write(number, b"\x1b[0m\x1b[?25h")  # no colour, a cursor
        if sentence:
            os.write(2, f"\n{sentence}\n".encode())
    os._exit(code)


def exit_code(command: Callable[[], int | None], stopped: str = "Stopped.") -> int:
    """Run a program's work and say what ended it early; return what `command` returned, 0 for None, as the exit code.

    It is 2 for bad input, a DexError, for a full disk and for a stdout that is closed, and 0 when nobody reads stdout
    any more. Ctrl-C ends the process with 130, and `stopped` on stderr, if it is not empty.
    """
    if sys.stdout is None:
        print("error: stdout is closed, where all is written: leave it open", file=sys.stderr)
        return BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # a file or pipe, which Windows would write in the system's code page
    try:
        with heeded(stopped):
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
