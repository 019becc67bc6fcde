"""Depth Exploration Decoding: the tick, and the loop over ticks.

One tick advances every cohort by a stage, commits the root's token if it has reached the last one, collapses the
lattice onto the child that held it, and lets the surviving nodes propose children (arXiv 2606.29223). `init` and
`step` are pure and compose with a caller's own jit; `run` is one lax.while_loop over `step`.

Letters: B sequences, W rows a stage, K stages, D model width, V vocabulary, T capacity for new tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.heads import Proposers, propose
from dex_jax.decoding.interface import Committed, Network, StageView
from dex_jax.decoding.methods import whole_number
from dex_jax.decoding.noise import Noise, make_noise, noise_at
from dex_jax.decoding.record import Limits, Record, begin, check_limits, emit, until_done
from dex_jax.errors import DexError
from dex_jax.lattice import Lattice
from dex_jax.sampling import Sampling, choose


class DexState(NamedTuple):
    """All that one decoding carries from tick to tick.

    Attributes:
      tick: int32, ticks since the start, the same for all sequences.
      lattice: every field with a leading axis B.
      hidden: [K, B, W, D], states of the cohorts by the stage they have just run.
      prefix: [B] int32, committed positions.
      memory: the network's own.
      noise: None when greedy.
      record: what has been emitted.
    """

    tick: jax.Array
    lattice: Lattice
    hidden: jax.Array
    prefix: jax.Array
    memory: Any
    noise: Noise | None
    record: Record

    @property
    def stages(self) -> int:
        """K."""
        return self.hidden.shape[0]

    @property
    def rows(self) -> int:
        """W."""
        return self.hidden.shape[2]


def init(
    network: Network,
    memory: Any,
    first_token: jax.Array,
    position: jax.Array,
    *,
    stages: int,
    rows: int,
    capacity: int,
    limits: Limits,
    sampling: Sampling | None = None,
) -> DexState:
    """The state before the first tick.

    Args:
      network: the callables of one model.
      memory: what its prefill left: positions 0 .. position - 1 committed, room for K W lattice slots.
      first_token: [B] int32, token 0 as the prefill chose it.
      position: [B] int32, its absolute position (the prompt's length).
      stages: K.
      rows: W, at least 1.
      capacity: T, room for new tokens.
      limits: when a sequence ends.
      sampling: None for greedy.

    Raises:
      DexError: stages or rows that are no whole numbers of at least 1, more stages than one without exits, or limits of
        other shapes.
    """
    whole_number(stages=stages, rows=rows, capacity=capacity)
    if stages > 1 and network.exits is None:
        raise DexError(f"a network without exits has one stage, and not {stages}: give it exits, or stages=1")
    batch = first_token.shape[0]
    record = begin(first_token, capacity, limits)
    tick = jnp.int32(0)
    blank = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), lat.empty(stages, rows))
    rooted = jax.vmap(lat.plant, (0, None, 0, 0, 0))(blank, tick, first_token, position, ~record.done)
    width = jax.eval_shape(network.embed, first_token[:, None], position[:, None])
    noise = None
    if sampling is not None:
        noise = Noise(jnp.zeros((batch, stages, network.vocab_size), jnp.float32), position)
    return DexState(
        tick=tick,
        lattice=rooted,
        hidden=jnp.zeros((stages, batch, rows, width.shape[-1]), width.dtype),
        prefix=position,
        memory=memory,
        noise=noise,
        record=record,
    )


def step(
    network: Network,
    state: DexState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    decs: bool = True,
    proposing: tuple[int, ...] | None = None,
) -> DexState:
    """One tick: advance, commit, collapse, propose. Sequences that are done are left as they are.

    Args:
      network: the callables of one model.
      state: before the tick.
      limits: when a sequence ends.
      sampling: as given to `init`.
      decs: whether an exit may not repeat a token that its node's children hold (depth-coupled sampling).
      proposing: the exits 1..K-1 that propose; None for all.

    Raises:
      DexError: a network of other stages than the state has, or without exits, or limits of other shapes.
    """
    stages, rows = state.stages, state.rows
    check_limits(limits, state.prefix.shape[0])
    exits = network.exits
    if stages > 1 and exits is None:
        raise DexError(f"a network without exits has one stage, and the state has {stages}: give the network exits")
    tick = state.tick + 1
    ring = lat.stage_rows(tick, stages)
    view = stage_view(state.lattice, ring, state.prefix)

    entering = network.embed(view.token[0], view.position[0]).astype(state.hidden.dtype)
    hidden = jnp.concatenate([entering[None], state.hidden[:-1]])
    hidden, memory = _advance(network, state.memory, hidden, view)

    finished = jax.vmap(lat.root_finished, (0, None))(state.lattice, tick)
    noise = make_noise(state.noise, sampling, state.prefix + 1, network.vocab_size)
    root = jnp.maximum(state.lattice.root, 0)
    root_hidden = jnp.take_along_axis(hidden[-1], (root % rows)[:, None, None], axis=1)[:, 0]
    root_token = jnp.take_along_axis(view.token[-1], (root % rows)[:, None], axis=1)[:, 0]
    memory = network.commit(memory, Committed(root, root_token, state.prefix, root_hidden, finished))
    token = final_token(network, root_hidden, finished, sampling, noise, state.prefix + 1)
    lattice, prefix, record = settle(state, tick, token, finished, limits)
    if exits is not None and stages > 1:
        live = jnp.swapaxes(jax.vmap(lat.proposers, (0, None))(lattice, tick), 0, 1)
        if proposing is not None:
            live = live & jnp.asarray([k in proposing for k in range(1, stages)])[:, None, None]
        frontier = jnp.max(jnp.where(live, view.position[:-1], -1), axis=(0, 2)) + 1
        noise = make_noise(noise, sampling, frontier, network.vocab_size)
        nodes = Proposers(live, _by_stage(lattice.score, ring[:-1]), _by_stage(lattice.offered, ring[:-1]))
        proposals = propose(exits, memory, hidden, view, nodes, sampling, noise, decs=decs)
        lattice = jax.vmap(lat.spawn, (0, None, 1))(lattice, tick, proposals)
    return DexState(tick, lattice, hidden, prefix, memory, noise, record)


def run(
    network: Network,
    state: DexState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    decs: bool = True,
    proposing: tuple[int, ...] | None = None,
    until_tick: jax.Array | None = None,
) -> DexState:
    """Ticks under one lax.while_loop until every sequence is done, or until `until_tick`.

    Args:
      network, state, limits, sampling, decs, proposing: as of `step`.
      until_tick: int32 scalar, the tick after which to stop in any case; None for none.
    """

    def tick(state: DexState) -> DexState:
        return step(network, state, limits, sampling, decs=decs, proposing=proposing)

    return until_done(tick, state, until_tick)


def _advance(network: Network, memory: Any, hidden: jax.Array, view: StageView) -> tuple[jax.Array, Any]:
    stages = hidden.shape[0]
    says = f"the network does not run the {stages} stages of {hidden.shape[2]} rows that the state has: give both alike"
    try:
        advanced, memory = network.advance(memory, hidden, view)
    except (TypeError, ValueError, IndexError) as error:
        raise DexError(f"{says} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    if advanced.shape != hidden.shape:
        raise DexError(f"{says} (it returns hidden states {advanced.shape} for {hidden.shape})")
    return advanced, memory


def settle(
    state: DexState, tick: jax.Array, token: jax.Array, finished: jax.Array, limits: Limits
) -> tuple[Lattice, jax.Array, Record]:
    """Commit and collapse of one tick, all of it bookkeeping.

    Args:
      state: before the tick.
      tick: its number.
      token: [B] int32, the final layer's token where `finished`.
      finished: [B] bool, whether the root has reached depth L in this tick.
      limits: when a sequence ends.

    Returns:
      (lattice before proposals, committed positions [B], record).
    """
    outcome = jax.vmap(lat.collapse)(state.lattice, token)
    record = emit(state.record, token, outcome.born_at, finished, limits)
    prefix = state.prefix + finished
    lattice = _select(finished, outcome.lattice, state.lattice)
    lattice = jax.vmap(_bury)(lattice, record.done)
    fresh = finished & ~outcome.matched & ~record.done
    return jax.vmap(lat.plant, (0, None, 0, 0, 0))(lattice, tick, token, prefix, fresh), prefix, record


def final_token(
    network: Network,
    hidden: jax.Array,
    finished: jax.Array,
    sampling: Sampling | None,
    noise: Noise | None,
    position: jax.Array,
) -> jax.Array:
    """The next token of every sequence whose root has finished: hidden [B, D] at depth L -> [B] int32."""

    def choose_all() -> jax.Array:
        row_noise = None if noise is None else noise_at(noise, position[:, None])[:, 0]
        return choose(network.final(hidden), sampling, row_noise)[0]

    # Between commits the unembedding is a good part of a tick, for nothing.
    return jax.lax.cond(jnp.any(finished), choose_all, lambda: jnp.zeros(hidden.shape[0], jnp.int32))


def _by_stage(field: jax.Array, ring: jax.Array) -> jax.Array:
    """A lattice field [B, K, W, ...] in the order of the stages: [stages, B, W, ...]."""
    return jnp.swapaxes(field[:, ring], 0, 1)


def stage_view(lattice: Lattice, ring: jax.Array, prefix: jax.Array) -> StageView:
    """The lattice as the stages see it; ring from `lattice.stage_rows`."""
    return StageView(
        ring=ring,
        token=_by_stage(lattice.token, ring),
        position=_by_stage(lattice.position, ring),
        live=_by_stage(lattice.live, ring),
        ancestors=_by_stage(lattice.ancestors, ring),
        parent=_by_stage(lattice.parent, ring),
        prefix=prefix,
    )


def _bury(lattice: Lattice, done: jax.Array) -> Lattice:
    return lattice._replace(live=lattice.live & ~done, root=jnp.where(done, lat.NO_NODE, lattice.root))


def _select(where: jax.Array, yes: Any, no: Any) -> Any:
    return jax.vmap(lambda w, y, n: jax.tree.map(lambda a, b: jnp.where(w, a, b), y, n))(where, yes, no)
