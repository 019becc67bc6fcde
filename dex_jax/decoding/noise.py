"""The sampling noise of the positions that the lattice may reach, each made once.

Letters: B sequences, M positions that are kept, N rows, n positions of a sequence, V vocabulary, V' its given columns.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.sampling import Sampling, position_noise


class Noise(NamedTuple):
    """Sampling noise, which is made once for each position and kept while any node may need it."""

    # [B, M, V] float32, position n at n mod M; M is the most positions that a loop reaches ahead
    ring: jax.Array
    made: jax.Array  # [B] int32, the last position that has noise


def make_noise(noise: Noise | None, sampling: Sampling | None, frontier: jax.Array) -> Noise | None:
    """Make the noise of all positions up to the frontier [B] int32 that have none yet, from sampling's keys."""
    if noise is None:
        return None
    assert sampling is not None

    def one_more(noise: Noise) -> Noise:
        wanted = frontier > noise.made
        position = noise.made + 1
        made = jax.vmap(position_noise, (0, 0, None))(sampling.keys, position, noise.ring.shape[2])
        at = jnp.where(wanted, position % noise.ring.shape[1], noise.ring.shape[1])
        ring = noise.ring.at[jnp.arange(at.shape[0]), at].set(made, mode="drop")
        return Noise(ring, noise.made + wanted)

    return jax.lax.while_loop(lambda noise: jnp.any(frontier > noise.made), one_more, noise)


def noise_at(
    noise: Noise | None, position: jax.Array, columns: jax.Array | None = None, sequence: jax.Array | None = None
) -> jax.Array | None:
    """Return the noise at positions [B, n]: [B n, V], or at [N] of sequences [N]: [N, V]; None when greedy.

    With `columns` [V'] it is that of these tokens alone.
    """
    if noise is None:
        return None
    if sequence is None:
        sequence = jnp.arange(position.shape[0])[:, None]
    rows = noise.ring[sequence, position % noise.ring.shape[1]].reshape(-1, noise.ring.shape[2])
    return rows if columns is None else rows[:, columns]
