"""Packed weights in a layout for products on CPUs: bytes of 16 outputs side by side, in tiles (nn/cpp/tiles.h).

A kernel in tiles has the shape that it has in a file, [out, bytes]. Within 16 outputs the bytes of a block lie in
units, words of 4 bytes and then halves of 2, and of each unit those of all outputs lie together. Nothing is rounded.

Letters: r outputs of a group, 16 or what is left of the last one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.nn.blocks import FORMATS

OUTPUTS = 16
"""Number of outputs of a tile."""

WORD = 4
"""Number of bytes of a word, which is also the unit of 8-bit codes without scales."""

_HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""The offsets of the float16 numbers in a block, by format; all else is words."""


class Places(NamedTuple):
    """The place of each byte of a row, [bytes] int32: in a group of r outputs r * unit + output * size + within."""

    unit: np.ndarray
    size: np.ndarray
    within: np.ndarray

    def of(self, output: Any, outputs: Any) -> Any:
        """Return the places of the bytes of `output` [N] int32 in a group of `outputs`, [N] or a number: [N, bytes]."""
        unit, size, within = (each[None] for each in self)
        return (outputs if isinstance(outputs, int) else outputs[:, None]) * unit + output[:, None] * size + within


@functools.cache
def _places(format: str, width: int) -> Places:
    """Return the places for rows of `width` bytes in one of FORMATS, or of 8-bit codes alone."""
    if format not in FORMATS:
        code = np.arange(width, dtype=np.int32)
        unit = code // WORD * WORD
        return Places(unit, np.minimum(WORD, width - unit), code - unit)
    size = FORMATS[format][1]
    half = np.zeros(size, bool)
    half[[at + i for at in _HALVES[format] for i in (0, 1)]] = True
    place, sizes = np.empty(size, np.int32), np.where(half, 2, WORD).astype(np.int32)
    for own, first in ((~half, 0), (half, np.sum(~half))):
        place[own] = first + np.arange(np.sum(own))
    within = np.where(half, (place - np.sum(~half)) % 2, place % WORD).astype(np.int32)
    block = np.repeat(np.arange(width // size, dtype=np.int32) * size, size)
    each = (np.tile(x, width // size) for x in (place - within, sizes, within))
    unit, sizes, within = each
    return Places(block + unit, sizes, within)


@functools.lru_cache(maxsize=64)
def _sources(format: str, width: int, outputs: int) -> np.ndarray:
    """Return the index among the bytes of the rows, one after the other, of each byte of a group: [r * bytes] int32."""
    places = _places(format, width).of(np.arange(outputs, dtype=np.int32), outputs)
    return np.argsort(places.ravel()).astype(np.int32)


def in_tiles(rows: Any, format: str) -> Any:
    """Put rows [..., out, bytes] of a file into tiles: an array of the same kind, shape and dtype."""
    *lead, count, width = rows.shape
    space = jnp if isinstance(rows, jax.Array) else np
    whole = count // OUTPUTS * OUTPUTS

    def some(rows: Any, outputs: int) -> Any:
        # mode: NumPy would check every index first, which takes seven times as long.
        groups, sources = (
            rows.reshape(*lead, rows.shape[-2] // outputs, outputs * width),
            _sources(format, width, outputs),
        )
        return space.take(groups, sources, axis=-1, mode="clip").reshape(rows.shape)

    if whole == count:
        return some(rows, OUTPUTS)
    parts = [some(rows[..., :whole, :], OUTPUTS)] if whole else []
    parts.append(some(rows[..., whole:, :], count - whole))
    return space.concatenate(parts, axis=-2)


def rows_at(tiles: jax.Array, index: jax.Array, format: str) -> jax.Array:
    """Return the rows at `index` [...] int32 of a kernel [out, bytes] in tiles, as a file has them: [..., bytes]."""
    count, width = tiles.shape
    flat = index.reshape(-1)
    first = flat // OUTPUTS * OUTPUTS
    place = _places(format, width).of(flat - first, jnp.minimum(OUTPUTS, count - first))
    return tiles[first[:, None] + place // width, place % width].reshape(*index.shape, width)


def out_of_tiles(tiles: jax.Array, format: str) -> jax.Array:
    """Put a kernel [..., out, bytes] in tiles back into the order of a file."""
    count, width = tiles.shape[-2:]
    every = jnp.arange(count)
    flat = tiles.reshape(-1, count, width)
    return jax.vmap(lambda one: rows_at(one, every, format))(flat).reshape(tiles.shape)
