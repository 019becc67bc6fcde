"""The tokens that a method has emitted, in fixed shapes, the rule that ends a sequence, and the ticks that it took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.errors import DexError
from dex_jax.lattice import NO_TOKEN

PREFILL_EXIT = -1
"""The entry of token 0, which the prefill gives, in `Record.exits`."""


class Limits(NamedTuple):
    """The limits that end a sequence.

    Attributes:
      max_new_tokens: [B] int32, at least 1, at most the width of Record.tokens.
      eos_ids: [E] int32, tokens that end a sequence (and are emitted).
    """

    max_new_tokens: jax.Array
    eos_ids: jax.Array


class Record(NamedTuple):
    """The tokens emitted so far, with their exits and the ticks that they took.

    Attributes:
      tokens: [B, T] int32, NO_TOKEN beyond each length.
      exits: [B, T] int32, born_at of each token; PREFILL_EXIT for token 0 and beyond the length.
      lengths: [B] int32.
      ticks: [B] int32, frozen when a sequence ends.
      done: [B] bool.
      counts: further counts of a loop of one's own, arrays with a leading axis B; () for nothing.
    """

    tokens: jax.Array
    exits: jax.Array
    lengths: jax.Array
    ticks: jax.Array
    done: jax.Array
    counts: Any = ()


def check_limits(limits: Limits, batch: int) -> None:
    """Raise DexError unless `limits` are Limits of `batch` sequences."""
    if not isinstance(limits, Limits) or jnp.shape(limits.max_new_tokens) != (batch,) or jnp.ndim(limits.eos_ids) != 1:
        raise DexError(
            f"limits are dex_jax.Limits(max_new_tokens, eos_ids), two int32 arrays: a number for each of the {batch} "
            "sequences, and token ids"
        )


def new_record(first_token: jax.Array, capacity: int, limits: Limits) -> Record:
    """Return a record that holds token 0: first_token [B] int32, capacity T."""
    batch = first_token.shape[0]
    check_limits(limits, batch)
    most = limits.max_new_tokens
    if not isinstance(most, jax.core.Tracer) and np.max(most) > capacity:
        raise DexError(f"max_new_tokens {np.max(most)} needs a capacity of as many tokens, not of {capacity}")
    blank = jnp.full((batch, capacity), NO_TOKEN, jnp.int32)
    return Record(
        tokens=blank.at[:, 0].set(first_token),
        exits=jnp.full((batch, capacity), PREFILL_EXIT, jnp.int32),
        lengths=jnp.ones(batch, jnp.int32),
        ticks=jnp.zeros(batch, jnp.int32),
        done=_ends(first_token, jnp.ones(batch, jnp.int32), limits),
    )


def emit(record: Record, token: jax.Array, born_at: jax.Array, where: jax.Array, limits: Limits) -> Record:
    """Append token [B] where `where` [B] is true, which no finished sequence may be, and count a tick."""
    place = jnp.where(where, record.lengths, record.tokens.shape[1])
    sequences = jnp.arange(record.tokens.shape[0])
    lengths = record.lengths + where
    return record._replace(
        tokens=record.tokens.at[sequences, place].set(token, mode="drop"),
        exits=record.exits.at[sequences, place].set(born_at, mode="drop"),
        lengths=lengths,
        ticks=record.ticks + ~record.done,
        done=record.done | (where & _ends(token, lengths, limits)),
    )


def emit_path(
    record: Record, tokens: jax.Array, born_at: jax.Array, count: jax.Array, limits: Limits
) -> tuple[Record, jax.Array]:
    """Append several tokens at once, as repeated calls of `emit` would, but count no tick.

    The first `count` [B] of tokens and born_at [B, P] are appended, up to the end of a sequence. Gives (record, [B, P]
    int32, the place of each token, or the capacity T if it was not appended).
    """
    batch, size = tokens.shape
    step = jnp.arange(size)[None]
    ends = jax.vmap(_ends, (1, 1, None), 1)(tokens, record.lengths[:, None] + 1 + step, limits)
    ended_before = jnp.cumsum(ends, axis=1) - ends > 0
    here = (step < count[:, None]) & ~record.done[:, None] & ~ended_before
    place = jnp.where(here, record.lengths[:, None] + step, record.tokens.shape[1])
    sequences = jnp.arange(batch)[:, None]
    return record._replace(
        tokens=record.tokens.at[sequences, place].set(tokens, mode="drop"),
        exits=record.exits.at[sequences, place].set(born_at, mode="drop"),
        lengths=record.lengths + jnp.sum(here, axis=1, dtype=jnp.int32),
        done=record.done | jnp.any(here & ends, axis=1),
    ), place


def until_done(step: Callable[[Any], Any], state: Any, until_tick: jax.Array | None) -> Any:
    """Run `step` under one lax.while_loop until every sequence is done, or until `until_tick` (int32 scalar).

    `state` is that of any method, with a `record` and a `tick`.
    """

    def going(state: Any) -> jax.Array:
        more = jnp.any(~state.record.done)
        return more if until_tick is None else more & (state.tick < until_tick)

    return jax.lax.while_loop(going, step, state)


def _ends(token: jax.Array, lengths: jax.Array, limits: Limits) -> jax.Array:
    is_eos = jnp.any(token[:, None] == limits.eos_ids[None, :], axis=1)
    return is_eos | (lengths >= limits.max_new_tokens)


def ticks_of(exits: np.ndarray, length: int, stages: int) -> int:
    """Return the ticks that a sequence of `length` tokens took: K + sum(exits[1 : n - 1]), 0 for one token.

    Examples:
      >>> ticks_of(np.array([-1, 2, 5, 1]), 4, stages=5)
      12
    """
    return 0 if length < 2 else stages + int(exits[1 : length - 1].sum())


def depth_side_speedup(ticks: np.ndarray, lengths: np.ndarray, stages: int) -> np.ndarray:
    """Return K (n - 1) / ticks for each sequence, NaN where n = 1."""
    ticks = np.asarray(ticks, np.float64)
    return np.where(lengths > 1, stages * (lengths - 1) / np.where(ticks > 0, ticks, 1), np.nan)
