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
from dex_jax.decoding.dex.state import DexState, Waiting
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
    size = cohort_size(state.stages, state.rows, drafts)
    fresh = (path.length > 0) & (path.heir == NO_NODE) & ~state.record.done
    last = jnp.take_along_axis(path.token, jnp.maximum(path.length - 1, 0)[:, None], axis=1)[:, 0]
    cohort = roots_of(last, state.prefix, fresh, state.stages, size)
    if proposals is not None:
        seeds = jax.vmap(lat.seeds, (0, None, 1, None))(state.lattice, state.tick, proposals, size)
        cohort = jax.vmap(lambda new, *both: jax.tree.map(lambda a, b: jnp.where(new, a, b), *both))(
            fresh, cohort, seeds
        )
    return state._replace(waiting=as_waiting(drafter, state, cohort, fresh, reached, drafts))


def as_waiting(
    drafter: Drafter | None,
    state: DexState,
    cohort: Cohort,
    fresh: jax.Array,
    reached: jax.Array | None,
    drafts: TreeShape | None,
) -> Waiting:
    """A cohort of heads as it waits, in the state of `wait` or before the first tick, where `reached` is None too."""
    before = None
    if drafter is not None and drafts is not None:
        parents = cohort.parent[:, : min(_heads(state), HEADS)]
        ring = lat.stage_rows(state.tick, state.stages)
        before = position_before(drafter.committed(state.memory), reached, ring, parents)
    return Waiting(cohort, fresh, before)


def enter(drafter: Drafter | None, state: DexState, sampling: Sampling | None, drafts: TreeShape | None) -> DexState:
    """The state with the cohort that waited in the lattice, and with what exit 0 drafts below its heads."""
    assert state.waiting is not None
    cohort, fresh, before = state.waiting
    noise, drafting = state.noise, state.drafting
    if drafts is not None and drafting is not None:
        furthest = jnp.max(jnp.where(cohort.score > -jnp.inf, cohort.position, -1), axis=1)
        if noise is not None:
            noise = make_noise(noise, sampling, furthest + len(drafts.widths), noise.ring.shape[-1])
        below = Below(state.memory, before, state.prefix, ~state.record.done, price_of(drafting, state.record))
        ring, heads = lat.ring_row(state.tick, state.stages), _heads(state)
        cohort, drafting = draft(drafter, drafting, state.lattice, cohort, below, sampling, noise, drafts, ring, heads)
    lattice = jax.vmap(lat.spawn, (0, None, 0, 0))(state.lattice, state.tick, cohort, fresh)
    return state._replace(lattice=lattice, noise=noise, drafting=drafting, waiting=None)


def _heads(state: DexState) -> int:
    """How many of a cohort's first rows may be heads."""
    return 1 if state.stages == 1 else state.rows
