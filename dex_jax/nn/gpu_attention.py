"""Attention of few rows on GPUs as one Triton kernel, which reads keys and values once, and only those in use.

A cache is cut into blocks of keys, which several programs share, as one sequence has too few heads for all of a GPU.
Each sums up what it has seen as FlashAttention does (arXiv 2205.14135, algorithm 1), and XLA adds up their sums.

Letters: B sequences, R rows of each, H query heads, G key-value heads, N rows of queries for each of them (R H / G, and
rows of zeros), d head width, S keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dex_jax.nn.products import for_triton

BLOCK, HALF_BLOCK = 64, 32
"""Number of keys a program scores at once: fewer for wide heads, as some GPUs have 100 KB of shared memory a core."""

MOST_NUMBERS, MANY_NUMBERS = 16_384, 4_096
"""The most numbers of queries that a program holds at once, and the count above which it runs on eight warps."""

SMALLEST = 16
"""Number of rows, and of keys, in the smallest product that a matrix unit takes."""

PROGRAMS, MOST_SHARES = 128, 8
"""Number of programs that keep a GPU's processors busy, and the most shares that a KV cache is divided into."""

NOTHING = -1e30
"""A score below all others."""


def fits(queries: jax.Array, sources: Sequence[Any]) -> bool:
    """Return whether the kernel can attend here: few rows in half precision, heads of a width that Triton has."""
    kinds = {queries.dtype, *(x.dtype for source in sources for x in source[:2])}
    width = queries.shape[3]
    half = kinds in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)})
    few = queries.shape[1] <= SMALLEST and sources[-1].keys.shape[2] <= SMALLEST
    shaped = SMALLEST <= width <= 256 and width & (width - 1) == 0
    return for_triton() and half and few and shaped and _size(queries, sources) * width <= MOST_NUMBERS


