"""Folders that hold a model's files, on a disk or an object store."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from dex_jax.foreign import reading


class Folder(Protocol):
    """Where files lie."""

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes, of every file."""

    def address(self, name: str) -> str:
        """What to call a file in an error."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a file, uint8, fewer where it ends."""


class Directory:
    """A folder on a disk, see `Folder`."""

    def __init__(self, path: Path):
        self._path = path

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes, of every file."""
        with reading(self._path):
            return {file.name: file.stat().st_size for file in self._path.iterdir() if file.is_file()}

    def address(self, name: str) -> str:
        """The file's path."""
        return str(self._path / name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a file."""
        with reading(self.address(name)):
            return np.fromfile(self._path / name, np.uint8, stop - start, offset=start)


def content_of(folder: Folder, name: str) -> bytes:
    """All bytes of a file that is there."""
    return folder.read(name, 0, folder.sizes[name]).tobytes()
