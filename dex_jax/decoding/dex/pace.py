"""The choice of rows and of drafted levels: as many as promise the most tokens for what they cost.

A tick of one row without drafts costs what a step of AR does and emits as much, so drafts run only where they should be
faster. A row promises the probability of its path. Where fewer promises come true, they count for less, and where few
drafts are worth running, drafting stops for a while.

Letters: B sequences, C row counts that a tick may choose from, N rows of a cohort.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FADING = 1 / 128
"""The share by which each tick fades the sums of earlier ticks."""

BELIEVED = 4.0
"""Number of promised tokens, all of them kept, that the sums count in addition from the start; they never fade."""

HOPE = 0.5
"""The share of what the drafter is asked for that is assumed to be worth running at the start."""


class Pace(NamedTuple):
    """The costs of ticks, and how many promised tokens came true lately.

    Attributes:
      costs: [C + 1] float32, of a tick of each row count and of drafting a level, relative to a tick of one row.
      promised, kept: [B] float32, tokens that drafts and seeds promised, and tokens that they gave.
      asked: [B] float32, summed probabilities of the rows below which the drafter was asked, less those of the
        text's own tokens there.
      drafted: [B] float32, summed probabilities of the rows that only the drafter gave and that were run.
      length: [B] int32, tokens that had been emitted after the last tick.
      rung: [B] int32, the index of the row count that the next tick runs, C before tick 0.
      ran: [B, C + 1] int32, how often each cost has been paid.
    """

    costs: jax.Array
    promised: jax.Array
    kept: jax.Array
    asked: jax.Array
    drafted: jax.Array
    length: jax.Array
    rung: jax.Array
    ran: jax.Array

    @property
    def trust(self) -> jax.Array:
        """The tokens that lately came true for each token promised: [B] float32.

        It starts at 1, with the weight of BELIEVED; roots do not count.
        """
        return (jnp.maximum(self.kept, 0) + BELIEVED) / (jnp.maximum(self.promised, 0) + BELIEVED)

    @property
    def hope(self) -> jax.Array:
        """The tokens expected from drafting below rows that promise one token together: [B] float32.

        This is `trust` times the share of what the drafter was asked for that was worth running.
        """
        return self.trust * (self.drafted + BELIEVED * HOPE) / (self.asked + BELIEVED)


def usual_costs(counts: tuple[int, ...]) -> list[float]:
    """Return the costs before any is known: about those on two processor cores.

    Examples:
      >>> usual_costs((1, 4, 16))
      [1.0, 1.5, 3.5, 0.1]
    """
    return [*(1 + (count - 1) / 6 for count in counts), 0.1]


def begin(batch: int, counts: tuple[int, ...]) -> Pace:
    """Return the pace before tick 0, with the row counts `counts` to choose from."""
    nothing, one = jnp.zeros(batch, jnp.float32), jnp.ones(batch, jnp.int32)
    ran = jnp.zeros((batch, len(counts) + 1), jnp.int32)
    costs = jnp.asarray(usual_costs(counts), jnp.float32)
    return Pace(costs, nothing, nothing, nothing, nothing, one, len(counts) * one, ran)


def is_worth_a_level(pace: Pace, going: jax.Array, below: jax.Array) -> jax.Array:
    """Return whether to draft a level below rows that promise `below` [B] tokens beyond the text's: bool scalar.

    It is worth it if the level should give more tokens than AR does in the time that drafting it takes, plus the extra
    time of a tick of the second smallest row count.
    """
    price = pace.costs[-1] + pace.costs[min(1, pace.costs.shape[0] - 2)] - pace.costs[0]
    return jnp.sum(jnp.where(going, pace.hope * below - price, 0)) > 0


def choose(
    pace: Pace,
    counts: tuple[int, ...],
    going: jax.Array,
    promise: jax.Array,
    roots: jax.Array,
    levels: jax.Array,
    stages: int,
) -> jax.Array:
    """Return the index of the row count that promises the most tokens for what it costs: int32 scalar.

    Args:
      pace: the costs, and how far promises come true.
      counts: C row counts, ascending.
      going: [B] bool, the sequences that are not done.
      promise: [B, N] float32, the probability that each row of a sorted cohort is emitted.
      roots: [B] float32, 1 where the first row is a root, which is emitted already, 0 elsewhere.
      levels: int32, how many levels were drafted.
      stages: K; each of the K cohorts that run in a tick adds only its share to its cost.
    """
    tokens = jnp.cumsum(promise, axis=1)[:, np.array(counts) - 1]
    tokens = roots[:, None] + pace.trust[:, None] * (tokens - roots[:, None])
    costs = 1 + (pace.costs[:-1] - 1) / stages + levels * pace.costs[-1]
    return jnp.argmax(jnp.sum(jnp.where(going[:, None], tokens, 0), axis=0) / costs).astype(jnp.int32)


def after(
    pace: Pace,
    length: jax.Array,
    roots: jax.Array,
    rung: jax.Array,
    promised: jax.Array,
    levels: jax.Array,
    asked: jax.Array,
    drafted: jax.Array,
) -> Pace:
    """Return the pace after a tick.

    Args:
      pace: before it.
      length: [B] int32, tokens that have been emitted so far.
      roots: [B] float32, as in `choose`.
      rung: int32, the index of the row count that was chosen for the next tick.
      promised: [B] float32, tokens that the next tick's rows promise, a root among them.
      levels: int32, the number of levels that were drafted for the next tick.
      asked: [B] float32, as in Pace, for the next tick alone.
      drafted: [B] float32, as in Pace, for the next tick alone.
    """
    count = pace.ran.shape[1] - 1
    paid = (jnp.arange(count + 1)[None] == pace.rung[:, None]).astype(jnp.int32).at[:, count].set(levels)
    # The newest promises come true in later ticks, if at all; roots come one by one, and never count.
    added = (promised - roots, length - pace.length - roots, asked, drafted)
    kept = (pace.promised, pace.kept, pace.asked, pace.drafted)
    promised, made, asked, drafted = ((1 - FADING) * old + new for old, new in zip(kept, added, strict=True))
    rungs = jnp.broadcast_to(rung, pace.rung.shape)
    return Pace(pace.costs, promised, made, asked, drafted, length, rungs, pace.ran + paid)
