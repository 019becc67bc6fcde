"""The lattice of one sequence: a ring of cohorts in fixed-shape arrays, and the pure functions that move it.

Terms as in the paper (Yang, Sun and Xia, "Depth Exploration Decoding", arXiv 2606.29223) and the README: a node is a
candidate token; the nodes spawned in one tick are a cohort and advance together; the root is the last committed token
on its way up. The cohort spawned in tick t lives in ring row t mod K, and in tick t stage k runs the cohort of tick
t - k. So a node's slot (ring row * W + row) never changes while it lives, and its progress is its age.

Everything here is written for one sequence and is meant to be vmapped over a batch. Letters: K stages, W rows a
cohort; stages and exits are numbered 1..K in fields that users see, and 0..K-1 along array axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_NODE = -1
"""A slot that is no node: the parent of a root, the child that nobody proposed."""

NO_TOKEN = -1
"""A token that is none: an unused row, an exit that has proposed nothing."""

SCORE_STEP = 2.0**-10
"""Log-probabilities are rounded to multiples of this, so that sums along a path are exact in float32 and which nodes
a cap keeps does not depend on the order of a reduction."""

MIN_LOG_PROBABILITY = -64.0


class Lattice(NamedTuple):
    """The root and its descendants.

    Attributes:
      token: [K, W] int32.
      position: [K, W] int32, absolute position of the token in the sequence.
      parent: [K, W] int32 slot of the parent, NO_NODE for a root.
      born_at: [K, W] int32, the exit 1..K-1 that proposed the node, K for a fresh root.
      score: [K, W] float32, sum of log-probabilities along the path from the root, a multiple of SCORE_STEP.
      live: [K, W] bool.
      ancestors: [K, W, K W] bool, the slots that a node attends to: itself and its ancestors not yet committed.
      offered: [K, W, K - 1] int32, the token of the child that each exit spawned under a node, or NO_TOKEN.
      root: int32 slot, NO_NODE when the sequence has ended.
    """

    token: jax.Array
    position: jax.Array
    parent: jax.Array
    born_at: jax.Array
    score: jax.Array
    live: jax.Array
    ancestors: jax.Array
    offered: jax.Array
    root: jax.Array

    @property
    def rows(self) -> int:
        """W."""
        return self.token.shape[-1]


class Proposals(NamedTuple):
    """What the exits 1..K-1 propose in one tick, one candidate child for each node of each cohort.

    Attributes:
      token: [K - 1, W] int32.
      log_probability: [K - 1, W] float32, natural logarithm.
      valid: [K - 1, W] bool, whether there is a proposal at all.
    """

    token: jax.Array
    log_probability: jax.Array
    valid: jax.Array


class Collapse(NamedTuple):
    """The outcome of a commit.

    Attributes:
      lattice: what survives; no live node at all when a fresh root is needed.
      born_at: int32, the exit that first gave the committed token, K if none did.
      matched: bool, whether a child of the root held it.
    """

    lattice: Lattice
    born_at: jax.Array
    matched: jax.Array


def default_rows(stages: int) -> int:
    """Rows a stage when the user does not say: what never prunes, at most 32.

    With 32, K = 10 takes 1.6% more ticks than rows that never prune; with 16, 3.6% (results/rows.md).

    Examples:
      >>> [default_rows(stages) for stages in (4, 5, 6, 30)]
      [4, 8, 16, 32]
    """
    return min(full_rows(stages), 32)


def full_rows(stages: int) -> int:
    """The number of rows that never prunes: one cohort never exceeds max(1, 2^(K-2)).

    Examples:
      >>> [full_rows(stages) for stages in range(1, 7)]
      [1, 1, 2, 4, 8, 16]
    """
    return max(1, 2 ** (stages - 2)) if stages > 1 else 1


def empty(stages: int, rows: int) -> Lattice:
    """A lattice without any node, for K stages and W rows a stage."""
    grid = (stages, rows)
    return Lattice(
        token=jnp.full(grid, NO_TOKEN, jnp.int32),
        position=jnp.zeros(grid, jnp.int32),
        parent=jnp.full(grid, NO_NODE, jnp.int32),
        born_at=jnp.zeros(grid, jnp.int32),
        score=jnp.zeros(grid, jnp.float32),
        live=jnp.zeros(grid, bool),
        ancestors=jnp.zeros((*grid, stages * rows), bool),
        offered=jnp.full((*grid, max(stages - 1, 0)), NO_TOKEN, jnp.int32),
        root=jnp.int32(NO_NODE),
    )


def stage_rows(tick: jax.Array, stages: int) -> jax.Array:
    """The ring row that each stage runs in `tick`: [K] int32, stage 1 first."""
    return (tick - 1 - jnp.arange(stages, dtype=jnp.int32)) % stages


def plant(lattice: Lattice, tick: jax.Array, token: jax.Array, position: jax.Array, where: jax.Array) -> Lattice:
    """Starts a fresh root in the cohort of `tick`, where `where`; otherwise the lattice is returned unchanged."""
    stages, rows = lattice.token.shape
    ring = tick % stages
    slot = (ring * rows).astype(jnp.int32)
    fresh = Lattice(
        token=lattice.token.at[ring, 0].set(token),
        position=lattice.position.at[ring, 0].set(position),
        parent=lattice.parent.at[ring, 0].set(NO_NODE),
        born_at=lattice.born_at.at[ring, 0].set(stages),
        score=lattice.score.at[ring, 0].set(0.0),
        live=lattice.live.at[ring, 0].set(True),
        ancestors=lattice.ancestors.at[ring, 0].set(jnp.arange(stages * rows) == slot),
        offered=lattice.offered.at[ring, 0].set(NO_TOKEN),
        root=slot,
    )
    return _where(where, fresh, lattice)


def root_finished(lattice: Lattice, tick: jax.Array) -> jax.Array:
    """Whether the root has run its last stage in `tick`: bool."""
    stages, rows = lattice.token.shape
    return (lattice.root != NO_NODE) & (lattice.root // rows == tick % stages)


def collapse(lattice: Lattice, token: jax.Array) -> Collapse:
    """Keeps the subtree under the root's child that holds the committed `token`.

    The old root's bit leaves every ancestor set, as its position joins the prefix.
    """
    stages, rows = lattice.token.shape
    root = lattice.root
    held = (lattice.live & (lattice.parent == root) & (lattice.token == token)).reshape(-1)
    matched = jnp.any(held) & (root != NO_NODE)
    child = jnp.argmax(held).astype(jnp.int32)
    survives = lattice.live & lattice.ancestors[:, :, child] & matched
    slots = jnp.arange(stages * rows)
    born_at = jnp.where(matched, lattice.born_at.reshape(-1)[child], stages)
    kept = lattice._replace(
        live=survives,
        ancestors=lattice.ancestors & (slots != root)[None, None],
        parent=jnp.where(slots.reshape(stages, rows) == child, NO_NODE, lattice.parent),
        score=lattice.score - lattice.score.reshape(-1)[child],
        root=jnp.where(matched, child, NO_NODE),
    )
    return Collapse(kept, born_at, matched)


def proposers(lattice: Lattice, tick: jax.Array) -> jax.Array:
    """Which nodes have just finished a stage k < K and may propose: [K - 1, W] bool, exit 1 first."""
    stages, _ = lattice.token.shape
    return lattice.live[stage_rows(tick, stages)[:-1]]


def spawn(lattice: Lattice, tick: jax.Array, proposals: Proposals) -> Lattice:
    """Spawns the best-scoring proposals as the cohort of `tick`; with more than W, the others are pruned.

    Equal scores go to the earlier exit, then to the earlier row. Must come after the collapse of the same tick, which
    has emptied that ring row.
    """
    stages, rows = lattice.token.shape
    if stages == 1:
        return lattice
    from_rows = stage_rows(tick, stages)[:-1]
    step = quantized(proposals.log_probability)
    total = jnp.where(proposals.valid, lattice.score[from_rows] + step, -jnp.inf).reshape(-1)
    best, pick = jax.lax.top_k(total, rows)
    spawned = best > -jnp.inf
    exit_index, row = pick // rows, pick % rows
    parent = from_rows[exit_index] * rows + row
    ring = tick % stages
    own = ring * rows + jnp.arange(rows)
    token = proposals.token.reshape(-1)[pick]

    def fill(field: jax.Array, values: jax.Array, nothing) -> jax.Array:
        keep = spawned.reshape(spawned.shape + (1,) * (values.ndim - 1))
        return field.at[ring].set(jnp.where(keep, values, nothing).astype(field.dtype))

    family = lattice.ancestors.reshape(stages * rows, -1)[parent]
    family = family | (jnp.arange(stages * rows)[None, :] == own[:, None])
    offered = lattice.offered.at[ring].set(NO_TOKEN).reshape(stages * rows, stages - 1)
    offered = offered.at[jnp.where(spawned, parent, stages * rows), exit_index].set(token, mode="drop")
    child = Lattice(
        token=fill(lattice.token, token, NO_TOKEN),
        position=fill(lattice.position, lattice.position.reshape(-1)[parent] + 1, 0),
        parent=fill(lattice.parent, parent, NO_NODE),
        born_at=fill(lattice.born_at, exit_index + 1, 0),
        score=fill(lattice.score, best, 0.0),
        live=fill(lattice.live, spawned, False),
        ancestors=fill(lattice.ancestors, family, False),
        offered=offered.reshape(lattice.offered.shape),
        root=lattice.root,
    )
    # The root of a sequence that starts afresh in this very tick stands in the same ring row; it has no proposals.
    fresh_root = (lattice.root != NO_NODE) & (lattice.root // rows == ring)
    return _where(fresh_root, lattice, child)


def quantized(log_probability: jax.Array) -> jax.Array:
    """Log-probabilities clipped to [MIN_LOG_PROBABILITY, 0] and rounded to multiples of SCORE_STEP."""
    clipped = jnp.clip(log_probability, MIN_LOG_PROBABILITY, 0.0)
    return jnp.round(clipped / SCORE_STEP) * SCORE_STEP


def _where(condition: jax.Array, yes: Lattice, no: Lattice) -> Lattice:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
