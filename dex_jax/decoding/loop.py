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
from dex_jax.decoding.interface import Exits, Network, StageView
from dex_jax.decoding.ladder import climb, rungs
from dex_jax.decoding.record import Limits, Record, begin, emit
from dex_jax.lattice import Lattice, Proposals
from dex_jax.sampling import DROPPED, Sampling, choose, position_noise


class Noise(NamedTuple):
    """Sampling noise, made once a position and kept while any node may need it.

    Attributes:
      ring: [B, K, V] float32; position n stands at n mod K.
      made: [B] int32, the last position whose noise has been made.
    """

    ring: jax.Array
    made: jax.Array


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
    """
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
    network: Network, state: DexState, limits: Limits, sampling: Sampling | None = None, *, decs: bool = True
) -> DexState:
    """One tick: advance, commit, collapse, propose. Sequences that are done are left as they are.

    Args:
      network: the callables of one model.
      state: before the tick.
      limits: when a sequence ends.
      sampling: as given to `init`.
      decs: whether an exit may not repeat a token that its node's children hold (depth-coupled sampling).
    """
    stages, rows = state.stages, state.rows
    tick = state.tick + 1
    ring = lat.stage_rows(tick, stages)
    view = _stage_view(state.lattice, ring, state.prefix)

    entering = network.embed(view.token[0], view.position[0]).astype(state.hidden.dtype)
    hidden = jnp.concatenate([entering[None], state.hidden[:-1]])
    hidden, memory = network.advance(state.memory, hidden, view)

    finished = jax.vmap(lat.root_finished, (0, None))(state.lattice, tick)
    noise = _make_noise(state.noise, sampling, state.prefix + 1, network.vocab_size)
    memory = network.commit(memory, jnp.maximum(state.lattice.root, 0), state.prefix, finished)
    root_row = jnp.maximum(state.lattice.root, 0) % rows
    root_hidden = jnp.take_along_axis(hidden[-1], root_row[:, None, None], axis=1)[:, 0]
    token = _final_token(network, root_hidden, finished, sampling, noise, state.prefix + 1)
    outcome = jax.vmap(lat.collapse)(state.lattice, token)
    record = emit(state.record, token, outcome.born_at, finished, limits)
    prefix = state.prefix + finished

    lattice = _select(finished, outcome.lattice, state.lattice)
    lattice = jax.vmap(_bury)(lattice, record.done)
    fresh = finished & ~outcome.matched & ~record.done
    lattice = jax.vmap(lat.plant, (0, None, 0, 0, 0))(lattice, tick, token, prefix, fresh)
    if stages > 1:
        assert network.exits is not None
        live = jnp.swapaxes(jax.vmap(lat.proposers, (0, None))(lattice, tick), 0, 1)
        frontier = jnp.max(jnp.where(live, view.position[:-1], -1), axis=(0, 2)) + 1
        noise = _make_noise(noise, sampling, frontier, network.vocab_size)
        offered = jnp.swapaxes(lattice.offered[:, ring[:-1]], 0, 1)
        proposals = propose(network.exits, hidden[:-1], view, live, offered, sampling, noise, decs=decs)
        lattice = jax.vmap(lat.spawn, (0, None, 1))(lattice, tick, proposals)
    return DexState(tick, lattice, hidden, prefix, memory, noise, record)


def run(
    network: Network,
    state: DexState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    decs: bool = True,
    until_tick: jax.Array | None = None,
) -> DexState:
    """Ticks under one lax.while_loop until every sequence is done, or until `until_tick` (int32 scalar)."""

    def going(state: DexState) -> jax.Array:
        more = jnp.any(~state.record.done)
        return more if until_tick is None else more & (state.tick < until_tick)

    return jax.lax.while_loop(going, lambda s: step(network, s, limits, sampling, decs=decs), state)


def propose(
    exits: Exits,
    hidden: jax.Array,
    view: StageView,
    live: jax.Array,
    offered: jax.Array,
    sampling: Sampling | None,
    noise: Noise | None,
    *,
    decs: bool,
) -> Proposals:
    """Asks the exits for children of the live rows; heads run over the live rows only.

    Args:
      exits: heads of exits 1..K-1.
      hidden: [K - 1, B, W, D], states at x_1 .. x_{K-1}.
      view: all K stages.
      live: [K - 1, B, W] bool, which rows propose.
      offered: [K - 1, B, W, K - 1] int32, tokens that each row's children hold, NO_TOKEN elsewhere.
      sampling, noise: None when greedy.
      decs: mask what the children hold; otherwise a repeated token is no proposal.

    Returns:
      Proposals with fields [K - 1, B, W].
    """
    shape = live.shape
    total = live.size
    features = exits.features(hidden, view)
    features = features.reshape(total, features.shape[-1])
    taken = offered.reshape(total, -1)
    target = (view.position[:-1] + 1).reshape(-1)
    sequence = jnp.broadcast_to(jnp.arange(shape[1])[None, :, None], shape).reshape(-1)
    order = jnp.nonzero(live.reshape(-1), size=total, fill_value=total)[0]

    def heads(count: int) -> Proposals:
        index = order[:count]
        row = jnp.minimum(index, total - 1)
        logits = exits.logits(features[row])
        if sampling is not None:
            assert noise is not None
            row_noise = noise.ring[sequence[row], target[row] % noise.ring.shape[1]]
            if exits.vocabulary is not None:
                row_noise = row_noise[:, exits.vocabulary]
            scaled = logits / sampling.temperature
        else:
            row_noise, scaled = None, logits
        allowed = _mask_columns(logits, taken[row], exits.columns) if decs else logits
        column, left = choose(allowed, sampling, row_noise)
        token = column if exits.vocabulary is None else exits.vocabulary[column]
        log_probability = jnp.take_along_axis(scaled, column[:, None], axis=-1)[:, 0]
        log_probability = log_probability - jax.nn.logsumexp(scaled, axis=-1)
        valid = left & ~jnp.any(taken[row] == token[:, None], axis=-1)
        return Proposals(
            token=jnp.full(total, lat.NO_TOKEN, jnp.int32).at[index].set(token, mode="drop"),
            log_probability=jnp.zeros(total, jnp.float32).at[index].set(log_probability, mode="drop"),
            valid=jnp.zeros(total, bool).at[index].set(valid, mode="drop"),
        )

    proposals = climb(jnp.sum(live), (0, *rungs(total)), lambda n: heads(n) if n else _no_proposals(total))
    return jax.tree.map(lambda x: x.reshape(shape), proposals)


def _no_proposals(total: int) -> Proposals:
    return Proposals(jnp.full(total, lat.NO_TOKEN, jnp.int32), jnp.zeros(total, jnp.float32), jnp.zeros(total, bool))


def _mask_columns(logits: jax.Array, tokens: jax.Array, columns: jax.Array | None) -> jax.Array:
    """Drops each row's `tokens` ([N, C] full ids, NO_TOKEN for none) from logits [N, V']."""
    width = logits.shape[-1]
    column = tokens if columns is None else columns[jnp.maximum(tokens, 0)]
    column = jnp.where(tokens == lat.NO_TOKEN, width, column)
    return logits.at[jnp.arange(logits.shape[0])[:, None], column].set(DROPPED, mode="drop")


def _final_token(
    network: Network,
    hidden: jax.Array,
    finished: jax.Array,
    sampling: Sampling | None,
    noise: Noise | None,
    position: jax.Array,
) -> jax.Array:
    """The next token of every sequence whose root has finished: hidden [B, D] -> [B] int32."""

    def choose_all() -> jax.Array:
        row_noise = None
        if noise is not None:
            at = (position % noise.ring.shape[1])[:, None, None]
            row_noise = jnp.take_along_axis(noise.ring, at, axis=1)[:, 0]
        return choose(network.final(hidden), sampling, row_noise)[0]

    # Between commits the unembedding is a good part of a tick, for nothing.
    return jax.lax.cond(jnp.any(finished), choose_all, lambda: jnp.zeros(hidden.shape[0], jnp.int32))


def _make_noise(noise: Noise | None, sampling: Sampling | None, frontier: jax.Array, vocab_size: int) -> Noise | None:
    """Makes the noise of the next position where `frontier` [B] has passed what is made; by one at most a call."""
    if noise is None:
        return None
    assert sampling is not None
    wanted = frontier > noise.made
    position = noise.made + 1

    def make() -> jax.Array:
        return jax.vmap(position_noise, (0, 0, None))(sampling.keys, position, vocab_size)

    at = position % noise.ring.shape[1]
    old = jnp.take_along_axis(noise.ring, at[:, None, None], axis=1)[:, 0]
    new = jnp.where(wanted[:, None], jax.lax.cond(jnp.any(wanted), make, lambda: old), old)
    ring = noise.ring.at[jnp.arange(at.shape[0]), at].set(new)
    return Noise(ring, noise.made + wanted)


def _stage_view(lattice: Lattice, ring: jax.Array, prefix: jax.Array) -> StageView:
    def by_stage(field: jax.Array) -> jax.Array:
        return jnp.swapaxes(field[:, ring], 0, 1)

    return StageView(
        ring=ring,
        token=by_stage(lattice.token),
        position=by_stage(lattice.position),
        live=by_stage(lattice.live),
        ancestors=by_stage(lattice.ancestors),
        prefix=prefix,
    )


def _bury(lattice: Lattice, done: jax.Array) -> Lattice:
    return lattice._replace(live=lattice.live & ~done, root=jnp.where(done, lat.NO_NODE, lattice.root))


def _select(where: jax.Array, yes: Any, no: Any) -> Any:
    return jax.vmap(lambda w, y, n: jax.tree.map(lambda a, b: jnp.where(w, a, b), y, n))(where, yes, no)
