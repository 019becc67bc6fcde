"""Test how programs end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dex_jax import DexError
from dex_jax.interrupts import BAD_INPUT, OK, exit_code


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


def test_what_a_command_returns_is_the_exit_code(capsys) -> None:
    assert [exit_code(lambda given=given: given) for given in (None, 0, 1)] == [OK, OK, 1]
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_told_in_a_line_and_a_bug_is_not(capsys) -> None:
    assert exit_code(raising(DexError("--rows is 0: use at least 1"))) == BAD_INPUT
    assert capsys.readouterr().err == "error: --rows is 0: use at least 1\n"
    with pytest.raises(ValueError, match="a bug"):
        exit_code(raising(ValueError("a bug")))


@pytest.mark.parametrize(
    ("command", "read"),
    # Short output stays in a buffer until the end.
    [("[print('x' * 1000, flush=True) for _ in range(10000)] and None", 10), ("input() or print('short')", 0)],
)
def test_a_reader_that_leaves_is_no_error(command: str, read: int) -> None:
    program = f"import sys; from dex_jax.interrupts import exit_code; sys.exit(exit_code(lambda: {command}))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], env=buffered, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(read)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == OK


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device that is always full")
@pytest.mark.parametrize(("where", "told"), [("> /dev/full", "No space left on device"), (">&-", "stdout is closed")])
def test_a_stdout_that_cannot_be_written_is_told(where: str, told: str) -> None:
    program = "import sys; from dex_jax.interrupts import exit_code; sys.exit(exit_code(lambda: print('text')))"
    found = subprocess.run(f'"{sys.executable}" -c "{program}" {where}', shell=True, stderr=subprocess.PIPE, text=True)
    assert found.returncode == BAD_INPUT
    assert told in found.stderr
    assert found.stderr.count("\n") == 1


def test_what_is_piped_is_utf_8() -> None:
    program = (
        "import sys; from dex_jax.interrupts import exit_code; sys.exit(exit_code(lambda: print('\u2588 \u65e5')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONIOENCODING": "cp1252:strict"},
        capture_output=True,
        check=True,
    )
    assert found.stdout.decode() == "\u2588 \u65e5" + os.linesep
