"""How a cohort comes about: a fresh root or seeds wait, and enter the lattice with what exit 0 drafts below them.

Letters: B sequences, W rows a cohort, N rows of one while it grows, K stages, E numbers that a drafter reads of the
position before.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.drafts import HEADS, Below, draft, position_before, price_of
from dex_jax.decoding.dex.interface import Drafter
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.dex.state import DexState, Seeds, Waiting
from dex_jax.decoding.noise import make_noise
from dex_jax.lattice import NO_NODE, Cohort, Path, Proposals
from dex_jax.sampling import Sampling


def cohort_size(stages: int, rows: int, drafts: TreeShape | None) -> int:
    """N: rows of a cohort while it grows, of which the best W are spawned."""
    below = 0 if drafts is None else sum(drafts.widths) + drafts.tail
    return max(rows, (1 if stages == 1 else rows) + below)


def roots_of(token: jax.Array, position: jax.Array, where: jax.Array, stages: int, size: int) -> Cohort:
    """Cohorts of a fresh root for the sequences of `where`, and without any node for the others."""
    cohort = jax.vmap(lat.fresh_root, (0, 0, None, None))(token, position, stages, size)
    return cohort._replace(score=jnp.where(where[:, None], cohort.score, -jnp.inf))


def wait(
    drafter: Drafter | None,
    state: DexState,
    path: Path,
    proposals: Proposals | None,
    reached: jax.Array | None,
    drafts: TreeShape | None,
) -> DexState:
    """The state with the cohort of this tick waiting: a fresh root or seeds.

    The state is that after the collapse and the commit of `path`; `proposals` are of the exits 1..K-1, fields [K - 1,
    B, W], and `reached` [K, B, W, E] what the drafter reads of the nodes that may have children, both None where K = 1.
    """
    fresh = (path.length > 0) & (path.heir == NO_NODE) & ~state.record.done
    last = jnp.take_along_axis(path.token, jnp.maximum(path.length - 1, 0)[:, None], axis=1)[:, 0]
    return state._replace(waiting=waiting(drafter, state, fresh, last, proposals, reached, drafts))


def waiting(
    drafter: Drafter | None,
    state: DexState,
    fresh: jax.Array,
    token: jax.Array,
    proposals: Proposals | None,
    reached: jax.Array | None,
    drafts: TreeShape | None,
) -> Waiting:
    """What waits: `token` [B] int32 as a fresh root where `fresh` [B] says so, else seeds; the others as of `wait`."""
    if state.stages == 1:
        return Waiting(fresh, token)
    size = cohort_size(state.stages, state.rows, drafts)
    cohort = roots_of(token, state.prefix, fresh, state.stages, size)
    if proposals is not None:
        seeds = jax.vmap(lat.seeds, (0, None, 1, None))(state.lattice, state.tick, proposals, size)
        cohort = jax.vmap(lambda new, *both: jax.tree.map(lambda a, b: jnp.where(new, a, b), *both))(
            fresh, cohort, seeds
        )
    before = _before(drafter, state, cohort.parent, reached, drafts)
    heads = Seeds(cohort.token, cohort.position, cohort.parent, cohort.born_at, cohort.score)
    return Waiting(fresh, seeds=heads, before=before)


def enter(drafter: Drafter | None, state: DexState, sampling: Sampling | None, drafts: TreeShape | None) -> DexState:
    """The state with the cohort that waited in the lattice, and with what exit 0 drafts below its heads."""
    assert state.waiting is not None
    noise, drafting = state.noise, state.drafting
    fresh, root, seeds, before = state.waiting
    if root is not None:
        cohort = roots_of(root, state.prefix, fresh, 1, cohort_size(1, state.rows, drafts))
        before = _before(drafter, state, cohort.parent, None, drafts)
    else:
        assert seeds is not None
        token, position, parent, born_at, score = seeds
        batch, size = score.shape
        above = jnp.full((batch, size), NO_NODE, jnp.int32)
        within = jnp.broadcast_to(jnp.eye(size, dtype=bool)[None], (batch, size, size))
        cohort = Cohort(token, position, parent, above, born_at, score, within)
    if drafts is not None and drafting is not None:
        furthest = jnp.max(jnp.where(cohort.score > -jnp.inf, cohort.position, -1), axis=1)
        if noise is not None:
            noise = make_noise(noise, sampling, furthest + len(drafts.widths), noise.ring.shape[-1])
        below = Below(state.memory, before, state.prefix, ~state.record.done, price_of(drafting, state.record))
        ring, heads = lat.ring_row(state.tick, state.stages), _heads(state)
        cohort, drafting = draft(drafter, drafting, state.lattice, cohort, below, sampling, noise, drafts, ring, heads)
    lattice = jax.vmap(lat.spawn, (0, None, 0, 0))(state.lattice, state.tick, cohort, fresh)
    return state._replace(lattice=lattice, noise=noise, drafting=drafting, waiting=None)


def _before(
    drafter: Drafter | None, state: DexState, parent: jax.Array, reached: jax.Array | None, drafts: TreeShape | None
) -> jax.Array | None:
    """What the drafter reads of the position before each head, [B, H, E]; None without one."""
    if drafter is None or drafts is None:
        return None
    ring = lat.stage_rows(state.tick, state.stages)
    heads = parent[:, : min(_heads(state), HEADS)]
    return position_before(drafter.committed(state.memory), reached, ring, heads)


def _heads(state: DexState) -> int:
    """How many of a cohort's first rows may be heads."""
    return 1 if state.stages == 1 else state.rows
