"""Weights in the safetensors files of one folder, on a disk or an object store, one tensor at a time.

The `safetensors` package reads from disks alone, and maps whole files; here the bytes of a tensor are all that is read.
"""

# ruff: noqa: D102 (`checkpoint.TensorSource` says what each method gives)

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from msgspec import Meta, Struct

from dex_jax.errors import DexError
from dex_jax.foreign import parsed, typed
from dex_jax.io.folders import Folder, content_of

INDEX = "model.safetensors.index.json"
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INTEGERS: dict[str, Any] = {"I32": np.int32, "I64": np.int64}
_NUMBERS = DTYPES | _INTEGERS
_HEADER_LIMIT = 100 << 20
_Count = Annotated[int, Meta(ge=0, le=2**62)]


class _Index(Struct):
    weight_map: dict[str, str]


class _Entry(Struct):
    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class SafetensorsFiles:
    """The tensors of a folder's safetensors files."""

    def __init__(self, folder: Folder):
        """Reads index and headers; a DexError if a file is absent, truncated or damaged, or lacks a tensor."""
        self._folder = folder
        self._entries: dict[str, tuple[str, int, _Entry]] = {}
        for file, listed in sorted(_files(folder).items()):
            begin, header = _header(folder, file)
            if absent := listed - header.keys():
                where = folder.address(file)
                raise DexError(f"{where} lacks the tensor {min(absent)}, which the index places there: get it again.")
            self._entries |= {_of_text(name): (file, begin, entry) for name, entry in header.items()}
        self.names = tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._entries[name][2].shape) if name in self._entries else None

    def dtype(self, name: str) -> np.dtype:
        code = self._entries[name][2].dtype
        if code not in DTYPES:
            raise DexError(
                f"{self.file_of(name)} stores {name} as {code:.60}, and only {', '.join(DTYPES)} are covered: use the "
                "unquantised model."
            )
        return np.dtype(DTYPES[code])

    def file_of(self, name: str) -> str:
        return self._folder.address(self._entries[name][0])

    def format_of(self, name: str) -> str:
        return self._entries[name][2].dtype

    def blocks(self, name: str) -> np.ndarray:
        raise ValueError(f"{name} is not packed in blocks")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._rows(name, self.dtype(name), start, stop)

    def integers(self, name: str) -> np.ndarray:
        """One tensor of integers."""
        code = self._entries[name][2].dtype
        if code not in _INTEGERS:
            raise DexError(f"{self.file_of(name)} stores {name} as {code:.60}, and not as integers: get it again.")
        return self._rows(name, np.dtype(_INTEGERS[code]), 0, None)

    def _rows(self, name: str, dtype: np.dtype, start: int, stop: int | None) -> np.ndarray:
        file, begin, entry = self._entries[name]
        first, last, _ = slice(start, stop).indices(entry.shape[0])
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        begin += entry.data_offsets[0]
        data = self._folder.read(file, begin + first * row, begin + last * row)
        if data.size != (last - first) * row:
            raise DexError(f"{self.file_of(name)} is truncated: get it again.")
        return data.view(dtype).reshape(last - first, *entry.shape[1:])


def _of_text(name: str) -> str:
    """A tensor's name as a model of text alone has it, where what reads images stands beside that."""
    return re.sub(r"^(model\.)?language_model\.", r"\1", name)


def placed_names(index: bytes, source: str) -> dict[str, set[str]]:
    """The tensors that each file holds, from an index; a DexError when it is none."""
    files: dict[str, set[str]] = {}
    for name, file in parsed(index, _Index, source).weight_map.items():
        files.setdefault(file, set()).add(name)
    return files


def _files(folder: Folder) -> dict[str, set[str]]:
    """Each file, with the names that the index says it holds."""
    if INDEX not in folder.sizes:
        found = [name for name in folder.sizes if name.endswith(".safetensors")]
        # By their usual name first: some directories hold the same weights once more under another.
        return {name: set() for name in [name for name in found if name.startswith("model")] or found}
    files = placed_names(content_of(folder, INDEX), folder.address(INDEX))
    for file, names in files.items():
        if file not in folder.sizes:
            raise DexError(
                f"{folder.address(file)} is absent, and {INDEX} says that it holds {len(names)} tensors, "
                f"{min(names)} among them: get it again."
            )
    return files


def _header(folder: Folder, file: str) -> tuple[int, dict[str, _Entry]]:
    """(where the data begin, tensor -> its entry): the format's first 8 bytes and its JSON."""
    source, size = folder.address(file), folder.sizes[file]
    length = int.from_bytes(folder.read(file, 0, 8).tobytes(), "little")
    begin = 8 + length
    if not 2 <= length <= _HEADER_LIMIT or begin > size:
        raise DexError(f"{source} is truncated or damaged, a header of {length:,} bytes: get it again.")
    header = parsed(folder.read(file, 8, begin).tobytes(), dict[str, Any], source)
    header.pop("__metadata__", None)
    entries = typed(header, dict[str, _Entry], source)
    for name, entry in entries.items():
        first, last = entry.data_offsets
        if begin + last > size:
            raise DexError(f"{source} is truncated: {name} ends beyond its {size:,} bytes: get it again.")
        bytes_wanted = math.prod(entry.shape) * np.dtype(_NUMBERS.get(entry.dtype, np.uint8)).itemsize
        if entry.dtype in _NUMBERS and last - first != bytes_wanted:
            raise DexError(f"{source} is damaged: {name} takes {last - first:,} bytes and {bytes_wanted:,} are needed.")
    return begin, entries
