"""How a cohort comes about: a fresh root or seeds, and what exit 0 drafts below them.

Letters: B sequences, W rows a cohort, K stages, E numbers that a drafter reads of the position before.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.drafts import HEADS, draft
from dex_jax.decoding.dex.interface import Drafter, before_nodes
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.dex.state import DexState
from dex_jax.lattice import NO_NODE, Proposals
from dex_jax.sampling import Sampling


def spawn(
    drafter: Drafter | None,
    state: DexState,
    proposals: Proposals | None,
    reached: jax.Array | None,
    sampling: Sampling | None,
    drafts: TreeShape | None,
) -> DexState:
    """The state with this tick's cohort: seeds, or a fresh root where no node holds the last token, and their drafts.

    The state is that after the collapse; `proposals` are of the exits 1..K-1, fields [K - 1, B, W], and `reached`
    [K, B, W, E] what the drafter reads of the nodes that may have children, both None where no node has any.
    """
    fresh = (state.lattice.root == NO_NODE) & ~state.record.done
    last = jnp.take_along_axis(state.record.tokens, state.record.lengths[:, None] - 1, axis=1)[:, 0]
    roots = jax.vmap(lat.fresh_root, (0, 0, None))(last, state.prefix, state.stages)
    roots = roots._replace(score=jnp.where(fresh[:, None], roots.score, -jnp.inf))
    heads = jax.vmap(lat.widen, (0, None))(roots, state.heads)
    if proposals is not None:
        seeds = jax.vmap(lat.seeds, (0, None, 1))(state.lattice, state.tick, proposals)
        chosen = jax.vmap(lambda new, *both: jax.tree.map(lambda a, b: jnp.where(new, a, b), *both))
        heads = chosen(fresh, heads, seeds)
    if drafts is None:
        cohort = jax.vmap(lat.widen, (0, None))(heads, state.rows)
    else:
        before = None if drafter is None else _before(drafter, state, heads.parent[:, :HEADS], reached)
        cohort, state = draft(drafter, state, heads, before, sampling, drafts)
    lattice = jax.vmap(lat.spawn, (0, None, 0, 0))(state.lattice, state.tick, cohort, fresh)
    return state._replace(lattice=lattice)


def _before(drafter: Drafter, state: DexState, parent: jax.Array, reached: jax.Array | None) -> jax.Array:
    """What the drafter reads of the position before each of some heads, below parents [B, H]: [B, H, E]."""
    committed = drafter.committed(state.memory)
    if reached is None:
        return jnp.broadcast_to(committed[:, None], (*parent.shape, committed.shape[1]))
    return before_nodes(reached, committed, parent[None], lat.stage_rows(state.tick, state.stages))[0]
