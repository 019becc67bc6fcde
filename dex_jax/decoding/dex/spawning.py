"""How a cohort comes about: a fresh root or seeds wait, and enter the lattice with what exit 0 drafts below them.

Letters: B sequences, W rows a cohort, K stages, E numbers that a drafter reads of the position before.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.drafts import HEADS, draft
from dex_jax.decoding.dex.interface import Drafter, before_nodes
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.dex.state import DexState, Waiting
from dex_jax.lattice import NO_NODE, Path, Proposals
from dex_jax.sampling import Sampling


def wait(
    drafter: Drafter | None,
    state: DexState,
    path: Path,
    proposals: Proposals | None,
    reached: jax.Array | None,
    drafts: TreeShape | None,
) -> DexState:
    """The state with the heads of this tick's cohort waiting: a fresh root or seeds.

    The state is that after the collapse and the commit of `path`; `proposals` are of the exits 1..K-1, fields [K - 1,
    B, W], and `reached` [K, B, W, E] what the drafter reads of the nodes that may have children, both None where no
    node has any.
    """
    fresh = (path.length > 0) & (path.heir == NO_NODE) & ~state.record.done
    last = jnp.take_along_axis(path.token, jnp.maximum(path.length - 1, 0)[:, None], axis=1)[:, 0]
    roots = jax.vmap(lat.fresh_root, (0, 0, None))(last, state.prefix, state.stages)
    roots = roots._replace(score=jnp.where(fresh[:, None], roots.score, -jnp.inf))
    heads = jax.vmap(lat.widen, (0, None))(roots, state.heads)
    if proposals is not None:
        seeds = jax.vmap(lat.seeds, (0, None, 1))(state.lattice, state.tick, proposals)
        chosen = jax.vmap(lambda new, *both: jax.tree.map(lambda a, b: jnp.where(new, a, b), *both))
        heads = chosen(fresh, heads, seeds)
    before = None
    if drafter is not None and drafts is not None:
        committed, parent = drafter.committed(state.memory), heads.parent[:, :HEADS]
        if reached is None:
            before = jnp.broadcast_to(committed[:, None], (*parent.shape, committed.shape[1]))
        else:
            ring = lat.stage_rows(state.tick, state.stages)
            before = before_nodes(reached, committed, parent[None], ring)[0]
    return state._replace(waiting=Waiting(heads, fresh, before))


def enter(drafter: Drafter | None, state: DexState, sampling: Sampling | None, drafts: TreeShape | None) -> DexState:
    """The state with the heads that waited in the lattice, and with what exit 0 drafts below them."""
    assert state.waiting is not None
    heads, fresh, before = state.waiting
    if drafts is None or state.drafting is None:
        cohort = jax.vmap(lat.widen, (0, None))(heads, state.rows)
    else:
        cohort, state = draft(drafter, state, heads, before, sampling, drafts)
    lattice = jax.vmap(lat.spawn, (0, None, 0, 0))(state.lattice, state.tick, cohort, fresh)
    return state._replace(lattice=lattice, waiting=None)
