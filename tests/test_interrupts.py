"""Ctrl-C in a terminal, at any moment: exit code 130 within seconds, the terminal as it was, no traceback.

DEX_JAX_INTERRUPTS=20 with --slow tries more moments, spread over the first DEX_JAX_LAST_INTERRUPT seconds of a cold
run. Moments count from the first sign of a program, as a busy machine may take seconds to start Python.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dex_jax.interrupts import GRACE

pty = pytest.importorskip("pty", reason="pseudo terminals are POSIX's")
termios = pytest.importorskip("termios")

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = int(os.environ.get("DEX_JAX_INTERRUPTS", "4"))
LAST = float(os.environ.get("DEX_JAX_LAST_INTERRUPT", "8"))
DECODE = [sys.executable, str(ROOT / "decode.py"), "--prompt", "Why is the sky blue?", "--max-new-tokens", "400"]
BEGUN = b"importing JAX"
"""What a program shows first, as soon as it hears of Ctrl-C."""
SOON = 5.0
"""Less than any work here would go on for. An idle machine needs GRACE and a few tenths, a busy one twice that."""


def moments() -> list[Any]:
    """Return seconds after BEGUN, a random one in each of MOMENTS equal spans; all but the first are slow."""
    chosen, span = random.Random(27), LAST / MOMENTS
    seconds = [round(span * (number + chosen.random()), 2) for number in range(MOMENTS)]
    return [pytest.param(at, marks=[pytest.mark.slow] * bool(number)) for number, at in enumerate(seconds)]


def interrupt(command: list[str], ready: bytes, moment: float = 0.0, **environment: str) -> tuple[int, float, str]:
    """Press Ctrl-C some seconds after an output; return (exit code, seconds until the end, the terminal's output)."""
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=os.environ | {"TERM": "xterm"} | environment,  # a dumb terminal shows no phases
    )  # fmt: skip
    shown = b""

    def read(seconds: float, what: bytes | None = None) -> None:
        """Read the output for so long, or up to `what`, or to its end."""
        nonlocal shown
        until = time.monotonic() + seconds
        while time.monotonic() < until and process.poll() is None and not (what and what in shown):
            if select.select([master], [], [], 0.02)[0]:
                shown += os.read(master, 65536)

    try:
        read(300, ready)
        assert ready in shown, shown.decode()
        read(moment)
        assert process.poll() is None, shown.decode()
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        read(60)
        seconds = time.monotonic() - started
        while select.select([master], [], [], 0)[0]:
            shown += os.read(master, 65536)
        assert termios.tcgetattr(slave) == settings
        return process.wait(1), seconds, shown.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def ended_well(found: tuple[int, float, str]) -> None:
    code, seconds, shown = found
    assert "Traceback" not in shown
    assert code == 130, shown
    assert seconds < SOON
    assert "\x1b[?25l" not in shown or shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "\x1b[0m" in shown


@pytest.mark.parametrize("moment", moments())
def test_a_cold_run_ends_at_once(moment: float, tmp_path) -> None:
    # Nothing is compiled, measured or built yet.
    cold = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    ended_well(interrupt(DECODE, BEGUN, moment, DEX_JAX_TICK_COSTS=str(tmp_path / "costs.json"), **cold))


@pytest.mark.slow
def test_text_that_was_there_stays_with_its_summary() -> None:
    found = interrupt([*DECODE, "--method", "ar"], b"sky")
    ended_well(found)
    assert "wall-clock:" in found[2]


def test_what_asked_for_a_second_is_ended_after_it() -> None:
    program = "import time; from dex_jax.interrupts import exit_code; from dex_jax.interrupts import gently\n"
    program += "def work():\n  with gently() as stopped:\n    print('begun', flush=True)\n    time.sleep(60)\n"
    code, seconds, shown = interrupt([sys.executable, "-c", program + "exit_code(work, 'Ended.')"], b"begun")
    assert (code, "Ended." in shown, "Traceback" in shown) == (130, True, False)
    assert GRACE <= 1
    assert GRACE <= seconds < SOON


def test_a_training_says_how_to_go_on(tmp_path) -> None:
    config = ROOT / "configs" / "smollm2_135m_quick.py"
    command = [sys.executable, str(ROOT / "train_exits.py"), "--config", str(config)]
    found = interrupt([*command, "--folder", str(tmp_path / "run")], BEGUN, 1.0)
    ended_well(found)
    assert "run the same command again" in found[2]
