"""Proposals from the text itself: the tokens that followed an earlier occurrence of its longest suffix.

Letters: S length of the buffer, M proposed tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax.lattice import NO_TOKEN

COMPARED = 16
"""Number of tokens by which occurrences are found; the latest of those that agree on all is right most often."""

LONGEST = 64
"""The largest length of a match; longer ones count as this."""


def continuation_scores(
    text: jax.Array, length: jax.Array, log_probability: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Return the M = `count` tokens that followed the suffix of a text before, with their log-probabilities.

    `text` [S] int32 has `length` tokens; `log_probability` is `TreeShape.match_log_probability`. Each
    token makes the match of the next one longer.

    Returns:
      (tokens [M] int32, log-probability [M] float32 of each that it is right if those before it are).
    """
    tokens, matched = continuation(text, length, count)
    lengths = jnp.where(matched > 0, matched + jnp.arange(count), 0)
    return tokens, jnp.where(tokens == NO_TOKEN, -jnp.inf, log_probability[jnp.minimum(lengths, LONGEST)])


def continuation(text: jax.Array, length: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the M = `count` tokens after the longest earlier occurrence of the text's suffix, the latest of several.

    A continuation that passes the end of the text starts again at its first token. text [S] int32 has tokens at their
    absolute positions; those beyond `length` (int32) may be anything. Gives (tokens [M] int32, int32 length of the
    match, 0 to LONGEST; the tokens mean nothing when it is 0).
    """
    size = text.shape[0]
    at = jnp.arange(size)
    last = length - 1

    back = jnp.arange(LONGEST)
    suffix = jnp.where(last >= back, text[jnp.maximum(last - back, 0)], NO_TOKEN - 1)
    # Slices at static places are one operation together with the comparisons; sixteen rolls would be thirty.
    padded = jnp.pad(text, (COMPARED - 1, 0), constant_values=NO_TOKEN)
    going = at < last
    matched = jnp.zeros(size, jnp.int32)
    for i in range(COMPARED):
        going &= padded[COMPARED - 1 - i :][:size] == suffix[i]
        matched += going
    best = jnp.max(matched)
    end = jnp.max(jnp.where(matched == best, at, -1))
    period = jnp.maximum(last - end, 1)
    said = text[jnp.clip(end + 1 + jnp.arange(count) % period, 0, size - 1)]
    agree = (end >= back) & (suffix == text[jnp.maximum(end - back, 0)])
    return said, jnp.where(best > 0, jnp.min(jnp.where(agree, LONGEST, back)), 0)
