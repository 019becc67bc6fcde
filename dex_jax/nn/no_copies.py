"""Two hints that keep XLA from copying a cache and from computing a value anew for each of its uses.

Both return what they are given. In a compiled program a copied cache is `%copy = f32[B,G,S,d] copy(%cache)` before its
dynamic-update-slice, and a rotary table that is computed again is a `cosine` in every fusion that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def ordered_after(index: jax.Array, *results: jax.Array) -> jax.Array:
    """Return `index` unchanged, but not before every one of `results` (any float arrays) has been computed.

    Writing at such an index tells XLA that a cache is read before it is written. Without that it cannot prove the order
    inside a loop and copies the whole cache in every step. TPUs copy nothing without it, and with it they give every
    cache a new layout in every tick (tests/test_compiled.py), so there it does nothing.
    """

    def depend(index: jax.Array, *results: jax.Array) -> jax.Array:
        bit = jnp.int32(0)
        for result in results:
            first = result.reshape(-1)[0].astype(jnp.float32)
            bit = bit | (jax.lax.bitcast_convert_type(first, jnp.int32) & 1)
        return jnp.minimum(index, index + bit)

    return jax.lax.platform_dependent(index, *results, tpu=lambda index, *results: index, default=depend)


def without_recompute(function: Callable[..., Any], first: jax.Array, *others: jax.Array) -> Any:
    """Return function(first, *others), which CPUs do not compute anew for each use; `first` is int32, above -2^30."""

    def branch(first: jax.Array, *others: jax.Array) -> Any:
        # XLA does not know that this is always true, and leaves branches alone.
        above = jnp.any(first > -(2**30))
        return jax.lax.cond(above, function, lambda first, *others: function(0 * first, *others), first, *others)

    return jax.lax.platform_dependent(first, *others, cpu=branch, default=function)
