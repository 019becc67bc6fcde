"""Ctrl-C in programs: the terminal as it was and exit code 130, within two seconds, whatever the process is doing.

Python's own handler waits until the main thread is back from C++, which compiles for half a minute, and then raises
where nobody expects it: in an import, in a callback, or while compilers still run, which crashes the process. So a
thread of its own hears of the signal and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""

GRACE = 1.0
"""Seconds in which a program that asked for it may end by itself."""

_stopped = threading.Event()
_gentle = threading.Event()
_at_end: list[Callable[[], None]] = []


def at_end(function: Callable[[], None]) -> Callable[[], None]:
    """Calls a function, which must be quick, before Ctrl-C ends the process."""
    _at_end.append(function)
    return function


@contextlib.contextmanager
def heeded(sentence: str = "Stopped.") -> Iterator[None]:
    """Within it Ctrl-C ends the process with exit code 130: at once, or after `gently` what wants to end by itself.

    Files that programs write are whole or not there (io/whole_files.py), so nothing is lost but what was not done. The
    sentence is for stderr; empty for nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    _stopped.clear()

    def watch() -> None:
        with heard:
            while (number := heard.recv(1)) != bytes([signal.SIGINT]):
                if not number:
                    return
            _stopped.set()
            if _gentle.is_set():
                heard.settimeout(GRACE)
                with contextlib.suppress(OSError):
                    heard.recv(1)  # a second Ctrl-C does not wait
            _end(sentence)

    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True, name="Ctrl-C").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, before)
        if _stopped.is_set():
            _end("")
        told.close()


@contextlib.contextmanager
def gently() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only makes the given function true; who does not end within a second is ended."""
    _gentle.set()
    try:
        yield _stopped.is_set
    finally:
        _gentle.clear()


def _end(sentence: str) -> None:
    """Ends the process without asking threads that compile, or Python's own end, which would crash on them."""
    # Whoever holds a stream's lock may be waiting for a reader that is gone.
    timer = threading.Timer(0.3, os._exit, (INTERRUPTED,))
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
    os._exit(INTERRUPTED)
