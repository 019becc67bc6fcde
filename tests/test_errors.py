"""How programs end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dex_jax import DexError
from dex_jax.errors import BAD_INPUT, INTERRUPTED, OK, exit_code


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def test_what_a_command_returns_is_the_exit_code(capsys) -> None:
    assert [exit_code(lambda given=given: given) for given in (None, 0, 1)] == [OK, OK, 1]
    assert capsys.readouterr() == ("", "")


def test_bad_input_and_ctrl_c_are_told_in_a_line(capsys) -> None:
    assert exit_code(raising(DexError("--rows is 0: use at least 1"))) == BAD_INPUT
    assert capsys.readouterr().err == "error: --rows is 0: use at least 1\n"
    assert exit_code(raising(KeyboardInterrupt()), "Stopped; nothing is written.") == INTERRUPTED
    assert capsys.readouterr().err == "Stopped; nothing is written.\n"
    assert exit_code(raising(KeyboardInterrupt()), "") == INTERRUPTED
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="a bug"):
        exit_code(raising(ValueError("a bug")))


def test_a_reader_that_leaves_is_no_error() -> None:
    program = (
        "import sys; from dex_jax.errors import exit_code; "
        "sys.exit(exit_code(lambda: [print('x' * 1000, flush=True) for _ in range(10000)] and None))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == OK
