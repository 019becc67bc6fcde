"""metrics.jsonl: what a training run measured, one JSON object a line, whole after any kill."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError
from dex_jax.io.whole_files import plain

FILE_NAME = "metrics.jsonl"


class Journal:
    """Appends to the journal of a run, and to TensorBoard if asked.

    Args:
      folder: of the run.
      step: the step that the run goes on from; 0 for a fresh one. Lines beyond it, of steps that are about to be done
        again, are dropped, and so is a half-written last line.
      tensorboard: also write TensorBoard files, in folder/tensorboard.

    Raises:
      DexError: TensorBoard is asked for and not installed, or the file cannot be written.
    """

    def __init__(self, folder: str | Path, step: int, tensorboard: bool = False):
        self.path = Path(folder) / FILE_NAME
        self._board = _tensorboard(Path(folder) / "tensorboard", step) if tensorboard else None
        try:
            self._file = self.path.open("a+b")
            self._file.truncate(_end_of_lines(self.path.read_bytes(), step))
        except OSError as error:
            raise DexError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Appends {"kind", "step", **figures}, null where not finite. DexError: writing fails, as on a full disk."""
        line = json.dumps(plain({"kind": kind, "step": step, **figures}), allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise DexError(
                f"{self.path} cannot be written: {error.strerror or error}; checkpoints are whole, so make room and "
                "run the same command again"
            ) from error
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Ends writing."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_journal(folder: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's journal, in order; none if there is no journal."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: _end_of_lines(data, math.inf)].splitlines()]


def _end_of_lines(data: bytes, step: float) -> int:
    """Length in bytes of the whole lines up to and including `step`."""
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


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError as error:
        raise DexError(
            "TensorBoard files need another package: pip install tensorboardX, or leave tensorboard off"
        ) from error
    return writer(str(folder), purge_step=step + 1)
