"""Files that are written as a whole or not at all: under another name first, which then takes the place of the old."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, and the folders that it lies in.

    Raises:
      DexError: it cannot be written; what was there before is still there.
    """
    file = Path(path)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # its own, where two processes write one file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DexError(f"{file} cannot be written: {error.strerror or error}") from error


def cache_folder() -> Path:
    """Where what can be made again is kept between runs, among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dex_jax"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON on one line.

    Raises:
      DexError: it cannot be written.
      ValueError: it holds a NaN or an infinity, which JSON lacks.
    """
    write_whole(path, json.dumps(value, allow_nan=False))
