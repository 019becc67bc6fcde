"""The GGUF container: its header, read quickly, and its tensors, dequantised a few rows at a time.

The `gguf` package dequantises. Its reader is not used: it makes several NumPy arrays for every string of the vocabulary
and takes 5 seconds to open the default model, where walking the same bytes with `struct` takes a fifth of one.
"""

# ruff: noqa: D102 (`checkpoint.TensorSource` says what each method gives)

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dex_jax.errors import DexError
from dex_jax.foreign import Size, reading, typed

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CHUNK_ELEMENTS = 1 << 20
_WIDE = 64


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies."""

    kind: str  # ggml's name of its type, such as "Q4_1"
    shape: tuple[int, ...]  # rows first
    row_bytes: int  # of one row, the last axis
    offset: int  # of its first byte in the file

    @property
    def dtype(self) -> np.dtype:
        """The type that its values are read as: the stored one for float16 and bfloat16, float32 otherwise."""
        return np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(self.kind, np.float32))


class GGUFFile:
    """One open GGUF file: its `metadata`, key -> number, string, bool or list, and its `tensors` by name."""

    def __init__(self, path: Path):
        """A DexError: not a GGUF file, a version or byte order that is not known, or a file that ends too early."""
        self.path = path
        with reading(path, "download it again"), open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise DexError(f"{path} is not a GGUF file: it does not begin with the four letters GGUF.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _read_header(_Cursor(data, 4), path)
                size = len(data)
        for name, tensor in self.tensors.items():
            end = tensor.offset + tensor.row_bytes * math.prod(tensor.shape[:-1])
            if end > size:
                raise DexError(
                    f"{path} is truncated: tensor {name} ends at byte {end:,} of a file of {size:,} bytes: "
                    "download it again."
                )

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.tensors else None

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def file_of(self, name: str) -> Path:
        return self.path

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        tensor = self.tensors[name]
        rows = range(*slice(start, stop).indices(tensor.shape[0]))
        if len(tensor.shape) == 1:
            return self._read_rows(tensor, 0, 1)[0][rows.start : rows.stop].copy()
        out = np.empty((len(rows), *tensor.shape[1:]), tensor.dtype)
        chunk = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
        for first in range(0, len(rows), chunk):
            last = min(first + chunk, len(rows))
            out[first:last] = self._read_rows(tensor, rows.start + first, rows.start + last)
        return out

    def format_of(self, name: str) -> str:
        return self.tensors[name].kind

    def blocks(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        return np.array(self._stored_rows(tensor, 0, math.prod(tensor.shape[:-1])))

    def _stored_rows(self, tensor: GGUFTensor, start: int, stop: int) -> np.memmap:
        # A map of its own for every read: the pages leave this process with it, so that reading a whole model never
        # holds the file as well as the arrays.
        offset = tensor.offset + start * tensor.row_bytes
        return np.memmap(self.path, np.uint8, "r", offset, shape=(stop - start, tensor.row_bytes))

    def _read_rows(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
        import gguf

        raw = self._stored_rows(tensor, start, stop)
        if tensor.kind in ("F32", "F16", "BF16"):
            return raw.view(tensor.dtype)
        kind = gguf.GGMLQuantizationType[tensor.kind]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        # gguf works through 16 rows at a time, which is slow where rows are short: longer ones halve the time.
        wide = raw.view(np.ndarray).reshape(-1, math.gcd(raw.size // size, _WIDE) * size)
        try:
            return gguf.quants.dequantize(wide, kind).reshape(stop - start, -1)
        except NotImplementedError as error:  # the gguf package raises it for a kind that it cannot dequantise
            raise DexError(
                f"{self.path} stores weights as {tensor.kind}, which the gguf package cannot dequantise: "
                "use a file in Q8_0, Q4_K_M or F16."
            ) from error


class _Cursor:
    """A reading position in the bytes of a header."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data = data
        self.at = at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise IndexError(f"{count} bytes at {self.at} reach past the end")
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError(f"value type {kind} does not exist")
        return self.scalar(_SCALARS[kind])


def _read_header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise DexError(
            f"{path} is GGUF version {version & 0xFFFF or 'of another byte order'}, and only little-endian versions "
            "2 and 3 are read: convert it again with a current llama.cpp."
        )
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = struct.unpack(f"<{(rank := cursor.scalar('I'))}Q", cursor.take(8 * rank))
        infos.append((name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")))
    alignment = typed(metadata.get("general.alignment", 32), Size, f"general.alignment of {path}")
    base = -(-cursor.at // alignment) * alignment
    return metadata, {name: _tensor(path, name, shape, kind, base + at) for name, shape, kind, at in infos}


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    import gguf

    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError) as error:
        raise DexError(
            f"{path} stores tensor {name} as type {kind}, which the gguf package does not know: update gguf, or use a "
            "file in Q8_0, Q4_K_M or F16."
        ) from error
    if not shape or shape[-1] % block:
        raise DexError(f"{path} is damaged: tensor {name} of shape {list(shape)} is no {known.name}.")
    return GGUFTensor(known.name, shape, shape[-1] // block * size, offset)
