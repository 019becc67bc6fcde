"""Rotary position embeddings, stretched or not, over all of a head or a part of it.

Letters: R rows, H query heads, G key-value heads, d head width, d' how much of it is rotated.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import LayerKind, ModelConfig, RopeScaling
from dex_jax.nn import few_rows
from dex_jax.nn.no_copies import without_recompute
from dex_jax.nn.products import dot

ALIKE = LayerKind()
"""The kind of all layers of a model that has but one kind."""


def rope_frequencies(config: ModelConfig, kind: LayerKind = ALIKE) -> np.ndarray:
    """Return the rotary angle per position in layers of a kind: [d' / 2] float32, zeros where nothing is rotated.

    The "llama3" ramp is that of Llama 3.1's release, "yarn" that of arXiv 2309.00071, "longrope" of 2402.13753.
    """
    width = config.rotated_dim
    local = kind.rope == "local" and config.local_rope_theta is not None
    theta = np.float32(config.local_rope_theta if local else config.rope_theta)
    frequencies = (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)
    scaling = config.rope_scaling
    if kind.rope == "none":
        return np.zeros_like(frequencies)
    if scaling is None or kind.rope == "local":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if scaling.long else scaling.short_factors
        return frequencies / np.asarray(factors, np.float32)
    if scaling.kind == "yarn":
        unscaled = 1 - _yarn_ramp(scaling, width, float(theta))
    else:
        turns = scaling.original_context * frequencies / (2 * np.pi)
        unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        unscaled = np.clip(unscaled, 0.0, 1.0)
    return ((1 - unscaled) * frequencies / scaling.factor + unscaled * frequencies).astype(np.float32)


def _yarn_ramp(scaling: RopeScaling, width: int, theta: float) -> np.ndarray:
    """Return the share of each frequency that is stretched, from 0 to 1: [d' / 2]."""
    turning = [
        width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.fast, scaling.slow)
    ]
    first, last = (math.floor(turning[0]), math.ceil(turning[1])) if scaling.truncate else turning
    first, last = max(first, 0), min(last, width - 1)
    return np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)


class Rotation(NamedTuple):
    """The rotation of heads by their positions."""

    cos: jax.Array  # [..., d' / 2] float32
    sin: jax.Array  # [..., d' / 2] float32
    queries: jax.Array | None = None  # [...] float32, another factor of queries; None for 1


def rope_table(positions: jax.Array, config: ModelConfig, kind: LayerKind = ALIKE) -> Rotation:
    """Return the rotation at absolute positions [...] int32 in layers of a kind."""
    frequencies = rope_frequencies(config, kind).reshape((1,) * positions.ndim + (-1,))
    scaling = config.rope_scaling if kind.rope == "main" else None
    magnitude = 1.0 if scaling is None else scaling.magnitude

    def table(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude

    # Otherwise XLA computes sines and cosines anew in every layer, for every head; on CPUs despite the barrier.
    cos, sin = jax.lax.optimization_barrier(without_recompute(table, positions))
    if scaling is None or not scaling.query_growth:
        return Rotation(cos, sin)
    laps = (positions // scaling.original_context).astype(jnp.float32)
    return Rotation(cos, sin, 1 + scaling.query_growth * jnp.log1p(laps))


def turned(heads: jax.Array, rotation: Rotation, groups: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split heads [..., R, (H + 2 G) d] into queries, keys and values, and rotate queries and keys.

    Returns queries [..., R, H, d], keys and values [..., G, R, d].
    """

    def plain(heads: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        apart = heads.reshape(*heads.shape[:-1], -1, width).swapaxes(-2, -3)
        first = apart.shape[-3] - groups
        # Queries and keys at once: that is a kernel less.
        both = _rotated(apart[..., :first, :, :], *(table[..., None, :, :] for table in (cos, sin)))
        queries, keys = jnp.split(both, [first - groups], axis=-3)
        return queries.swapaxes(-2, -3), keys, apart[..., first:, :, :]

    cpp = functools.partial(few_rows.few_rows_turn, groups=groups, width=width)
    return few_rows.in_cpp(cpp, plain, heads, *rotation[:2])


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads [..., d] by tables [..., d' / 2] that broadcast against them; pairs are (i, i + d' / 2)."""
    # To cut and join along the last axis takes a TPU several programs, a product takes one. For single rows of several
    # sequences, a product makes it give stacked caches the layout of the result, a copy of all in every step.
    by_tpu = _by_product if x.shape[-2] > 1 else _by_halves
    return jax.lax.platform_dependent(x, cos, sin, tpu=by_tpu, default=_by_halves)


def _by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    left, right, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1).astype(x.dtype)


def _by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half, width = cos.shape[-1], x.shape[-1]
    across = np.zeros((width, width), np.float32)  # gives each number's partner, with its sign: exact in any dtype
    place = np.arange(half)
    across[place, place + half], across[place + half, place] = -1, 1
    partner = dot(x.reshape(-1, width), jnp.asarray(across, x.dtype), ((1,), (1,))).reshape(x.shape)
    padding = [(0, 0)] * (cos.ndim - 1) + [(0, width - 2 * half)]
    cos, sin = (jnp.concatenate([table, table], axis=-1) for table in (cos, sin))
    cos, sin = jnp.pad(cos, padding, constant_values=1), jnp.pad(sin, padding)
    return (x.astype(jnp.float32) * cos + partner * sin).astype(x.dtype)
