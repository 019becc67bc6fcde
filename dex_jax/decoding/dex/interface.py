"""The few callables over arrays that the decode loop needs of a network, as in mctx, and the state that it carries.

The loop never sees a model. Whoever has one (this package's transformer, or any other) hands over these functions,
usually closures over weights that are arguments of the caller's own jit.

Letters: B sequences, W rows a stage, K stages, X exits, P levels of a cohort, D model width, V vocabulary, V' draft
vocabulary, N gathered rows or those of a cohort, n rows of one of its levels, D' width of features, E width of what a
drafter knows of a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dex_jax.decoding.dex.row_choice import RowChoice
from dex_jax.decoding.noise import Noise
from dex_jax.decoding.record import Record
from dex_jax.lattice import NO_NODE, Cohort, Lattice


class StageView(NamedTuple):
    """The lattice as the stages see it in one tick; stage k has index k - 1 along K.

    Attributes:
      ring: [K] int32, the ring row of each stage's cohort. Row w of stage k stands in slot ring[k - 1] * W + w.
      token: [K, B, W] int32.
      position: [K, B, W] int32, absolute positions.
      live: [K, B, W] bool; what is computed for other rows is never read.
      ancestors: [K, B, W, K W] bool, the slots each row attends to, itself included.
      parent: [K, B, W] int32, slot of each row's parent, NO_NODE for the root.
      prefix: [B] int32, number of committed positions, which every row of a sequence attends to.
      slots: [B, K W] int32, the position of the node in each slot.
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
      slot: [B, P] int32 lattice slots; those from `length` on mean nothing.
      token: [B, P] int32, the tokens in these slots.
      hidden: [B, P, D], at depth L; with what ExitZero `reads` behind as in Chunk.
      position: [B] int32, of the root: the first position that is not committed yet.
      length: [B] int32, the number of nodes; 0 for sequences that commit nothing.
    """

    slot: jax.Array
    token: jax.Array
    hidden: jax.Array
    position: jax.Array
    length: jax.Array

    @property
    def chunk(self) -> Chunk:
        """The path as a Chunk."""
        return Chunk(self.token, self.hidden, self.position, self.position + self.length)


class Exits(NamedTuple):
    """The callables of exits 1..K-1.

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


class DraftRows(NamedTuple):
    """The rows of one level of a cohort that exit 0 drafts below, n of the N rows of each sequence.

    Attributes:
      token, position: [B, n] int32; the token is NO_TOKEN in unused rows; their results are not read.
      parent: [B, n] int32, the row of the cohort that each hangs below, NO_NODE for an anchor.
      before: [B, n, E], what is known of the position before an anchor; anything in other rows.
    """

    token: jax.Array
    position: jax.Array
    parent: jax.Array
    before: jax.Array


class Drafter(NamedTuple):
    """Exit 0: what proposes tokens before any layer has run.

    It keeps a state of each row that it has drafted below, which it reads to draft below the children of that row.

    Attributes:
      committed: memory -> [B, E], what it reads of the last committed position.
      node_features: (memory, hidden [K, B, W, D], StageView) -> [K, B, W, E], estimates of that at the
        nodes of every stage, as deep as they have got; None where K = 1.
      blank: (B, N) -> states of the N rows of a cohort before any is known: arrays [B, N, ...].
      features: (memory, states, DraftRows) -> (features [B, n, D'], the rows' own states [B, n, ...]).
      logits, vocabulary, rest: as in Exits.
    """

    committed: Callable[[Any], jax.Array]
    node_features: Callable[[Any, jax.Array, StageView], jax.Array] | None
    blank: Callable[[int, int], Any]
    features: Callable[[Any, Any, DraftRows], tuple[jax.Array, Any]]
    logits: Callable[[jax.Array], jax.Array]
    vocabulary: jax.Array | None = None
    rest: Callable[[jax.Array], jax.Array] | None = None


def before_rows(states: jax.Array, below: DraftRows) -> jax.Array:
    """Return what is known of the position before rows, [B, n, E]: `before` for anchors, else the parent's state."""
    of_parent = jnp.take_along_axis(states, jnp.maximum(below.parent, 0)[:, :, None], axis=1)
    return jnp.where((below.parent == NO_NODE)[..., None], below.before.astype(states.dtype), of_parent)


def before_nodes(by_node: jax.Array, committed: jax.Array, parent: jax.Array, ring: jax.Array) -> jax.Array:
    """Return what is known of the position before nodes of X stages: [X, B, n, E].

    That is the entry of their parents, in slots `parent` [X, B, n], in `by_node` [K, B, W, E], which has the nodes of
    every stage, or, for a root, `committed` [B, E], of the last committed position; ring [K] int32 is as in StageView.
    """
    rows, place = by_node.shape[2], jnp.maximum(parent, 0)
    sequence = jnp.arange(parent.shape[1])[None, :, None]
    of_parent = by_node[jnp.argsort(ring)[place // rows], sequence, place % rows]
    return jnp.where((parent == NO_NODE)[..., None], committed[None, :, None], of_parent)


class Chunk(NamedTuple):
    """Consecutive tokens of each sequence, after they have run: a chunk of the prompts, or a committed path."""

    tokens: jax.Array  # [B, R] int32, padded on the right
    hidden: jax.Array  # [B, R, (1 + reads) D], at depth L, and behind it at the depths that ExitZero `reads`
    start: jax.Array  # int32 scalar or [B], the position of the first
    lengths: jax.Array  # [B] int32, where each sequence ends


class ExitZero(Protocol):
    """A drafter for a transformer, a static argument of compiled programs, which take its arrays beside it."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Depths 0..L at which it reads the states of committed positions, beside those at L."""

    @property
    def reads_tokens_only(self) -> bool:
        """True if the drafter reads no hidden states: every device of a mesh then updates its memory by itself."""

    def empty(self, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """Return its memory (Memory.exits) before any position is committed, for at most `length` positions."""

    def extend(self, model: Any, arrays: Any, memory: Any, chunk: Chunk) -> Any:
        """Return its memory after a chunk, given that of the positions before."""

    def drafter(self, model: Any, arrays: Any) -> Drafter:
        """Return the loop's callables, without `node_features`."""


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


class DexState(NamedTuple):
    """The state that a decoding carries from tick to tick.

    Attributes:
      tick: int32, the last one, the same for all sequences: -1 before tick 0, which runs nothing.
      lattice: every field with a leading axis B.
      hidden: [K, B, W, D], states of the cohorts by the stage they have just run.
      prefix: [B] int32, committed positions.
      memory: the network's own.
      noise: None when greedy.
      record: what has been emitted.
      text: [B, S] int32, all tokens at their positions; None without drafts.
      row_choice: what rows cost and bring; None where every tick runs all of them.
      spawning: on several devices the youngest cohort, which its first device drafted; None elsewhere.
    """

    tick: jax.Array
    lattice: Lattice
    hidden: jax.Array
    prefix: jax.Array
    memory: Any
    noise: Noise | None
    record: Record
    text: jax.Array | None = None
    row_choice: RowChoice | None = None
    spawning: Cohort | None = None

    @property
    def stages(self) -> int:
        """Number of stages K."""
        return self.lattice.token.shape[1]

    @property
    def rows(self) -> int:
        """Number of rows W of a stage."""
        return self.lattice.token.shape[2]
