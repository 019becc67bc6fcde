"""The lattice of one sequence: a ring of cohorts in fixed-shape arrays, and the pure functions that move it.

Terms as in the paper (Yang, Sun and Xia, "Depth Exploration for LLM Decoding", arXiv 2606.29223): a node is a candidate
token; the nodes spawned in one tick are a cohort and advance together; the root is the last emitted token on its way
up. A cohort's nodes are anchors (a fresh root, or seeds, which the exits 1..K-1 gave) and the drafts that exit 0 put
below them. The cohort spawned in tick t lives in ring row t mod K, and in tick t stage k runs the cohort of tick t - k.
So a node's slot (ring row * W + row) never changes while it lives, and its progress is its age.

Everything here is written for one sequence and is meant to be vmapped over a batch. Letters: K stages, W rows a cohort,
N rows of a cohort that is still growing, P levels of a cohort with its anchors, C candidates; stages and exits are
numbered 1..K in fields that users see, and 0..K-1 along array axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_NODE = -1
"""The slot of no node: the parent of a root, or the child that nobody proposed."""

NO_TOKEN = -1
"""The token of an unused row, or of an exit that has proposed nothing."""

DRAFTED = 0
"""The value of `born_at` for a draft: exit 0 stands at depth 0."""

SCORE_STEP = 2.0**-10
"""The step of log-probabilities: sums along a path are exact in float32, so no order of reduction changes a choice."""

MIN_LOG_PROBABILITY = -64.0


class Lattice(NamedTuple):
    """The root and its descendants.

    Attributes:
      token: [K, W] int32.
      position: [K, W] int32, absolute position of the token in the sequence.
      parent: [K, W] int32 slot of the parent, NO_NODE for a root.
      born_at: [K, W] int32, the exit that proposed the node: 0 for a draft, 1..K-1 for a seed, K for a fresh root.
      score: [K, W] float32, sum of log-probabilities along the path from the root, a multiple of SCORE_STEP.
      live: [K, W] bool.
      ancestors: [K, W, K W] bool, the slots that a node attends to: itself and its ancestors not yet committed.
      root: int32 slot, NO_NODE when the sequence has ended.
    """

    token: jax.Array
    position: jax.Array
    parent: jax.Array
    born_at: jax.Array
    score: jax.Array
    live: jax.Array
    ancestors: jax.Array
    root: jax.Array

    @property
    def rows(self) -> int:
        """Number of rows of a cohort, W."""
        return self.token.shape[-1]


class Proposals(NamedTuple):
    """The proposals of the exits 1..K-1 in one tick, one candidate child for each node of each cohort."""

    token: jax.Array  # [K - 1, W] int32
    log_probability: jax.Array  # [K - 1, W] float32, natural logarithm
    valid: jax.Array  # [K - 1, W] bool, whether there is a proposal at all


class Cohort(NamedTuple):
    """Nodes on their way into the lattice: anchors in the first rows, then the drafts below them."""

    token: jax.Array  # [N] int32, NO_TOKEN in rows that are not used
    position: jax.Array  # [N] int32
    parent: jax.Array  # [N] int32 slot of a seed's parent in the lattice, NO_NODE for all other rows
    above: jax.Array  # [N] int32 row of a draft's parent in the cohort, NO_NODE for all other rows
    born_at: jax.Array  # [N] int32
    score: jax.Array  # [N] float32 of the path from the root; -inf in rows that are not used
    within: jax.Array  # [N, N] bool, the rows that each row attends to: itself and its ancestors in the cohort


def first_rows(cohort: Cohort, rows: int) -> Cohort:
    """Return the first rows of cohorts with a leading axis: [B, N] -> [B, rows]."""
    cut = jax.tree.map(lambda field: field[:, :rows], cohort)
    return cut._replace(within=cut.within[:, :, :rows])


class Candidates(NamedTuple):
    """Proposed drafts below rows that a cohort has."""

    token: jax.Array  # [C] int32
    above: jax.Array  # [C] int32 row
    score: jax.Array  # [C] float32 of the path with it, -inf for none


class Path(NamedTuple):
    """The final layer's tokens after the root, and after the nodes of its cohort that the final layer confirms."""

    slot: jax.Array  # [P] int32, the root first; from `length` on anything
    token: jax.Array  # [P] int32, the final layer's token after each
    born_at: jax.Array  # [P] int32, the exit that first gave that token, K if none did
    length: jax.Array  # int32, how many; 0 while the root has not finished
    heir: jax.Array  # int32 slot of the node that holds the last of these tokens, NO_NODE if none does


