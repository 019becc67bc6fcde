"""Proposals that cost nothing: what followed the longest suffix of the text where it stood before.

Letters: S length of the buffer, M proposed tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

COMPARED = 16
"""Of several occurrences those are the longest that agree on so many tokens: then the latest is more often right."""

LONGEST = 64
"""Lengths of matches are told apart up to this."""


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
    back = jnp.arange(LONGEST)
    agree = (text[jnp.maximum(end - back, 0)] == text[jnp.maximum(last - back, 0)]) & (end >= back)
    length = jnp.where(best > 0, jnp.sum(jnp.cumprod(agree)), 0)
    period = jnp.maximum(last - end, 1)
    return text[jnp.clip(end + 1 + jnp.arange(count) % period, 0, size - 1)], length
