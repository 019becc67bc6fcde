"""Proposals that cost nothing: what followed the longest suffix of the text where it stood before.

Letters: S length of the buffer, M proposed tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax.lattice import NO_TOKEN

COMPARED = 16
"""Number of tokens compared: occurrences that agree on all are equally long, and the latest is more often right."""

LONGEST = 64
"""Lengths of matches are told apart up to this."""


def said_next(text: jax.Array, length: jax.Array, trust: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the M = `count` tokens with which a text [S] of some `length` may go on: as it did before.

    `trust` [LONGEST + 1] float32 as TreeShape.trust. With every token that is right a match is longer.

    Returns:
      (tokens [M] int32, log-probability [M] float32 of each that it is right if those before it are).
    """
    tokens, matched = continuation(text, length, count)
    lengths = jnp.where(matched > 0, matched + jnp.arange(count), 0)
    return tokens, jnp.where(tokens == NO_TOKEN, -jnp.inf, trust[jnp.minimum(lengths, LONGEST)])


def continuation(text: jax.Array, length: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The M = `count` tokens after the longest earlier occurrence of the text's suffix, the latest one of several.

    An occurrence whose continuation runs into the suffix itself is a loop, and goes on as one. text [S] int32 has
    tokens at their absolute positions; what lies beyond `length` (int32) may be anything. Gives (tokens [M] int32,
    int32 length of the match, 0 to LONGEST; the tokens mean nothing when it is 0).
    """
    size = text.shape[0]
    at = jnp.arange(size)
    last = length - 1

    # Shifts are static: a loop over them would cost more than the comparisons.
    same = [(jnp.roll(text, i) == text[jnp.maximum(last - i, 0)]) & (at >= i) & (last >= i) for i in range(COMPARED)]
    going = at < last
    matched = jnp.zeros(size, jnp.int32)
    for each in same:
        going &= each
        matched += going
    best = jnp.max(matched)
    end = jnp.max(jnp.where(matched == best, at, -1))
    period = jnp.maximum(last - end, 1)
    said = text[jnp.clip(end + 1 + jnp.arange(count) % period, 0, size - 1)]
    back = jnp.arange(LONGEST)
    inside = (end >= back) & (last >= back)
    agree = text[jnp.maximum(last - back, 0)] == text[jnp.maximum(end - back, 0)]
    return said, jnp.where(best > 0, jnp.min(jnp.where(agree & inside, LONGEST, back)), 0)