def default_rows(stages: int) -> int:
    """Return the number of rows a stage when the user does not say: what never prunes, at most 32.

    With 32, K = 10 took 1.6% more ticks than rows that never prune; with 16, 3.6%.

    Examples:
      >>> [default_rows(stages) for stages in (4, 5, 6, 30)]
      [4, 8, 16, 32]
    """
    return min(full_rows(stages), 32)


def full_rows(stages: int) -> int:
    """Return the number of rows that never prunes: one cohort never exceeds max(1, 2^(K-2)).

    Examples:
      >>> [full_rows(stages) for stages in range(1, 7)]
      [1, 1, 2, 4, 8, 16]
    """
    return max(1, 2 ** (stages - 2)) if stages > 1 else 1


def empty(stages: int, rows: int) -> Lattice:
    """Return a lattice without any node, for K stages and W rows a stage."""
    grid = (stages, rows)
    return Lattice(
        token=jnp.full(grid, NO_TOKEN, jnp.int32),
        position=jnp.zeros(grid, jnp.int32),
        parent=jnp.full(grid, NO_NODE, jnp.int32),
        born_at=jnp.zeros(grid, jnp.int32),
        score=jnp.zeros(grid, jnp.float32),
        live=jnp.zeros(grid, bool),
        ancestors=jnp.zeros((*grid, stages * rows), bool),
        root=jnp.int32(NO_NODE),
    )


def stage_rows(tick: jax.Array, stages: int) -> jax.Array:
    """Return the ring row that each stage runs in `tick`: [K] int32, stage 1 first."""
    return (tick - 1 - jnp.arange(stages, dtype=jnp.int32)) % stages


def ring_row(tick: jax.Array, stages: int) -> jax.Array:
    """Return the ring row of the cohort that is spawned in `tick`, int32."""
    # jnp's own % takes ten operations, as it handles negative numbers.
    return jnp.zeros_like(tick) if stages == 1 else jax.lax.rem(tick, jnp.int32(stages))


