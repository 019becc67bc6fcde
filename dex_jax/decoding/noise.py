"""Sampling noise of the positions that the lattice may reach, made once each.

Letters: B sequences, K stages, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.sampling import Sampling, position_noise


class Noise(NamedTuple):
    """Sampling noise, made once a position and kept while any node may need it.

    Attributes:
      ring: [B, K, V] float32; position n stands at n mod K. Serial rounds have the tree's levels instead of K stages,
        chains a round's rows.
      made: [B] int32, the last position whose noise has been made.
    """

    ring: jax.Array
    made: jax.Array


def make_noise(noise: Noise | None, sampling: Sampling | None, frontier: jax.Array, vocab_size: int) -> Noise | None:
    """Makes the noise of the next position where `frontier` has passed what is made.

    Args:
      noise: so far; None when greedy.
      sampling: its keys make the noise.
      frontier: [B] int32, the furthest position that needs noise. A tick moves it by one at most, so one new position a
        call is enough.
      vocab_size: V.
    """
    if noise is None:
        return None
    assert sampling is not None
    wanted = frontier > noise.made
    position = noise.made + 1

    def make() -> jax.Array:
        return jax.vmap(position_noise, (0, 0, None))(sampling.keys, position, vocab_size)

    at = position % noise.ring.shape[1]
    old = jnp.take_along_axis(noise.ring, at[:, None, None], axis=1)[:, 0]
    new = jnp.where(wanted[:, None], jax.lax.cond(jnp.any(wanted), make, lambda: old), old)
    ring = noise.ring.at[jnp.arange(at.shape[0]), at].set(new)
    return Noise(ring, noise.made + wanted)


def noise_at(noise: Noise, position: jax.Array) -> jax.Array:
    """Rows of noise at positions [B, n]: [B, n, V]."""
    return noise.ring[jnp.arange(position.shape[0])[:, None], position % noise.ring.shape[1]]
