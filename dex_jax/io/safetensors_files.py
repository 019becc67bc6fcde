"""Weights in one or many safetensors files, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dex_jax.errors import DexError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class SafetensorsFiles:
    """The tensors of a directory's safetensors files.

    Attributes:
      names: every tensor's name.
    """

    def __init__(self, directory: Path):
        """Reads the index, if there is one, and the header of every file.

        Args:
          directory: holds model.safetensors, or shards and their index.

        Raises:
          DexError: a file is absent, truncated or damaged.
        """
        self._headers: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for path, listed in _files(directory):
            for name, entry in _header(path, listed).items():
                self._headers[name] = (path, *entry)
        self.names = tuple(self._headers)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None when there is no such tensor."""
        return self._headers[name][1] if name in self._headers else None

    def dtype(self, name: str) -> np.dtype:
        """The type that `read` returns: float32, float16 or bfloat16.

        Raises:
          DexError: the tensor is stored in another type.
        """
        path, _, code = self._headers[name]
        if code not in DTYPES:
            raise DexError(
                f"{path} stores {name} as {code}, and only {', '.join(DTYPES)} are covered: use the unquantised model."
            )
        return np.dtype(DTYPES[code])

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._headers[name][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of one tensor, an array of its own in `dtype(name)`."""
        # A map of its own for every read: the pages leave this process with it, so that reading a whole model never
        # holds the file as well as the arrays.
        with _open(self.file_of(name)) as file:
            if start == 0 and stop is None:
                return file.get_tensor(name)
            return file.get_slice(name)[start:stop]


def _files(directory: Path) -> list[tuple[Path, set[str]]]:
    """Each file, with the names that the index says it holds."""
    index = directory / INDEX
    if not index.is_file():
        # By their usual name first: some directories hold the same weights once more under another.
        usual = sorted(directory.glob("model*.safetensors"))
        return [(path, set()) for path in usual or sorted(directory.glob("*.safetensors"))]
    files = placed_names(index.read_text(encoding="utf-8", errors="replace"), str(index))
    for file, names in files.items():
        if not (directory / file).is_file():
            raise DexError(
                f"{directory / file} is absent, and {index.name} says that it holds {len(names)} tensors, "
                f"{min(names)} among them: get it again."
            )
    return [(directory / file, names) for file, names in sorted(files.items())]


def placed_names(index: str, source: str) -> dict[str, set[str]]:
    """The tensors that each file holds, from the text of an index.

    Raises:
      DexError: it is none; `source` is what to call it.
    """
    try:
        placed: dict[str, str] = json.loads(index)["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in placed.items():
            files.setdefault(file, set()).add(name)
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DexError(f"{source} is not a valid index of safetensors files: get it again.") from error


def _header(path: Path, listed: set[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    with _open(path) as file:
        names = list(file.keys())
        absent = listed - set(names)
        if absent:
            raise DexError(f"{path} lacks the tensor {min(absent)}, which the index places there: get it again.")
        slices = ((name, file.get_slice(name)) for name in names)
        return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices}


def _open(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise DexError(f"{path} is truncated or damaged ({error}): get it again.") from error
    except OSError as error:
        raise DexError(f"{path} cannot be read ({error}).") from error