def root_finished(lattice: Lattice, tick: jax.Array) -> jax.Array:
    """Return whether the root has run its last stage in `tick`: bool."""
    stages, rows = lattice.token.shape
    return (lattice.root != NO_NODE) & (lattice.root // rows == ring_row(tick, stages))


def follow(lattice: Lattice, final: jax.Array, tick: jax.Array, levels: int) -> Path:
    """Return the path of at most P = `levels` nodes that `tick` commits, once all nodes have run their stages.

    `final` [W] int32 is the final layer's token after each live row of the cohort that has run its last stage.
    """
    stages, rows = lattice.token.shape
    ring = ring_row(tick, stages)
    fields = (lattice.live, lattice.parent, lattice.token, lattice.born_at)
    live, parent, token, born_at = (field.reshape(-1) for field in fields)
    # All at once, and not level by level: on GPUs each turn of a loop would be several kernels. The finished cohort
    # holds the root and its drafts alone, and a node is on the path if the final layer gave all tokens down to it.
    above = parent[ring * rows + jnp.arange(rows)]
    right = (above == NO_NODE) | (lattice.token[ring] == final[above % rows])
    within = jax.lax.dynamic_slice_in_dim(lattice.ancestors[ring], ring * rows, rows, axis=1)
    on_path = lattice.live[ring] & jnp.all(right[None] | ~within, axis=1) & root_finished(lattice, tick)
    at = on_path[None] & (jnp.sum(within, axis=1)[None] == jnp.arange(1, levels + 1)[:, None])
    slot = ring * rows + jnp.argmax(at, axis=1).astype(jnp.int32)
    length = jnp.sum(jnp.any(at, axis=1), dtype=jnp.int32)
    said = final[slot % rows]
    last = jnp.maximum(length - 1, 0)
    held = live & (parent == slot[last]) & (token == said[last])
    heir = jnp.where(jnp.any(held) & (length > 0), jnp.argmax(held), NO_NODE).astype(jnp.int32)
    child = jnp.where(jnp.arange(levels) == last, heir, jnp.roll(slot, -1))
    return Path(slot, said, jnp.where(child == NO_NODE, stages, born_at[child]), length, heir)


def collapse(lattice: Lattice, path: Path) -> Lattice:
    """Keep the subtree under the heir of a committed path; keep nothing if there is no heir.

    The bits of the path's nodes leave every ancestor set, as their positions join the prefix. A path without any node
    leaves the lattice as it is.
    """
    stages, rows = lattice.token.shape
    slots = jnp.arange(stages * rows)
    heir = jnp.maximum(path.heir, 0)
    on_path = jnp.arange(path.slot.shape[0]) < path.length
    committed = jnp.any((slots[:, None] == path.slot[None]) & on_path[None], axis=1)
    kept = lattice._replace(
        live=lattice.live & lattice.ancestors[:, :, heir] & (path.heir != NO_NODE),
        ancestors=lattice.ancestors & ~committed[None, None],
        parent=jnp.where(slots.reshape(stages, rows) == heir, NO_NODE, lattice.parent),
        score=lattice.score - lattice.score.reshape(-1)[heir],
        root=path.heir,
    )
    moves = path.length > 0
    return jax.tree.map(lambda new, old: jnp.where(moves, new, old), kept, lattice)


def fresh_root(token: jax.Array, position: jax.Array, stages: int) -> Cohort:
    """Return a cohort of a root alone, `token` at `position` (int32 scalars)."""
    none = jnp.full(1, NO_NODE, jnp.int32)
    return Cohort(
        token=jnp.full(1, token, jnp.int32),
        position=jnp.full(1, position, jnp.int32),
        parent=none,
        above=none,
        born_at=jnp.full(1, stages, jnp.int32),
        score=jnp.zeros(1, jnp.float32),
        within=jnp.ones((1, 1), bool),
    )


def seeds(lattice: Lattice, tick: jax.Array, proposals: Proposals) -> Cohort:
    """Return a cohort of the W best-scoring proposals of `tick`; the others are pruned.

    Equal scores go to the earlier exit, then to the earlier row.
    """
    stages, rows = lattice.token.shape
    from_rows = stage_rows(tick, stages)[:-1]
    step = quantized(proposals.log_probability)
    total = jnp.where(proposals.valid, lattice.score[from_rows] + step, -jnp.inf).reshape(-1)
    best, pick = jax.lax.top_k(total, rows)
    spawned = best > -jnp.inf
    exit_index, row = pick // rows, pick % rows
    parent = (from_rows[exit_index] * rows + row).astype(jnp.int32)
    return Cohort(
        token=jnp.where(spawned, proposals.token.reshape(-1)[pick], NO_TOKEN),
        position=jnp.where(spawned, lattice.position.reshape(-1)[parent] + 1, 0),
        parent=jnp.where(spawned, parent, NO_NODE),
        above=jnp.full(rows, NO_NODE, jnp.int32),
        born_at=jnp.where(spawned, exit_index.astype(jnp.int32) + 1, 0),
        score=best,
        within=jnp.eye(rows, dtype=bool),
    )


def widen(cohort: Cohort, size: int) -> Cohort:
    """Return the same cohort with unused rows at its end, `size` in all."""
    more = size - cohort.score.shape[0]
    blanks = (NO_TOKEN, 0, NO_NODE, NO_NODE, 0, -jnp.inf, False)
    pairs = zip(cohort, blanks, strict=True)
    wide = Cohort(*(jnp.pad(field, [(0, more)] * field.ndim, constant_values=blank) for field, blank in pairs))
    return wide._replace(within=wide.within | jnp.eye(size, dtype=bool))


def grow(cohort: Cohort, candidates: Candidates, first: jax.Array, width: jax.Array, most: int) -> Cohort:
    """Put the best `width` candidates into the rows from `first` on, ties by the order in which they come.

    Candidates below one row with one token are one candidate, with the better of their scores. Rows up to
    first + `most`, which is at least `width`, must be there and not be used yet; their `born_at` is DRAFTED.
    """
    missing = max(0, most - candidates.token.shape[0])
    token, above, score = (
        jnp.pad(field, (0, missing), constant_values=blank)
        for field, blank in zip(candidates, (NO_TOKEN, NO_NODE, -jnp.inf), strict=True)
    )
    same = (token[:, None] == token[None, :]) & (above[:, None] == above[None, :])
    alike = same & (score > -jnp.inf)[None, :]
    best = jnp.max(jnp.where(alike, score[None, :], -jnp.inf), axis=1)
    earlier = jnp.tril(jnp.ones(same.shape, bool), k=-1)
    score = jnp.where(jnp.any(alike & earlier, axis=1) | (score == -jnp.inf), -jnp.inf, best)
    chosen = jnp.argsort(-score, stable=True)[:most]
    found = (score[chosen] > -jnp.inf) & (jnp.arange(most) < width)
    above = jnp.where(found, above[chosen], NO_NODE)
    itself = first + jnp.arange(most)[:, None] == jnp.arange(cohort.token.shape[0])[None]
    seen = cohort.within[jnp.maximum(above, 0)] & found[:, None]
    return cohort._replace(
        token=_put(cohort.token, jnp.where(found, token[chosen], NO_TOKEN), first),
        position=_put(cohort.position, jnp.where(found, cohort.position[jnp.maximum(above, 0)] + 1, 0), first),
        above=_put(cohort.above, above, first),
        score=_put(cohort.score, jnp.where(found, score[chosen], -jnp.inf), first),
        within=_put(cohort.within, seen | itself, first),
    )


def lengthen(cohort: Cohort, row: jax.Array, token: jax.Array, score: jax.Array, first: jax.Array) -> Cohort:
    """Put a chain of M drafts below `row` into the unused rows from `first` on; put nothing below NO_NODE.

    token [M] int32; score [M] float32 of the paths down to each, -inf where the row is NO_NODE.
    """
    own, used = jnp.arange(token.shape[0]), score > -jnp.inf
    column = jnp.arange(cohort.token.shape[0])[None]
    down = (column >= first) & (column <= first + own[:, None])
    position = cohort.position[jnp.maximum(row, 0)] + 1 + own
    above = jnp.where(own == 0, row, first + own - 1)
    return cohort._replace(
        token=_put(cohort.token, jnp.where(used, token, NO_TOKEN), first),
        position=_put(cohort.position, jnp.where(used, position, 0), first),
        above=_put(cohort.above, jnp.where(used, above, NO_NODE), first),
        score=_put(cohort.score, score, first),
        within=_put(cohort.within, cohort.within[jnp.maximum(row, 0)][None] | down, first),
    )


def _put(field: jax.Array, rows: jax.Array, first: jax.Array | int) -> jax.Array:
    """Return a cohort's field with `rows` from row `first` on."""
    return jax.lax.dynamic_update_slice_in_dim(field, rows.astype(field.dtype), first, axis=0)


def child_of(cohort: Cohort, row: jax.Array, token: jax.Array) -> jax.Array:
    """Return the row of the draft right below `row` that holds `token`, int32, NO_NODE when there is none."""
    here = (cohort.above == row) & (cohort.token == token) & (row != NO_NODE)
    return jnp.where(jnp.any(here), jnp.argmax(here), NO_NODE).astype(jnp.int32)


def sort_rows(cohort: Cohort) -> Cohort:
    """Return the same cohort, best-scoring rows first; no row is better than its parent, which so comes before it."""
    order = jnp.argsort(-cohort.score, stable=True)
    place = jnp.argsort(order, stable=True).astype(jnp.int32)
    moved = jax.tree.map(lambda field: field[order], cohort)
    return moved._replace(
        above=jnp.where(moved.above == NO_NODE, NO_NODE, place[jnp.maximum(moved.above, 0)]),
        within=moved.within[:, order],
    )


def spawn(lattice: Lattice, tick: jax.Array, cohort: Cohort) -> Lattice:
    """Put a cohort's first W rows into the ring row of `tick`, which the collapse of the same tick has emptied.

    The cohort has its best rows first, so that none comes before the one above it; an anchor without a parent is a
    fresh root, and stands in row 0.
    """
    stages, rows = lattice.token.shape
    ring = ring_row(tick, stages)
    used = cohort.score[:rows] > -jnp.inf
    within = cohort.within[:rows, :rows] & used[:, None]
    anchor = jnp.argmax(within & (cohort.above[:rows] == NO_NODE)[None], axis=1)
    parent = cohort.parent[:rows]
    fresh = used[0] & (parent[0] == NO_NODE) & (cohort.above[0] == NO_NODE)
    family = lattice.ancestors.reshape(stages * rows, -1)[jnp.maximum(parent[anchor], 0)]
    family = family & (used & (parent[anchor] != NO_NODE))[:, None]
    family = family.reshape(rows, stages, rows).at[:, ring].set(within).reshape(rows, -1)
    above = jnp.where(cohort.above[:rows] == NO_NODE, parent, ring * rows + cohort.above[:rows])
    return Lattice(
        token=lattice.token.at[ring].set(cohort.token[:rows]),
        position=lattice.position.at[ring].set(cohort.position[:rows]),
        parent=lattice.parent.at[ring].set(above),
        born_at=lattice.born_at.at[ring].set(cohort.born_at[:rows]),
        score=lattice.score.at[ring].set(jnp.where(used, cohort.score[:rows], 0.0)),
        live=lattice.live.at[ring].set(used),
        ancestors=lattice.ancestors.at[ring].set(family),
        root=jnp.where(fresh, ring * rows, lattice.root).astype(jnp.int32),
    )


def bury(lattice: Lattice, where: jax.Array) -> Lattice:
    """Return the lattice, without any node where `where` (bool scalar) is true."""
    return lattice._replace(live=lattice.live & ~where, root=jnp.where(where, NO_NODE, lattice.root))


def quantized(log_probability: jax.Array) -> jax.Array:
    """Clip log-probabilities to [MIN_LOG_PROBABILITY, 0] and round them to multiples of SCORE_STEP."""
    clipped = jnp.clip(log_probability, MIN_LOG_PROBABILITY, 0.0)
    return jnp.round(clipped / SCORE_STEP) * SCORE_STEP
