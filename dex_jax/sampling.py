"""The choice of tokens: greedy, or by position-keyed noise that every exit and every method shares.

The token at absolute position n is argmax(filter(logits / T) + Gumbel(fold_in(key, n))). Because the noise belongs to
the position and not to the step that draws it, any order of evaluation gives the same tokens under the same key.

Letters: B sequences, N rows, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DROPPED = -np.inf
"""The logit of a token that a mask or a filter has removed."""

COLUMN_BLOCKS = (512, 256, 128)
"""The sizes of blocks of columns for `best_column`, which takes the first that divides V."""


class Sampling(NamedTuple):
    """The settings of sampling; None in its place everywhere means greedy.

    Attributes:
      keys: [B] PRNG keys, one a sequence.
      temperature: float32 scalar above 0.
      top_k: int32 scalar, keep the k most likely tokens (and those tied with the k-th); None or V keeps all.
      top_p: float32 scalar in (0, 1], keep the smallest set of most likely tokens with a probability of at least p (and
        those tied with its last), applied after top_k; None or 1 keeps all.
    """

    keys: jax.Array
    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def sampling_keys(seeds: list[int]) -> jax.Array:
    """Return [B] PRNG keys from B seeds, of an implementation that is the same on every backend."""
    return jnp.stack([jax.random.key(seed, impl="threefry2x32") for seed in seeds])


def position_noise(key: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    """Return the Gumbel noise of one absolute position: [V] float32 over the full vocabulary."""
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)


def choose(logits: jax.Array, sampling: Sampling | None, noise: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Choose a token for each row of logits [N, V] float32, DROPPED where masked, with its position's noise [N, V].

    Returns ([N] int32 columns of V, [N] bool whether the row had any token left); greedy ties go to the lowest id.
    """
    adjusted = perturbed_logits(logits, sampling, noise)
    token = best_column(adjusted)
    left = jnp.take_along_axis(adjusted, token[:, None], axis=-1)[:, 0] > DROPPED
    return token, left


def best_column(x: jax.Array) -> jax.Array:
    """Return the first column with the largest value of each row of x [N, V] float32: [N] int32."""
    rows, columns = x.shape
    size = next((size for size in COLUMN_BLOCKS if columns % size == 0), columns)

    def plain(x: jax.Array) -> jax.Array:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)

    def by_blocks(x: jax.Array) -> jax.Array:
        # On CPUs XLA's argmax goes column by column and its max does not.
        blocks = x.reshape(rows, columns // size, size)
        first = plain(jnp.max(blocks, axis=-1))
        within = plain(jnp.take_along_axis(blocks, first[:, None, None], axis=1)[:, 0])
        return first * size + within

    return jax.lax.platform_dependent(x, cpu=by_blocks, default=plain)


def perturbed_logits(logits: jax.Array, sampling: Sampling | None, noise: jax.Array | None) -> jax.Array:
    """Return the values that `choose` takes the argmax of: [N, V] float32."""
    if sampling is None:
        return logits
    assert noise is not None
    return filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p) + noise


def log_total(adjusted: jax.Array, rest: jax.Array | None, sampling: Sampling | None) -> jax.Array:
    """Return the log of the summed exponentials of every row: [N] float32.

    `adjusted` [N, V'] float32 are logits as `perturbed_logits` or the temperature alone has left them, `rest` [N]
    float32 is the logit of all tokens that have no column, divided by the temperature here; None where there are none.
    """
    total = jax.nn.logsumexp(adjusted, axis=-1)
    if rest is None:
        return total
    return jnp.logaddexp(total, rest if sampling is None else rest / sampling.temperature)


def filtered(logits: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None) -> jax.Array:
    """Apply top-k, then top-p: [N, V] float32 with removed tokens at DROPPED.

    It does not sort: the cut is the largest threshold that keeps enough, found some bits at a time on float32 logits as
    ordered integers (a sort of 33 rows x 49,152 costs more than ten decoding steps of a small model on a CPU).
    """
    # This is decided at run time, so that one program serves with and without a filter.
    if top_k is not None:
        logits = jax.lax.cond(jnp.any(top_k < logits.shape[-1]), _most_likely, lambda x, _: x, logits, top_k)
    if top_p is not None:
        logits = jax.lax.cond(jnp.any(top_p < 1), _probable, lambda x, _: x, logits, top_p)
    return logits


def _most_likely(logits: jax.Array, most: jax.Array) -> jax.Array:
    most = jnp.minimum(most, logits.shape[-1]).astype(jnp.int32)
    return _cut(logits, jnp.int32(1), most)


def _probable(logits: jax.Array, enough: jax.Array) -> jax.Array:
    return _cut(logits, jax.nn.softmax(logits, axis=-1), enough)


def _cut(logits: jax.Array, weight: jax.Array, enough: jax.Array) -> jax.Array:
    """Drop every logit below the largest t for which what is at least t weighs `enough`; nothing if there is none.

    `weight` is of each logit, or the same for all.
    """
    ordered = _ordered_bits(logits)
    weight = jnp.broadcast_to(weight, logits.shape)[:, None]
    # On a CPU a question is a pass over the logits, elsewhere a turn is some launches whatever it asks.
    ways = {"cpu": functools.partial(threshold, 1), "default": functools.partial(threshold, 4)}
    found = jax.lax.platform_dependent(ordered, weight, enough, **ways)
    return jnp.where(ordered >= found[:, None], logits, DROPPED)


def threshold(bits: int, ordered: jax.Array, weight: jax.Array, enough: jax.Array) -> jax.Array:
    """Find the largest t of each row for which what is at least t weighs `enough`, `bits` bits a turn: [N] uint32.

    `ordered` [N, V] uint32 weigh `weight` [N, 1, V]; `enough` is a scalar or [N]; the result is 0 where all weigh less.
    """
    enough = jnp.broadcast_to(enough, ordered.shape[:1])[:, None]

    def turn(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        candidates = found[:, None] | (jnp.arange(1, 1 << bits, dtype=jnp.uint32)[None] << shift)
        kept = jnp.where(ordered[:, None] >= candidates[:, :, None], weight, jnp.zeros_like(weight))
        return found | (jnp.sum(jnp.sum(kept, axis=-1) >= enough, axis=-1, dtype=jnp.uint32) << shift)

    return jax.lax.fori_loop(0, 32 // bits, turn, jnp.zeros(ordered.shape[0], jnp.uint32))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Map float32 to uint32 of the same order; -0.0 counts as 0.0."""
    # XLA would simplify x + 0.0 to x.
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x.astype(jnp.float32)), jnp.uint32)
    sign = bits >> 31
    return jnp.where(sign == 1, ~bits, bits | jnp.uint32(0x80000000))
