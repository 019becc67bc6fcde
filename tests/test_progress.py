"""Test what programs show while they work: lines in a log, one live line on a terminal, and who hears of phases."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console

from dex_jax.progress import Display, Standing, listening, notify


@pytest.fixture(autouse=True)
def terminal(monkeypatch) -> None:
    """Let terminals be such as can erase a line, whatever these tests run in: a dumb one shows no bars."""
    monkeypatch.setenv("TERM", "xterm")


def test_lines_where_there_is_no_terminal_and_a_bar_where_there_is():
    event = Standing("step 50/100, loss 0.4321", 0.5, 3725.0, logged=False)
    lines = io.StringIO()
    display = Display(Console(file=lines, width=200))
    display("a [word] from the trainer")
    display(event)
    display(event._replace(logged=True, seconds_left=65.0))
    display.close()
    assert lines.getvalue() == ("a [word] from the trainer\nstep 50/100, loss 0.4321, 1 min 05 s left\n")
    bar = io.StringIO()
    display = Display(Console(file=bar, width=200, force_terminal=True))
    display(event)
    display.close()
    assert "50%" in bar.getvalue()
    assert "1 h 02 min left" in bar.getvalue()
    assert event._replace(seconds_left=None).describe() == event.what


def test_phases_are_lines_with_seconds_where_there_is_no_terminal() -> None:
    lines = io.StringIO()
    display = Display(Console(file=lines, width=200))
    with listening(display.phase):
        for phase in ("loading the model", "compiling [a]", "compiling [a]", "decoding"):
            notify(phase)
        display.part(3, 4)
    display.close()
    notify("nobody hears this")
    assert re.sub(r"\[ *\d+\.\d s\]", "[]", lines.getvalue()) == "[] loading the model\n[] compiling [a]\n[] decoding\n"


def test_a_phase_leaves_nothing_on_a_terminal() -> None:
    bar = io.StringIO()
    display = Display(Console(file=bar, width=200, force_terminal=True))
    display.phase("loading the model")
    display.part(1, 4)
    display._bars.refresh()
    display.phase("compiling run_ticks")
    display._bars.refresh()
    display.close()
    shown = bar.getvalue()
    assert "compiling run_ticks" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert " 25% loading the model" in plain
    # A phase of unknown size shows no percentage.
    assert "% compiling" not in plain
    # The line is erased and the cursor is back.
    assert shown.rindex("\x1b[2K") > shown.rindex("compiling")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_the_innermost_listener_hears_every_thread() -> None:
    outer, inner = [], []
    with listening(outer.append):
        with listening(inner.append):
            thread = threading.Thread(target=notify, args=("beside",))
            thread.start()
            thread.join()
        notify("after")
    assert (outer, inner) == (["after"], ["beside"])
