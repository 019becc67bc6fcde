"""Writes of rows into the caches of all layers by one Triton kernel, in place, on newer NVIDIA GPUs.

XLA would launch a kernel for the keys and one for the values of each layer.

Letters: L layers, B sequences, G key-value heads, d head width, N rows to choose from.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dex_jax.nn.products import for_triton

MOST_ROWS = 32
"""The most rows of a sequence that the kernel writes, as it loads them one by one."""


def fits(cache: jax.Array, rows: int) -> bool:
    """Return whether the kernel can write `rows` rows of each sequence into caches like this one."""
    return for_triton() and rows <= MOST_ROWS and cache.dtype.itemsize == 2 and cache.shape[-1] % 16 == 0


def write(
    caches: tuple[jax.Array, ...],
    fresh: tuple[jax.Array, jax.Array],
    row: jax.Array,
    start: jax.Array,
    rings: list[int],
    margin: int,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Write rows into caches as `few_rows.write` does; `fresh` are keys and values [L, B, G, N, d].

    `interpret` computes with XLA what the kernel would, for tests.
    """
    layers, batch, groups, rows, width = fresh[0].shape
    count = row.shape[1]

    def whole(cache: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *cache.shape[2:]), lambda i, b, g: (b, g, 0, 0))

    def of_sequence(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, size), lambda i, b, g: (b, 0))

    of_layer = pl.BlockSpec((None, None, None, rows, width), lambda i, b, g: (i, b, g, 0, 0))
    specs = [whole(cache) for cache in caches]
    written = pl.pallas_call(
        functools.partial(_kernel, count=count, rings=tuple(rings), margin=margin),
        grid=(layers, batch, groups),
        in_specs=[of_sequence(1), of_sequence(count), of_layer, of_layer, *specs],
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches],
        input_output_aliases={4 + i: i for i in range(len(caches))},
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="write_rows",
    )(start[:, None], jnp.clip(row, 0, rows - 1), *fresh, *caches)
    return tuple(written)


def _kernel(
    start: Any, row: Any, keys: Any, values: Any, *caches: Any, count: int, rings: tuple[int, ...], margin: int
) -> None:
    """Write the rows of one layer, sequence and head; `caches` are the inputs, then the outputs."""
    size, first, layers = pl.next_power_of_2(count), start[0], len(rings)
    written = jnp.arange(size)
    chosen = [jnp.zeros((size, each.shape[1]), each.dtype) for each in (keys, values)]
    for place in range(count):
        at = pl.ds(row[place], 1)
        one_by_one = zip((keys, values), chosen, strict=True)
        chosen = [jnp.where((written == place)[:, None], each[at, :], known) for each, known in one_by_one]
    for layer, ring in enumerate(rings):

        def write(layer: int = layer, ring: int = ring) -> None:
            place = margin + first % ring if ring else first
            # As in `cache.write_rows`, rows past the ring's end lie in the margin behind it, and again at its start.
            for at in (place, jnp.maximum(place - ring, 0)) if ring else (place,):
                for cache, own in zip(caches[2 * layers :][layer::layers], chosen, strict=True):
                    there = (first >= 0) & (written < count) & (at + written < cache.shape[0])
                    triton.store(cache.at[pl.ds(at, size), :], own, mask=there[:, None])

        pl.when(pl.program_id(0) == layer)(write)
