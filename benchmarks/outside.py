"""Greedy decoding by another library: a process of another Python that has it, on the same weights.

The process is `benchmarks/transformers_ar.py --serve` of a checkout of this repository, which knows SmolLM2-135M alone,
or `benchmarks/llama_ar.py --serve FILE`. Both run on the CPU, transformers in float32, and never stop at EOS, so they
are asked for as many tokens as AR gave.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError

MODEL = "smollm2-135m"


class Outside:
    """A worker process, asked for one `generate` at a time.

    Args:
      python: a Python that has the library.
      model: of the benchmark.
      file: what llama.cpp is told to open; None for transformers.

    Raises:
      DexError: another model than transformers' here, or a Python that cannot run it.
    """

    def __init__(self, python: str, model: str, file: str | None = None):
        if file is None and model != MODEL:
            raise DexError(f"--transformers-python compares with {MODEL} alone, not with {model}: leave it out")
        worker = Path(__file__).with_name("transformers_ar.py" if file is None else "llama_ar.py")
        command = [python, str(worker), "--serve", *([] if file is None else [file])]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise DexError(f"{python} does not start: {error.strerror or error}") from error
        self.versions = self._answer()

    def run(self, ids: list[int], new_tokens: int) -> Any:
        """One greedy `generate`: {"tokens", "prefill_seconds", "decode_seconds"}.

        Raises:
          DexError: the process has ended or says what is wrong.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"new_tokens": new_tokens, "ids": list(ids)}) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise DexError(f"the other Python's process has ended: {error.strerror or error}") from error
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended, and what it was to be told is still in the pipe's buffer
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise DexError(
                f"the other Python's process ended with code {self.process.returncode}: does it have what it should "
                "be compared with?"
            )
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DexError(f"the other Python's process says what is no answer: {line.strip()}") from error
        if "error" in found:
            raise DexError(f"the other Python's process says: {found['error']}")
        return found
