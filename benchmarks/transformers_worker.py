"""The process that `transformers_ar.py --serve` runs in, as the benchmarks that compare with it ask for it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Transformers:
    """A worker process with torch and transformers, asked for one generate at a time.

    Args:
      python: a Python that has both.
    """

    def __init__(self, python: str):
        command = [python, str(HERE / "transformers_ar.py"), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = json.loads(self.process.stdout.readline())

    def __call__(self, new_tokens: int = 32, ids: Sequence[int] | None = None) -> float:
        """Seconds per token after the first, after these token ids (None: the worker's own prompt)."""
        prompt = "" if ids is None else f" {json.dumps(list(ids))}"
        self.process.stdin.write(f"run {new_tokens}{prompt}\n")
        self.process.stdin.flush()
        return 1 / json.loads(self.process.stdout.readline())["tokens_per_second"]

    def close(self) -> None:
        """Ends the worker."""
        self.process.stdin.close()
        self.process.wait()
