"""The GGUF container: its header, read quickly, and its tensors, dequantised a few rows at a time.

The `gguf` package dequantises. Its reader is not used: it makes several NumPy arrays for every string of the vocabulary
and takes 5 seconds to open the default model, where walking the same bytes with `struct` takes a fifth of one.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dex_jax.config import Size
from dex_jax.foreign import reading, refuse, typed
from dex_jax.io.checkpoint import Stored, Tensors

_ADVICE = "get it again, update gguf, or take a file in Q8_0, Q4_K_M or F16"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CHUNK_ELEMENTS = 1 << 20
_WIDE = 64


class GGUFFile(Tensors):
    """A GGUF file: its `metadata`, key -> number, string, bool or list, and tensors as Hugging Face has them.

    The differences depend on the model: `heads` are the names of matrices in which llama.cpp rearranges rows, with the
    number of heads of each; `norm_offset` is what its converter has added to norms.
    """

    def __init__(self, path: Path):
        """Read the header; raise DexError for no GGUF file, an unknown version or byte order, or a truncated file."""
        self.path = path
        self.heads: dict[str, int] = {}
        self.norm_offset = np.float32(0)
        with reading(path, _ADVICE), open(path, "rb") as file:
            refuse(path, (file.read(4) != b"GGUF", "is not a GGUF file: it does not begin with these four letters"))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.stored = _read_header(_Cursor(data, 4), path)
                size = len(data)
        for name, tensor in self.stored.items():
            offset, row_bytes = tensor.place
            beyond = offset + row_bytes * math.prod(tensor.shape[:-1]) > size
            refuse(path, (beyond, f"is truncated: tensor {name} ends beyond its {size:,} bytes: get it again"))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start` to `stop`; all are read where rows are rearranged."""
        if heads := self.heads.get(name.split(".")[-2]):
            return _unpermute(self._rows(self.stored[name], 0, None), heads)[start:stop]
        rows = self._rows(self.stored[name], start, stop)
        return rows - self.norm_offset if self.norm_offset and name.endswith("norm.weight") else rows

    def blocks(self, name: str) -> np.ndarray:
        """Return the rows as they are stored, in Hugging Face's order: [rows, bytes] uint8."""
        rows = np.array(self._stored_rows(self.stored[name], 0, math.prod(self.stored[name].shape[:-1])))
        heads = self.heads.get(name.split(".")[-2])
        return _unpermute(rows, heads) if heads else rows

    def _rows(self, tensor: Stored, start: int, stop: int | None) -> np.ndarray:
        if len(tensor.shape) == 1:
            return self._dequantised(tensor, 0, 1)[0][start:stop].copy()
        first, last, _ = slice(start, stop).indices(tensor.shape[0])
        out = np.empty((last - first, *tensor.shape[1:]), tensor.dtype)
        chunk = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
        for at in range(first, last, chunk):
            end = min(at + chunk, last)
            out[at - first : end - first] = self._dequantised(tensor, at, end)
        return out

    def _stored_rows(self, tensor: Stored, start: int, stop: int) -> np.memmap:
        # A map of its own for every read: the pages leave this process with it, so that reading a whole model never
        # holds the file as well as the arrays.
        offset, row_bytes = tensor.place
        return np.memmap(self.path, np.uint8, "r", offset + start * row_bytes, shape=(stop - start, row_bytes))

    def _dequantised(self, tensor: Stored, start: int, stop: int) -> np.ndarray:
        import gguf

        raw = self._stored_rows(tensor, start, stop)
        if tensor.format in ("F32", *_DTYPES):
            return raw.view(np.dtype(tensor.dtype))
        kind = gguf.GGMLQuantizationType[tensor.format]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        # gguf works through 16 rows at a time, which is slow where rows are short: longer ones halve the time.
        wide = raw.view(np.ndarray).reshape(-1, math.gcd(raw.size // size, _WIDE) * size)
        with reading(self.path, _ADVICE):  # there are kinds that the gguf package cannot dequantise
            return gguf.quants.dequantize(wide, kind).reshape(stop - start, -1)


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows [heads * d, ...] of q and k.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face and this package rotate halves (i, i + d / 2), so the
    converter interleaves the two halves of every head for architecture "llama".
    """
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


class _Cursor:
    """A reading position in the bytes of a header."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise IndexError(f"{count} bytes at {self.at} reach past the end")
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(inner) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def _read_header(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    version = cursor.scalar("I")
    told = f"is GGUF version {version & 0xFFFF or 'of another byte order'}"
    refuse(path, (version not in (2, 3), f"{told}, and not 2 or 3: convert it again with a current llama.cpp"))
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    # A key comes before its value.
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_values)}
    infos = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = struct.unpack(f"<{(rank := cursor.scalar('I'))}Q", cursor.take(8 * rank))
        infos.append((name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")))
    alignment = typed(metadata.get("general.alignment", 32), Size, f"general.alignment of {path}")
    base = -(-cursor.at // alignment) * alignment
    return metadata, {name: _tensor(path, name, shape, kind, base + at) for name, shape, kind, at in infos}


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    import gguf

    known = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[known]
    uneven = not shape or shape[-1] % block
    refuse(path, (uneven, f"is damaged: tensor {name} of shape {list(shape)} is no {known.name}"))
    dtype = _DTYPES.get(known.name, np.dtype(np.float32))
    return Stored(path, shape, known.name, dtype, (offset, shape[-1] // block * size))
