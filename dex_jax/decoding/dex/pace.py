"""The choice of rows and of drafted levels: as many as promise the most tokens for what they cost.

A tick of one row without drafts costs what AR's step does and makes what that makes, so drafts run where they should be
faster. What rows promise is the probability of their paths; where fewer come true, promises count for less, and where
little of what is drafted is worth running, drafting stops for a while.

Letters: B sequences, C row counts that a tick may choose from, N rows of a cohort.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FADING = 1 / 128
"""The share of what is remembered that each tick forgets."""

BELIEVED = 4.0
"""So many promised tokens, and as many that came of them, are believed before the first and never forgotten."""

HOPE = 0.5
"""The share of what the drafter is asked for that is believed to be worth running."""


class Pace(NamedTuple):
    """The costs of ticks here, and what came of promises lately.

    Attributes:
      costs: [C + 1] float32, of a tick of each row count, in those of a tick of one row; the last of drafting a level.
      promised, kept: [B] float32, tokens that drafts and seeds promised, and those that they brought.
      asked: [B] float32, summed probabilities of the rows below which the drafter was asked, less those of what the
        text already gave there.
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
    """Costs before any is known: about those on two processor cores.

    Examples:
      >>> usual_costs((1, 4, 16))
      [1.0, 1.5, 3.5, 0.1]
    """
    return [*(1 + (count - 1) / 6 for count in counts), 0.1]


def begin(batch: int, counts: tuple[int, ...]) -> Pace:
    """The pace before tick 0, for `counts` of rows to choose from."""
    nothing, one = jnp.zeros(batch, jnp.float32), jnp.ones(batch, jnp.int32)
    ran = jnp.zeros((batch, len(counts) + 1), jnp.int32)
    costs = jnp.asarray(usual_costs(counts), jnp.float32)
    return Pace(costs, nothing, nothing, nothing, nothing, one, len(counts) * one, ran)


def is_worth_a_level(pace: Pace, going: jax.Array, below: jax.Array) -> jax.Array:
    """Say whether to draft a level below rows that promise `below` [B] tokens beyond the text's: bool scalar.

    It is worth it if the level should bring more tokens than AR makes in the time that drafting it takes, plus the
    extra time of a tick of the next larger number of rows.
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
    """The index of the row count that promises the most tokens for what it costs: int32 scalar.

    Args:
      pace: what is known.
      counts: C row counts, ascending.
      going: [B] bool, the sequences that count.
      promise: [B, N] float32, the probability that each row of a sorted cohort is emitted.
      roots: [B] float32, 1 where the first row is a root, which surely is, 0 elsewhere.
      levels: int32, how many levels were drafted.
      stages: K; of so many cohorts, side by side, each makes ticks longer by its share alone.
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
    """The pace after a tick.

    Args:
      pace: before it.
      length: [B] int32, tokens that have been emitted so far.
      roots: [B] float32, as of `choose`.
      rung, levels: int32, what was chosen for the next tick, and how many levels were drafted for it.
      promised: [B] float32, tokens that its rows promise, a root among them.
      asked, drafted: [B] float32, as of Pace, of this tick.
    """
    count = pace.ran.shape[1] - 1
    paid = (jnp.arange(count + 1)[None] == pace.rung[:, None]).astype(jnp.int32).at[:, count].set(levels)
    # The newest promise comes true in a later tick, if it does; roots come one by one, and never count.
    added = (promised - roots, length - pace.length - roots, asked, drafted)
    kept = (pace.promised, pace.kept, pace.asked, pace.drafted)
    promised, made, asked, drafted = ((1 - FADING) * old + new for old, new in zip(kept, added, strict=True))
    rungs = jnp.broadcast_to(rung, pace.rung.shape)
    return Pace(pace.costs, promised, made, asked, drafted, length, rungs, pace.ran + paid)
