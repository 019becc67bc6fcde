"""The file metrics.jsonl of a training run's figures, one JSON object a line, whole after any kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError
from dex_jax.io.whole_files import plain

FILE_NAME = "metrics.jsonl"


class Journal:
    """The journal of a run, open for further lines.

    Args:
      folder: of the run.
      step: the step that the run goes on from; 0 for a fresh one. Lines beyond it, of steps that are about to be done
        again, are dropped, and so is a half-written last line.

    Raises:
      DexError: the file cannot be written.
    """

    def __init__(self, folder: str | Path, step: int):
        self.path = Path(folder) / FILE_NAME
        try:
            self._file = self.path.open("a+b")
            self._file.truncate(_end_of_lines(self.path.read_bytes(), step))
        except OSError as error:
            raise DexError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Append {"kind", "step", **figures} with null where not finite; raise DexError where writing fails."""
        line = json.dumps(plain({"kind": kind, "step": step, **figures}), allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise DexError(
                f"{self.path} cannot be written: {error.strerror or error}; checkpoints are whole, so make room and "
                "run the same command again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(folder: str | Path) -> list[dict[str, Any]]:
    """Return all whole lines of a run's journal, in order; none if there is no journal."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: _end_of_lines(data, math.inf)].splitlines()]


def _end_of_lines(data: bytes, step: float) -> int:
    """Return the length in bytes of the whole lines up to and including `step`."""
    end = 0
    for line in data.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or record.get("step", 0) > step:
            break
        end += len(line)
    return end
