"""Grouped-query attention over several sets of keys: in C++ on CPUs, by Triton or cuDNN on newer GPUs, else by XLA.

Letters: B sequences, R rows a sequence (tokens of a prompt chunk, or lattice nodes), H query heads, G key-value heads,
d head width, S keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.nn import few_rows, gpu_attention
from dex_jax.nn.products import gpu_capability, matmul_precision

MASKED_SCORE = -1e30

KEY_BLOCK = 512
"""Number of keys in a block, where more than MANY_ROWS rows attend."""

MANY_ROWS = 16
"""The largest number of rows that are scored with all keys at once."""

FEW_KEYS = 16
"""The most keys of a source that GPUs score with sums, which XLA fuses with the operations around them."""


class KeyValues(NamedTuple):
    """Keys (after RoPE) and values that rows may attend to."""

    keys: Any  # [B, G, S, d]; a few_rows.OneOf where layers are a loop
    values: Any  # as keys
    mask: jax.Array  # [B, R, S] bool, the keys that each row sees; broadcasting over R is allowed


def capped(x: jax.Array, cap: float | jax.Array | None) -> jax.Array:
    """Return cap tanh(x / cap), or x where `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def causal_rows(batch: int, rows: int) -> jax.Array:
    """Return the causal attention mask of consecutive rows: [B, R, R] bool."""
    return jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool))[None], (batch, rows, rows))


def attend(queries: jax.Array, sources: Sequence[KeyValues], cap: float | None = None) -> jax.Array:
    """Attend with queries [B, R, H, d] to all sources, which share one softmax in float32.

    Every row must see at least one key. Scores are `capped` by `cap`. Returns [B, R, H, d] in the queries' dtype.
    """
    if isinstance(sources[0].keys, few_rows.OneOf):
        return _attend_few_rows(cap, queries, list(sources))
    stored = {x.dtype for source in sources for x in source[:2]}
    many = queries.shape[1] > MANY_ROWS and any(source.keys.shape[2] > KEY_BLOCK for source in sources)
    ways: dict[str, Any] = {"default": _attend_in_blocks if many else _attend}
    known = len(stored) == 1 and stored | {queries.dtype} <= {*few_rows.DTYPES}
    if known and queries.shape[3] % few_rows.LANES == 0 and few_rows.ready():
        ways["cpu"] = _attend_few_rows
    capability = gpu_capability()
    if not many and cap is None and gpu_attention.fits(queries, sources):
        ways["cuda"] = _attend_in_one_kernel
    elif capability and not many:
        ways["cuda"] = functools.partial(_attend, on_gpu=True)
    elif capability >= 8 and cap is None and stored == {queries.dtype} != {jnp.dtype(jnp.float32)}:
        widest = 256 if capability >= 9 else 128
        if queries.shape[3] % 8 == 0 and queries.shape[3] <= widest:
            ways["cuda"] = _attend_fused
    ways = {platform: functools.partial(way, cap) for platform, way in ways.items()}
    if len(ways) == 1:
        return ways["default"](queries, sources)
    return jax.lax.platform_dependent(queries, list(sources), **ways)


def _attend_fused(
    cap: None, queries: jax.Array, sources: Sequence[KeyValues], by: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """Compute `_attend` without any score in the main memory; `by` is jax.nn.dot_product_attention's implementation."""
    mask = [jnp.broadcast_to(s.mask, (*queries.shape[:2], s.keys.shape[2])) for s in sources]
    pairs = zip(*(source[:2] for source in sources), strict=True)
    keys, values = (jnp.concatenate(each, axis=2).swapaxes(1, 2) for each in pairs)
    joined = jnp.concatenate(mask, axis=2)[:, None]
    return jax.nn.dot_product_attention(queries, keys, values, mask=joined, implementation=by)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_few_rows(cap: float | None, queries: jax.Array, sources: Sequence[KeyValues]) -> jax.Array:
    flat = (x for source in sources for x in source)
    return few_rows.few_rows_attention(queries, *flat, cap=cap).astype(queries.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_in_one_kernel(cap: None, queries: jax.Array, sources: Sequence[KeyValues]) -> jax.Array:
    return gpu_attention.attend_in_one_kernel(queries, sources)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_in_blocks(cap: float | None, queries: jax.Array, sources: Sequence[KeyValues]) -> jax.Array:
    """Compute `_attend` block by block of keys up to the last that a row sees: most of a KV cache is often empty."""
    rows, heads, width = queries.shape[1:]
    groups = sources[0].keys.shape[1]
    by_group = _by_group(queries, groups)

    def add(state: tuple, keys: jax.Array, values: jax.Array, mask: jax.Array) -> tuple:
        most, total, mixed = state
        scores = capped(_sum_in_float32("bgsd,bgnd->bgsn", keys, by_group) * width**-0.5, cap)
        seen = _seen_by_group(mask, rows, heads // groups)
        scores = jnp.where(seen.swapaxes(1, 2)[:, None], scores, MASKED_SCORE)
        new = jnp.maximum(most, scores.max(axis=2))
        weights, rescale = jnp.exp(scores - new[:, :, None]), jnp.exp(most - new)
        part = _sum_in_float32("bgsn,bgsd->bgnd", weights.astype(values.dtype), values)
        return new, total * rescale + weights.sum(axis=2), mixed * rescale[..., None] + part

    shape = by_group.shape[:3]
    state = (jnp.full(shape, MASKED_SCORE), jnp.zeros(shape), jnp.zeros((*shape, width)))
    # Every row sees itself in the last source: then what was added before for rows that saw nothing gets the weight 0.
    for source in sources:
        length = source.keys.shape[2]
        if length <= KEY_BLOCK:
            state = add(state, *source)
            continue

        def block(i: jax.Array, state: tuple, source: KeyValues = source, length: int = length) -> tuple:
            at = jnp.minimum(i * KEY_BLOCK, length - KEY_BLOCK)
            keys, values, mask = (jax.lax.dynamic_slice_in_dim(x, at, KEY_BLOCK, axis=2) for x in source)
            return add(state, keys, values, mask & (at + jnp.arange(KEY_BLOCK) >= i * KEY_BLOCK)[None, None])

        last = jnp.max(jnp.where(source.mask, jnp.arange(1, length + 1)[None, None], 0))
        state = jax.lax.fori_loop(0, (last + KEY_BLOCK - 1) // KEY_BLOCK, block, state)
    _, total, mixed = state
    return _by_row(mixed / total[..., None], rows).astype(queries.dtype)


def _tangent(attention, cap: float | None, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (queries, sources), (queries_tangent, sources_tangent) = primals, tangents

    def plain(queries: jax.Array, pairs: list) -> jax.Array:
        both = [KeyValues(keys, values, s.mask) for (keys, values), s in zip(pairs, sources, strict=True)]
        return _attend(cap, queries, both)

    pairs, pairs_tangent = ([source[:2] for source in each] for each in (sources, sources_tangent))
    _, tangent = jax.jvp(plain, (queries, pairs), (queries_tangent, pairs_tangent))
    return attention(cap, queries, sources), tangent


for _attention in (_attend_few_rows, _attend_in_blocks, _attend_in_one_kernel):
    _attention.defjvp(functools.partial(_tangent, _attention))


def _by_group(queries: jax.Array, groups: int) -> jax.Array:
    """Group queries [B, R, H, d] by the keys that they share: [B, G, n, d], n = H R / G, head by head."""
    return queries.swapaxes(1, 2).reshape(queries.shape[0], groups, -1, queries.shape[3])


def _by_row(attended: jax.Array, rows: int) -> jax.Array:
    """Undo `_by_group`: [B, G, n, d] -> [B, R, H, d]."""
    return attended.reshape(attended.shape[0], -1, rows, attended.shape[3]).swapaxes(1, 2)


def _seen_by_group(mask: jax.Array, rows: int, share: int) -> jax.Array:
    """Repeat a mask [B, R, S] for `share` heads: [B, n, S]; a mask [B, 1, S] of all rows stays as it is."""
    return mask if mask.shape[1] < rows else jnp.tile(mask, (1, share, 1))


def _attend(cap: float | None, queries: jax.Array, sources: Sequence[KeyValues], on_gpu: bool = False) -> jax.Array:
    rows, heads, width = queries.shape[1:]
    groups = sources[0].keys.shape[1]
    by_group = _by_group(queries, groups)

    def product(source: KeyValues) -> jax.Array:
        if not on_gpu:
            # Keys times queries, so that the cache is read as it lies: the other way round XLA transposes it.
            return _sum_in_float32("bgsd,bgnd->bgsn", source.keys, by_group).swapaxes(2, 3)
        if source.keys.shape[2] > FEW_KEYS:
            # Without a barrier XLA joins products of the same queries with two sources into one, and copies all keys.
            own = by_group if source is sources[0] else jax.lax.optimization_barrier(by_group)
            return _sum_in_float32("bgnd,bgsd->bgns", own, source.keys)
        each = by_group[:, :, :, None].astype(jnp.float32)
        return jnp.sum(each * source.keys[:, :, None].astype(jnp.float32), axis=-1)

    def scored(source: KeyValues) -> jax.Array:
        seen = _seen_by_group(source.mask, rows, heads // groups)
        return jnp.where(seen[:, None], capped(product(source) * width**-0.5, cap), MASKED_SCORE)

    def mixed(weights: jax.Array, source: KeyValues) -> jax.Array:
        if not on_gpu or source.keys.shape[2] > FEW_KEYS:
            return _sum_in_float32("bgns,bgsd->bgnd", weights, source.values)
        return jnp.sum(weights[..., None].astype(jnp.float32) * source.values[:, :, None].astype(jnp.float32), axis=-2)

    scores = jnp.concatenate([scored(each) for each in sources], axis=-1)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    bounds = np.cumsum([source.keys.shape[2] for source in sources])[:-1]
    shares = jnp.split(weights.astype(queries.dtype), bounds, axis=-1)
    parts = [mixed(share, source) for share, source in zip(shares, sources, strict=True)]
    return _by_row(functools.reduce(jnp.add, parts) / total, rows).astype(queries.dtype)


def _sum_in_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute the einsum of two arrays of one dtype with a float32 result."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype != jnp.bfloat16:
        return product(a, b)
    # jaxlib's CPU backend (0.10.2) has no kernel for some batched bfloat16 products with a float32 result, and says so
    # only when it runs them.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=product)
