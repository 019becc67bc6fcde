"""Models and exits on object stores, as gs://bucket/model: small files are copied, weights read tensor by tensor.

fsspec does the reading, which comes with huggingface_hub; each kind of store needs a package more (gs:// gcsfs, s3://
s3fs). Of the weights only the bytes that are asked for are fetched, so that a host of many reads its own layers alone.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.errors import DexError
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.hub import DESCRIPTIONS
from dex_jax.io.huggingface import checkpoint_of, names_weights
from dex_jax.io.safetensors_files import DTYPES, INDEX, placed_names

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HEADER_LIMIT = 100 << 20


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
    """A folder of an object store.

    Args:
      url: of the folder.

    Raises:
      DexError: a kind of store that is not known, or whose package is missing.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise DexError(f"{url} needs a package that is not installed ({error})") from error
        except ValueError as error:
            raise DexError(f"{url} is on no kind of store that fsspec knows ({error}): check how it begins") from error
        except Exception as error:
            raise self._failure(error) from error

    def names(self) -> set[str]:
        """Names of the files in the folder; none when there is no such folder."""
        with self._reading():
            try:
                listed = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
            return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` of a file, all of them by default."""
        with self._reading():
            return bytes(self._files.cat_file(f"{self._root}/{name}", start=start, end=stop))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        # What goes wrong has a type of its own in every store's package.
        try:
            yield
        except DexError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> DexError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return DexError(f"{self.url} cannot be read ({type(error).__name__}: {reason}): check address and credentials")


class StoredTensors:
    """The tensors of a store's safetensors files, as `safetensors_files.SafetensorsFiles`.

    Args:
      store: the folder.
      files: names of the safetensors files, each with the tensors that an index says it holds.

    Raises:
      DexError: a file is absent or damaged, or lacks a tensor.
    """

    def __init__(self, store: Store, files: Sequence[tuple[str, set[str]]]):
        self._store = store
        self._entries: dict[str, tuple[str, int, dict[str, Any]]] = {}
        for file, listed in files:
            begin, header = self._header(file)
            if not listed <= header.keys():
                absent = min(listed - header.keys())
                raise DexError(f"{store.url}/{file} lacks the tensor {absent}, which the index places there.")
            self._entries |= {name: (file, begin, entry) for name, entry in header.items()}
        self.names = tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None when there is no such tensor."""
        return tuple(self._entries[name][2]["shape"]) if name in self._entries else None

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` returns: float32, float16 or bfloat16.

        Raises:
          DexError: the tensor is stored in another type.
        """
        code = self._entries[name][2]["dtype"]
        if code not in DTYPES:
            raise DexError(
                f"{self.file_of(name)} stores {name} as {code}, and only {', '.join(DTYPES)} are covered: use the "
                "unquantised model."
            )
        return np.dtype(DTYPES[code])

    def file_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return f"{self._store.url}/{self._entries[name][0]}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of one tensor, an array of its own in `dtype(name)`."""
        file, begin, entry = self._entries[name]
        shape, dtype = entry["shape"], self.dtype(name)
        first, last, _ = slice(start, stop).indices(shape[0])
        row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        begin += entry["data_offsets"][0]
        data = self._store.read(file, begin + first * row, begin + last * row)
        if len(data) != (last - first) * row:
            raise DexError(f"{self._store.url}/{file} is truncated: copy it again.")
        return np.frombuffer(bytearray(data), dtype).reshape(last - first, *shape[1:])

    def _header(self, file: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """(where the data begin, tensor -> dtype, shape and data_offsets): the format's first 8 bytes and its JSON."""
        try:
            size = int.from_bytes(self._store.read(file, 0, 8), "little")
            if size > _HEADER_LIMIT:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(self._store.read(file, 8, 8 + size))
            header.pop("__metadata__", None)
            return 8 + size, header
        except (ValueError, AttributeError) as error:
            raise DexError(f"{self._store.url}/{file} is truncated or damaged ({error}): copy it again.") from error


def open_stored(url: str) -> Checkpoint:
    """Opens a model's folder on an object store, as `huggingface.open_directory` does one on a disk.

    Raises:
      DexError: nothing there, a package that is missing, or a model that is not covered.
    """
    if url.lower().endswith(".gguf"):
        raise DexError(f"A .gguf file is read from a disk: copy {url} and give the path of the copy.")
    store = Store(url)
    names = store.names()
    if not names:
        raise DexError(f"There is nothing at {url}: check the address.")
    folder = tempfile.TemporaryDirectory(prefix="dex_jax_")
    for name in names.intersection(DESCRIPTIONS):
        (Path(folder.name) / name).write_bytes(store.read(name))
    if INDEX in names:
        placed = placed_names(store.read(INDEX).decode(errors="replace"), f"{url}/{INDEX}")
    else:
        placed = {name: set() for name in sorted(names) if name.endswith(".safetensors")}
    if not placed:
        raise DexError(f"{url} holds no safetensors weights: copy them there as model.safetensors.")
    tensors = partial(StoredTensors, store, sorted(placed.items()))
    # The tokenizer is built when it is asked for: until then its files stay.
    return checkpoint_of(Path(folder.name), url, tensors, keep=folder, weights=names_weights(names))


@contextmanager
def on_disk(path: str | os.PathLike, inside: str) -> Iterator[Path]:
    """A path as it is, or a copy of one file of an object store while the context lasts.

    Args:
      path: of a file or folder.
      inside: the file that is meant by a folder's URL, one that does not end in .safetensors.
    """
    if not is_url(path):
        yield Path(path)
        return
    url = str(path).rstrip("/")
    folder, _, name = (url if url.endswith(".safetensors") else f"{url}/{inside}").rpartition("/")
    store = Store(folder)
    with tempfile.TemporaryDirectory(prefix="dex_jax_") as copies:
        copy = Path(copies) / name
        if name in store.names():
            copy.write_bytes(store.read(name))
        yield copy
