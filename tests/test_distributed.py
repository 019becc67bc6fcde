"""Two processes on this machine's loopback decode what one process does, and end together when one of them dies."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_worker import OPTIONS, PROMPTS
from reference.checkpoints import write_checkpoint

import dex_jax
from dex_jax import Dex
from dex_jax.distributed import from_first, join
from dex_jax.errors import DexError

WORKER = Path(__file__).resolve().parent / "distributed_worker.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("distributed"), "llama2")


def start(compiled: Path, *command: str) -> list[subprocess.Popen]:
    """Start one command twice, with a shared folder of compiled programs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(compiled / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = functools.partial(subprocess.Popen, [sys.executable, *command], **pipes)
    return [run(env={**base, "JAX_PROCESS_ID": number}) for number in "01"]


@pytest.mark.slow
def test_stdout_of_two_processes_is_json_alone(tmp_path: Path) -> None:
    flags = ["--distributed", "--json", "--mesh", "stage=2", "--method", "ar", "--prompt", "Hi", "--max-new-tokens=4"]
    both = start(tmp_path, str(WORKER.parents[1] / "decode.py"), *flags)
    (first, said), (second, _) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert json.loads(first)["new_tokens"] == 4
    assert second == ""


@pytest.mark.slow
def test_two_processes_decode_what_one_does(checkpoint: Path) -> None:
    results = []
    for process in start(checkpoint, str(WORKER), str(checkpoint)):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    lm = dex_jax.load(checkpoint, "float32")
    one = dex_jax.generate(lm, PROMPTS, method=Dex(explorers=2, draft=False), **OPTIONS)
    for number, result in enumerate(results):
        assert result["name"].startswith(f"process {number} of 2")
        assert result["tokens"] == one.tokens.tolist()
        assert result["exits"] == one.stats.exits.tolist()
        assert result["ticks"] == one.stats.ticks.tolist()
        done, total = result["read"]
        assert done < 0.8 * total, "a process reads the layers of its own stage only"
        assert result["stages"] == [number]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "when"), [(0, "loading"), (1, "loading"), (0, "decoding"), (1, "decoding")])
def test_when_one_process_dies_the_other_ends_and_names_it(number: int, when: str, checkpoint: Path) -> None:
    both = start(checkpoint, str(WORKER), str(checkpoint), str(number), when)
    both[number].communicate(timeout=300)
    started = time.monotonic()
    _, err = both[1 - number].communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert both[1 - number].returncode == 2
    assert re.fullmatch(rf"error: process {number} of 2 on .* no longer answers: .*", err.splitlines()[-1])
    assert "Traceback" not in err


def test_a_run_that_nobody_describes(monkeypatch) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DexError, match="set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and"):
        join()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(DexError, match="JAX_NUM_PROCESSES must be a whole number, not 'two'"):
        join()


def test_alone_what_the_first_has_is_what_there_is() -> None:
    assert from_first(lambda: [[1, 2]]) == [[1, 2]]
