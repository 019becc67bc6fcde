"""Files that are written as a whole or not at all: under another name first, which then replaces the old file."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from dex_jax.errors import DexError


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file, text as UTF-8, and the folders that it lies in; after a DexError an old file is still there."""
    file = Path(path)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # its own, where two processes write one file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())  # or a machine that loses power may keep the name without what it names
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DexError(f"{file} cannot be written: {error.strerror or error}") from error


def lock(file: IO[Any]) -> None:
    """Lock an open file against other processes until it is closed; raise BlockingIOError where another has it."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes with one file are then the user's to avoid.
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def plain(value: Any) -> Any:
    """Return a value as strict JSON: NumPy and JAX arrays become numbers and lists, NaN and infinities None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cache_folder() -> Path:
    """Return the user's cache folder, which only the user may write; it keeps between runs what can be made again.

    Without a home directory, or where others may write, it is a folder of this process, and a line on stderr says so.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "dex_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shared = hasattr(os, "geteuid") and (folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o022)
        if shared or not os.access(folder, os.W_OK):
            raise OSError(f"this user, and no others, should be able to write to {folder} (chmod 700 mends that)")
        return folder
    # RuntimeError: there is no home directory.
    except (OSError, RuntimeError) as error:
        return Path(_temporary_folder(str(error)).name)


def only_the_user_wrote(file: Path) -> bool:
    """Return whether a file exists, is the user's and nobody else may write it: what is loaded runs as the user."""
    try:
        about = file.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


@functools.cache
def _temporary_folder(why: str) -> tempfile.TemporaryDirectory:
    print(f"compiled programs and step costs are not kept for the next run: {why}", file=sys.stderr)
    return tempfile.TemporaryDirectory(prefix="dex_jax_", ignore_cleanup_errors=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON on one line by `write_whole`; raise ValueError for NaN and infinities, which JSON lacks."""
    write_whole(path, json.dumps(value, allow_nan=False))
