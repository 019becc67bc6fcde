"""Two processes on this machine's loopback decode what one process does, and end together when one of them dies."""

from __future__ import annotations

import json
import os
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


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(checkpoint: Path, *arguments: str) -> list[subprocess.Popen]:
    port = free_port()
    # What both compile is compiled once.
    base = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(checkpoint / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(checkpoint), *arguments],
            env={**base, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


@pytest.mark.slow
def test_stdout_of_two_processes_is_json_alone() -> None:
    environment, port = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}, free_port()
    environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    flags = [
        "--distributed",
        "--mesh",
        "stage=2",
        "--method",
        "ar",
        "--max-new-tokens",
        "4",
        "--json",
        "--prompt",
        "Hi",
    ]
    command = [sys.executable, str(Path(__file__).parents[1] / "decode.py"), *flags]
    both = [
        subprocess.Popen(
            command,
            env={**environment, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    (first, said), (second, _) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert json.loads(first)["new_tokens"] == 4
    assert second == ""


@pytest.mark.slow
def test_two_processes_decode_what_one_does(checkpoint: Path) -> None:
    results = []
    for process in start(checkpoint):
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
def test_when_one_process_dies_the_other_ends_and_names_it(checkpoint: Path) -> None:
    survivor, dying = start(checkpoint, "--die")
    dying.communicate(timeout=300)
    begin = time.monotonic()
    _, err = survivor.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert survivor.returncode != 0
    assert "process 1 of 2" in err
    assert "no longer answers" in err


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
