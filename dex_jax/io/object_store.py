"""Models and exits on object stores, as gs://bucket/model: small files are copied, weights read tensor by tensor.

fsspec does the reading, which comes with huggingface_hub; each kind of store needs a package more (gs:// gcsfs, s3://
s3fs). Of the weights only the bytes that are asked for are fetched, so that a host of many reads its own layers alone.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from dex_jax.errors import DexError
from dex_jax.foreign import local_path, reading
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.folders import content_of
from dex_jax.io.huggingface import open_folder

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str | os.PathLike | None) -> bool:
    """Whether a path names something on an object store."""
    return isinstance(path, str) and _URL.match(path) is not None


def require_disk(path: str | os.PathLike | None, what: str) -> None:
    """Refuses a URL where files are locked, renamed and replaced.

    Raises:
      DexError: `path` is a URL; `what` says what would lie there.
    """
    if is_url(path):
        raise DexError(
            f"{what} need a disk, and {path} is on an object store: name a folder here and copy it there after"
        )


class Store:
    """A folder of an object store, see `folders.Folder`.

    Raises:
      DexError: a kind of store that is not known, or whose package is missing.
    """

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
        """Name -> bytes, of the files in the folder; empty when there is no such folder."""
        with self._reading(), suppress(FileNotFoundError):
            listed = self._files.ls(self._root, detail=True)
            return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] or 0 for entry in listed}
        return {}

    def address(self, name: str) -> str:
        """The file's URL."""
        return f"{self.url}/{name}"

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of a file."""
        with self._reading():
            return np.frombuffer(
                bytearray(self._files.cat_file(f"{self._root}/{name}", start=start, end=stop)), np.uint8
            )


def open_stored(url: str) -> Checkpoint:
    """Opens a model's folder on an object store, see `huggingface.open_folder`.

    Raises:
      DexError: nothing there, a package that is missing, or a model that is not covered.
    """
    if url.lower().endswith(".gguf"):
        raise DexError(f"A .gguf file is read from a disk: copy {url} and give the path of the copy.")
    store = Store(url)
    if not store.sizes:
        raise DexError(f"There is nothing at {url}: check the address.")
    return open_folder(store, url)


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
