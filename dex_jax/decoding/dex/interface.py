"""What the decode loop asks of a network: a handful of callables over arrays, as in mctx.

The loop never sees a model. Whoever has one (this package's transformer, or any other) hands over these functions,
usually closures over weights that are arguments of the caller's own jit.

Letters: B sequences, W rows a stage, K stages, P levels of a cohort, D model width, V vocabulary, N
gathered rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class StageView(NamedTuple):
    """The lattice as the stages see it in one tick; index k - 1 along K is stage k.

    Attributes:
      ring: [K] int32, the ring row whose cohort each stage runs. Row w of stage k stands in slot ring[k - 1] * W + w.
      token: [K, B, W] int32.
      position: [K, B, W] int32, absolute positions.
      live: [K, B, W] bool; what is computed for other rows is never read.
      ancestors: [K, B, W, K W] bool, the slots each row attends to, itself included.
      parent: [K, B, W] int32, slot of each row's parent, NO_NODE for the root.
      prefix: [B] int32, how many committed positions every row of a sequence attends to.
      slots: [B, K W] int32, the position of what stands in each slot.
    """

    ring: jax.Array
    token: jax.Array
    position: jax.Array
    live: jax.Array
    ancestors: jax.Array
    parent: jax.Array
    prefix: jax.Array
    slots: jax.Array


class Committed(NamedTuple):
    """The path that one tick commits, the root first; a tick in which no root has finished commits nothing.

    Attributes:
      slot: [B, P] int32 lattice slots; from `length` on anything.
      token: [B, P] int32, what stands in them.
      hidden: [B, P, D], at depth L.
      position: [B] int32, of the root: the first position that is not committed yet.
      length: [B] int32, how many nodes; 0 for sequences that commit nothing.
    """

    slot: jax.Array
    token: jax.Array
    hidden: jax.Array
    position: jax.Array
    length: jax.Array


class Exits(NamedTuple):
    """The heads of exits 1..K-1.

    Attributes:
      features: (memory, hidden [K, B, W, D], StageView) -> [K - 1, B, W, D'], what differs from exit to exit. Memory
        holds this tick's commit; a root that has just finished still stands in stage K, as the parent of its children.
      logits: [N, D'] -> [N, V'] float32, what all exits share; the loop calls it for the rows that propose only.
      vocabulary: [V'] int32, the full token id of each column, or None when V' = V.
      columns: [V] int32, the column of each full token id and V' for those without one; None when V' = V.
      rest: [N, D'] -> [N] float32, the logit of all tokens that have no column together, which counts in probabilities;
        None when V' = V or exits do not say.
    """

    features: Callable[[Any, jax.Array, StageView], jax.Array]
    logits: Callable[[jax.Array], jax.Array]
    vocabulary: jax.Array | None = None
    columns: jax.Array | None = None
    rest: Callable[[jax.Array], jax.Array] | None = None


class Drafter(NamedTuple):
    """Exit 0: what proposes tokens before any layer has run.

    What it reads of a position before is E numbers: the true ones at the last committed position, estimates above.

    Attributes:
      committed: memory -> [B, E], at the last committed position.
      reached: (memory, hidden [K, B, W, D], StageView) -> [K, B, W, E], of the nodes of every stage, as deep as they
        have got; None where K = 1.
      features: (before [B, n, E], token [B, n], position [B, n]) -> (features [B, n, D'], [B, n, E] for what is drafted
        below).
      logits, vocabulary, rest: as of Exits.
    """

    committed: Callable[[Any], jax.Array]
    reached: Callable[[Any, jax.Array, StageView], jax.Array] | None
    features: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    logits: Callable[[jax.Array], jax.Array]
    vocabulary: jax.Array | None = None
    rest: Callable[[jax.Array], jax.Array] | None = None


class Network(NamedTuple):
    """A decoder cut into K stages.

    Attributes:
      vocab_size: V.
      embed: (tokens [B, W], positions [B, W]) -> hidden [B, W, D] at depth 0.
      advance: (memory, hidden [K, B, W, D], StageView) -> (hidden, memory): every stage runs its cohort once; stage k
        reads index k - 1. Committed positions in memory must not change.
      commit: (memory, Committed) -> memory: copies lattice slots to consecutive positions of the committed prefix.
      final: hidden [N, D] at depth L -> logits [N, V] float32.
      exits: heads of exits 1..K-1, None for K = 1.
      drafter: exit 0, None for none.
    """

    vocab_size: int
    embed: Callable[[jax.Array, jax.Array], jax.Array]
    advance: Callable[[Any, jax.Array, StageView], tuple[jax.Array, Any]]
    commit: Callable[[Any, Committed], Any]
    final: Callable[[jax.Array], jax.Array]
    exits: Exits | None = None
    drafter: Drafter | None = None