def attend_in_one_kernel(queries: jax.Array, sources: Sequence[Any], interpret: bool = False) -> jax.Array:
    """Compute `attention.attend` without a cap: queries [B, R, H, d], sources of keys, values [B, G, S, d] and masks.

    The last source has no more than SMALLEST keys. `interpret` computes with XLA what the kernel would, for tests.
    """
    batch, rows, heads, width = queries.shape
    groups = sources[0].keys.shape[1]
    count = rows * heads // groups
    size, block = _size(queries, sources), BLOCK if width <= 128 else HALF_BLOCK
    shares = pl.cdiv(max(source.keys.shape[2] for source in sources), block)
    shares = max(1, min(MOST_SHARES, PROGRAMS // (batch * groups), shares))

    def of_heads(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, g, share: (b, g, *[0] * len(shape)))

    def of_sequence(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, g, share: (b, *[0] * len(shape)))

    def of_shares(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda b, g, share: (share, b, g, *[0] * len(shape)))

    def seen_by_heads(mask: jax.Array) -> jax.Array:
        """Repeat a mask [B, R, S] for all heads: [B, N, S] int8, or [B, 1, S] where all rows see the same."""
        if mask.shape[1] > 1:
            mask = _filled(jnp.repeat(mask, heads // groups, axis=1), 1, size)
        return mask.astype(jnp.int8)

    scaled = queries * jnp.asarray(width**-0.5, queries.dtype)
    by_group = scaled.reshape(batch, rows, groups, -1, width).swapaxes(1, 2).reshape(batch, groups, count, width)
    *caches, own = sources
    # This layer's queries, keys and values go in as one array: to fill up each would be a kernel of its own.
    parts = (_filled(by_group, 2, size), *(_filled(each, 2, SMALLEST) for each in own[:2]))
    entered, among = jnp.concatenate(parts, axis=2), _filled(seen_by_heads(own.mask), 2, SMALLEST)
    arguments, specs = [entered, among], [of_heads(*entered.shape[2:]), of_sequence(*among.shape[1:])]
    for keys, values, mask in caches:
        length = keys.shape[2]
        ends = jnp.max(jnp.where(mask, jnp.arange(1, length + 1), 0), axis=(1, 2)).astype(jnp.int32)
        seen = seen_by_heads(mask)
        arguments += [keys, values, seen, ends[:, None]]
        specs += [of_heads(length, width), of_heads(length, width), of_sequence(*seen.shape[1:]), of_sequence(1)]
    lead = (shares, batch, groups, size)
    highest, total, mixed = pl.pallas_call(
        functools.partial(_kernel, shares=shares, size=size, block=block),
        grid=(batch, groups, shares),
        in_specs=specs,
        out_specs=[of_shares(size), of_shares(size), of_shares(size, width)],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lead, lead, (*lead, width))],
        compiler_params=triton.CompilerParams(num_warps=8 if size * width > MANY_NUMBERS else 4, num_stages=2),
        interpret=interpret,
        name="few_rows_attention",
    )(*arguments)
    # One by one, as reductions would be kernels of their own.
    top = functools.reduce(jnp.maximum, [highest[i] for i in range(shares)])
    rescale = [jnp.exp(highest[i] - top) for i in range(shares)]
    above = functools.reduce(jnp.add, [mixed[i] * rescale[i][..., None] for i in range(shares)])
    below = functools.reduce(jnp.add, [total[i] * rescale[i] for i in range(shares)])
    out = (above / below[..., None])[:, :, :count].reshape(batch, groups, rows, heads // groups, width).swapaxes(1, 2)
    return out.reshape(batch, rows, heads, width).astype(queries.dtype)


def _size(queries: jax.Array, sources: Sequence[Any]) -> int:
    """Return N."""
    return max(SMALLEST, pl.next_power_of_2(queries.shape[1] * queries.shape[2] // sources[0].keys.shape[1]))


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _kernel(entered: Any, among: Any, *refs: Any, shares: int, size: int, block: int) -> None:
    """Attend to a share of the keys of one sequence and head; refs are four of each cache, then the three results."""
    *caches, highest, total, mixed = refs
    share, width = pl.program_id(2), entered.shape[1]
    queries = entered[pl.ds(0, size), :]
    keys, values = (entered[pl.ds(size + at, SMALLEST), :] for at in (0, SMALLEST))
    state = jnp.full(size, NOTHING), jnp.zeros(size), jnp.zeros((size, width))
    state = _add(state, queries, keys, values, (among[...] != 0) & (share == 0))
    for at in range(0, len(caches), 4):
        keys, values, mask, end = caches[at : at + 4]

        def of_block(turn: jax.Array, state: Any, keys: Any = keys, values: Any = values, mask: Any = mask) -> Any:
            columns = pl.ds((share + turn * shares) * block, block)
            inside = columns.start + jnp.arange(block) < keys.shape[0]
            there = jnp.broadcast_to(inside, (mask.shape[0], block))
            seen = triton.load(mask.at[:, columns], mask=there, other=0) != 0
            new = [triton.load(each.at[columns, :], mask=inside[:, None], other=0.0) for each in (keys, values)]
            return _add(state, queries, new[0], new[1], seen)

        blocks = pl.cdiv(end[0], block)
        state = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(blocks - share, 0), shares), of_block, state)
    highest[...], total[...], mixed[...] = state


def _add(state: Any, queries: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> Any:
    """Add some keys to the highest scores [N], the sums of weights [N] and of weighted values [N, d]."""
    highest, total, mixed = state
    scores = jnp.where(seen, _product(queries, keys, 1), NOTHING)
    new = jnp.maximum(highest, jnp.max(scores, axis=1))
    rescale, weights = jnp.exp(highest - new), jnp.where(seen, jnp.exp(scores - new[:, None]), 0)
    added = _product(weights.astype(values.dtype), values, 0)
    return new, total * rescale + jnp.sum(weights, axis=1), mixed * rescale[:, None] + added


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
