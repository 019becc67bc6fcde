"""Proposals that cost nothing: what followed the longest suffix of the text where it stood before.

Letters: S length of the buffer, C continuations (the text's own and, where texts are stored, theirs), M proposed
tokens, N stored tokens, G lengths of gram, n tokens of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.lattice import NO_TOKEN

COMPARED = 16
"""Of several occurrences those are the longest that agree on so many tokens: then the latest is more often right."""

LONGEST = 64
"""Lengths of matches are told apart up to this."""

GRAMS = (16, 8, 4, 2)
"""Stored texts are searched for the last so many tokens."""

STORED = 4
"""A match in another text is right about as often as one of 1 + length / STORED tokens in the text itself, and so many
times that where n texts before went on alike: 0.42, 0.73 and 0.94 for 4 or 5 tokens where 0, 1 and 4 or more did, and
0.49, 0.77 and 0.99 for 8 to 11."""

FACTORS = np.array([pow(0x9E3779B1, i + 1, 2**32) for i in range(max(GRAMS))], np.uint32)


class StoredTexts(NamedTuple):
    """Texts of earlier generations and where to find grams in them; what is not used is NO_TOKEN."""

    tokens: Any  # [N] int32, text after text, with NO_TOKEN between them
    ends: Any  # [G, H] int32, where a gram of each of GRAMS and of each hash ended last; H is a power of two
    often: Any  # [G, H] uint8, how many texts before the last one went on there as that does, one after the other


def said_next(
    stored: StoredTexts | None, text: jax.Array, length: jax.Array, trust: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """How a text [S] of some `length` may go on, M = `count` tokens: as it did before, and as `stored` texts did.

    `trust` [LONGEST + 1] float32 as TreeShape.trust. With every token that is right a match is longer.

    Returns:
      (tokens [C, M] int32, log-probability [C, M] float32 of each that it is right if those before it are).
    """
    more = jnp.arange(count)
    said, matched = continuation(text, length, count)
    found = [(said, jnp.where(matched > 0, matched + more, 0))]
    if stored is not None:
        said, agreed, often = stored_continuation(stored, text, length, count)
        found.append((said, jnp.where(agreed > 0, (1 + (agreed + more) // STORED) * (1 + often), 0)))
    tokens, lengths = (jnp.stack(each) for each in zip(*found, strict=True))
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
    return said, jnp.where(best > 0, _agreement(text, last, text, end), 0)


def stored_continuation(
    stored: StoredTexts, text: jax.Array, length: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `continuation`, of the text's suffix in stored texts: found by grams, so that it costs the same in many.

    Tokens are NO_TOKEN from the end of the stored text on. Gives (tokens, length of the match, how many texts before
    went on likewise).
    """
    last, size = length - 1, stored.tokens.shape[0]
    suffixes = [jax.lax.dynamic_slice_in_dim(text, last - gram + 1, gram).astype(jnp.uint32) for gram in GRAMS]
    places = jnp.stack([hashed(suffix, stored.ends.shape[1]) for suffix in suffixes])
    whole = last >= jnp.asarray(GRAMS) - 1
    ends = jnp.where(whole, stored.ends[jnp.arange(len(GRAMS)), places], NO_TOKEN)
    # A gram of the same hash may be another one.
    lengths = jax.vmap(_agreement, (None, None, None, 0))(text, last, stored.tokens, ends)
    best = jnp.argmax(lengths)
    after = ends[best] + 1 + jnp.arange(count)
    said = jnp.where(after < size, stored.tokens[jnp.clip(after, 0, size - 1)], NO_TOKEN)
    length = jnp.min(jnp.where(said == NO_TOKEN, jnp.arange(count), count))  # what follows is another text
    return (
        jnp.where(jnp.arange(count) < length, said, NO_TOKEN),
        lengths[best],
        stored.often[best, places[best]].astype(jnp.int32),
    )


def hashed(grams: Any, size: int) -> Any:
    """Which of `size` places grams [..., n] uint32 of n tokens take: [...] int32. NumPy and JAX arrays alike."""
    mixed = (grams * FACTORS[: grams.shape[-1]]).sum(-1).astype(np.uint32)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x2C1B3C6D)
    return ((mixed ^ (mixed >> 13)) % np.uint32(size)).astype(np.int32)


def _agreement(text: jax.Array, last: jax.Array, other: jax.Array, end: jax.Array) -> jax.Array:
    """Up to `last` in one text and up to `end` in another as many tokens are the same: int32, at most LONGEST."""
    back = jnp.arange(LONGEST)
    inside = (end >= back) & (last >= back)
    same = text[jnp.maximum(last - back, 0)] == other[jnp.maximum(end - back, 0)]
    return jnp.min(jnp.where(same & inside, LONGEST, back))
