"""The choice of rows and of drafted levels: the numbers from which the most tokens are expected for what they cost.

A plain tick, of one row without drafts, costs what a step of AR does and emits as much, so drafts run only where they
should be faster. A row is expected to bring the probability of its path. Where fewer tokens are accepted than expected,
rows count for less, and where few drafts are worth running, drafting stops for a while. Where no tick drafts anything,
most do not even look for drafts. docs/concepts.md has the formula, with the letters a (`acceptance`), u (`usefulness`),
p (`probability`), r (`roots`), c (`costs`) and K (`stages`).

Letters: B sequences, C row counts that a tick may choose from, N rows of a cohort.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FADING = 1 / 128
"""The share by which each tick fades the sums of earlier ticks."""

PRIOR = 4.0
"""Number of expected tokens, all of them accepted, that the sums count from the start in addition; they never fade."""

PRIOR_USEFULNESS = 0.5
"""The usefulness that is assumed of the first PRIOR tokens for which the drafter is called."""


CARRIED = 16.0
"""The most tokens of the text before that the sums of a text begin with."""

PATIENCE, REST = 8, 8
"""Number of plain ticks in a row after which the text rests: drafts are looked for in every REST-th tick only."""

NEVER = 1e9
"""A cost that nothing is worth; at such costs of more rows all ticks rest."""


class RowChoice(NamedTuple):
    """The costs of ticks, and how many of the expected tokens were accepted lately.

    Attributes:
      costs: [C + 1] float32, of a tick of each row count and of drafting a level, relative to a tick of one row.
      expected, accepted: [B] float32, tokens that were expected from drafts and seeds, and tokens that they gave.
      called: [B] float32, summed probabilities of the rows below which the drafter was called, less those of the
        text's own tokens there.
      used: [B] float32, summed probabilities of the rows that only the drafter gave and that were run.
      length: [B] int32, tokens that had been emitted after the last tick.
      rung: [B] int32, the index of the row count that the next tick runs, C before tick 0.
      idle: [B] int32, number of the latest ticks in a row that drafted nothing worth running.
      ran: [B, C + 1] int32, how often each cost has been paid.
    """

    costs: jax.Array
    expected: jax.Array
    accepted: jax.Array
    called: jax.Array
    used: jax.Array
    length: jax.Array
    rung: jax.Array
    idle: jax.Array
    ran: jax.Array

    @property
    def acceptance(self) -> jax.Array:
        """The number of tokens accepted lately for each token expected: [B] float32; roots do not count."""
        return (jnp.maximum(self.accepted, 0) + PRIOR) / (jnp.maximum(self.expected, 0) + PRIOR)

    @property
    def usefulness(self) -> jax.Array:
        """The share of what the drafter was called for that was worth running: [B] float32."""
        return (self.used + PRIOR * PRIOR_USEFULNESS) / (self.called + PRIOR)


def usual_costs(counts: tuple[int, ...]) -> list[float]:
    """Return the costs before any is known: about those on two processor cores.

    Examples:
      >>> usual_costs((1, 4, 16))
      [1.0, 1.5, 3.5, 0.1]
    """
    return [*(1 + (count - 1) / 6 for count in counts), 0.1]


def new_choice(batch: int, counts: tuple[int, ...]) -> RowChoice:
    """Return the state before tick 0, with the row counts `counts` to choose from."""
    nothing, one = jnp.zeros(batch, jnp.float32), jnp.ones(batch, jnp.int32)
    ran = jnp.zeros((batch, len(counts) + 1), jnp.int32)
    costs = jnp.asarray(usual_costs(counts), jnp.float32)
    return RowChoice(costs, nothing, nothing, nothing, nothing, one, len(counts) * one, 0 * one, ran)


def carried(choice: RowChoice) -> dict[str, float]:
    """Return the sums that the next text begins with: those of a text [B] on average, of CARRIED tokens at most."""
    sums = {name: float(np.mean(getattr(choice, name))) for name in ("expected", "accepted", "called", "used")}
    share = min(1.0, CARRIED / max(sums["expected"], sums["called"], 1.0))
    return {name: share * value for name, value in sums.items()}


def rests(choice: RowChoice, going: jax.Array) -> jax.Array:
    """Return whether no sequence that is `going` [B] looks for drafts in this tick: bool scalar."""
    resting = (choice.idle >= PATIENCE) & (choice.idle % REST != 0)
    return jnp.all(resting | ~going) | (choice.costs[min(1, choice.costs.shape[0] - 2)] >= NEVER)


def is_worth_a_level(choice: RowChoice, going: jax.Array, probability: jax.Array) -> jax.Array:
    """Return whether to draft a level below rows that bring `probability` [B] tokens beyond the text's: bool scalar.

    It is worth it if the level should give more tokens than AR does in the time that drafting it takes, plus the extra
    time of a tick of the second smallest row count.
    """
    price = choice.costs[-1] + choice.costs[min(1, choice.costs.shape[0] - 2)] - choice.costs[0]
    tokens = choice.acceptance * choice.usefulness * probability
    return jnp.sum(jnp.where(going, tokens - price, 0)) > 0


def choose_rung(
    choice: RowChoice,
    counts: tuple[int, ...],
    going: jax.Array,
    probability: jax.Array,
    roots: jax.Array,
    levels: jax.Array,
    stages: int,
) -> jax.Array:
    """Return the index of the row count that should bring the most tokens for what it costs: int32 scalar.

    Args:
      choice: the costs, and how many of the expected tokens were accepted.
      counts: C row counts, ascending.
      going: [B] bool, the sequences that are not done.
      probability: [B, N] float32, the probability that each row of a sorted cohort is emitted.
      roots: [B] float32, 1 where the first row is a root, which is emitted already, 0 elsewhere.
      levels: int32, how many levels were drafted.
      stages: K; each of the K cohorts that run in a tick adds only its share to its cost.
    """
    tokens = jnp.cumsum(probability, axis=1)[:, np.array(counts) - 1]
    tokens = roots[:, None] + choice.acceptance[:, None] * (tokens - roots[:, None])
    costs = 1 + (choice.costs[:-1] - 1) / stages + levels * choice.costs[-1]
    return jnp.argmax(jnp.sum(jnp.where(going[:, None], tokens, 0), axis=0) / costs).astype(jnp.int32)


def updated(
    choice: RowChoice,
    length: jax.Array,
    roots: jax.Array,
    rung: jax.Array,
    expected: jax.Array,
    levels: jax.Array,
    called: jax.Array,
    used: jax.Array,
) -> RowChoice:
    """Return the state after a tick.

    Args:
      choice: before it.
      length: [B] int32, tokens that have been emitted so far.
      roots: [B] float32, as in `choose_rung`.
      rung: int32, the index of the row count that was chosen for the next tick.
      expected: [B] float32, tokens expected from the next tick's rows, a root among them.
      levels: int32, the number of levels that were drafted for the next tick.
      called, used: [B] float32, as in RowChoice, for the next tick alone.
    """
    count = choice.ran.shape[1] - 1
    paid = (jnp.arange(count + 1)[None] == choice.rung[:, None]).astype(jnp.int32).at[:, count].set(levels)
    # The newest expectations are met in later ticks, if at all; roots come one by one, and never count.
    added = (expected - roots, length - choice.length - roots, called, used)
    before = (choice.expected, choice.accepted, choice.called, choice.used)
    expected, accepted, called, used = ((1 - FADING) * a + b for a, b in zip(before, added, strict=True))
    rungs = jnp.broadcast_to(rung, choice.rung.shape)
    idle = jnp.where((rung == 0) & (levels == 0), choice.idle + 1, 0)
    return RowChoice(choice.costs, expected, accepted, called, used, length, rungs, idle, choice.ran + paid)
