"""Folders that hold a model's files, on a disk or an object store, as gs://bucket/model.

fsspec reads object stores, which comes with huggingface_hub; each kind of store needs a package more (gs:// gcsfs, s3://
s3fs). Of the weights only the bytes that are asked for are fetched, so that a host of many reads its own layers alone.
"""

# ruff: noqa: D102 (`Folder` says what each method gives)

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from dex_jax.errors import DexError
from dex_jax.foreign import local_path, reading

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Folder(Protocol):
    """Where files lie."""

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes, of every file; empty where a store has no such folder."""

    def address(self, name: str) -> str:
        """The file's path or URL."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a file, uint8, fewer where it ends."""


class Directory:
    """A folder on a disk."""

    def __init__(self, path: Path):
        self._path = path

    @cached_property
    def sizes(self) -> dict[str, int]:
        with reading(self._path):
            return {file.name: file.stat().st_size for file in self._path.iterdir() if file.is_file()}

    def address(self, name: str) -> str:
        return str(self._path / name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        with reading(self.address(name)):
            return np.fromfile(self._path / name, np.uint8, stop - start, offset=start)


class Store:
    """A folder of an object store; a DexError for a kind of store that is not known, or whose package is missing."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        with self._reading():
            try:
                self._files, self._root = fsspec.core.url_to_fs(self.url)
            except ImportError as error:
                raise DexError(f"{url} needs a package that is not installed ({error})") from error
            except ValueError as error:
                raise DexError(f"{url} is on no kind of store that fsspec knows ({error})") from error

    def _reading(self) -> AbstractContextManager[None]:
        # What goes wrong has a type of its own in every store's package.
        return reading(self.url, "check address and credentials")

    @cached_property
    def sizes(self) -> dict[str, int]:
        with self._reading(), suppress(FileNotFoundError):
            listed = self._files.ls(self._root, detail=True)
            return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] or 0 for entry in listed}
        return {}

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        with self._reading():
            content = self._files.cat_file(f"{self._root}/{name}", start=start, end=stop)
            return np.frombuffer(bytearray(content), np.uint8)


def content_of(folder: Folder, name: str) -> bytes:
    """All bytes of a file that is there."""
    return folder.read(name, 0, folder.sizes[name]).tobytes()


def is_url(path: str | os.PathLike | None) -> bool:
    """Whether a path names something on an object store."""
    return isinstance(path, str) and _URL.match(path) is not None


def require_disk(path: str | os.PathLike | None, what: str) -> None:
    """A DexError for a URL where files are locked, renamed and replaced; `what` says what would lie there."""
    if is_url(path):
        raise DexError(
            f"{what} need a disk, and {path} is on an object store: name a folder here and copy it there after"
        )


@contextmanager
def on_disk(path: str | os.PathLike, inside: str) -> Iterator[Path]:
    """A path as it is, or a copy of one file of an object store while the context lasts.

    `inside` is the file that is meant by a folder's URL, one that does not end in .safetensors.
    """
    if not is_url(path):
        yield local_path(path)
        return
    url = str(path).rstrip("/")
    folder, _, name = (url if url.endswith(".safetensors") else f"{url}/{inside}").rpartition("/")
    store = Store(folder)
    with tempfile.TemporaryDirectory(prefix="dex_jax_") as copies:
        copy = Path(copies) / name
        if name in store.sizes:
            copy.write_bytes(content_of(store, name))
        yield copy
