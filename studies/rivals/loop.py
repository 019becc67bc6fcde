"""The loop of self-speculation that the rivals of DEX share: exits draft a chain of rows, the final layer confirms it.

The newest row climbs stage by stage. At an exit it may draft: the exit's token becomes a new row at depth 0, and the
old one waits there. Rows that wait run along with the newest when it passes their depth, so no layer is ever run twice
for a row, and row i never stands above row i - 1. When the newest row reaches depth L, so have all others, and the last
layer's tokens decide which of them stay. A policy decides at which exits to draft; it never changes a token.

Letters: B sequences, R rows of a chain, K stages, D model width, T capacity for new tokens. Stages and exits are
counted from 0 in code, as array indices, and from 1 in what is reported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.decoding.dex.interface import Chunk
from dex_jax.decoding.ladder import fill, run_rung
from dex_jax.decoding.noise import Noise, make_noise, noise_at
from dex_jax.decoding.record import Limits, Record, emit_path, new_record
from dex_jax.sampling import Sampling, best_column, choose, log_total, perturbed_logits
from studies.rivals.interface import ChainExits, ChainNetwork, ChainRows, Policy, Verified


class ChainState(NamedTuple):
    """The state that is carried from step to step."""

    tick: jax.Array  # int32, steps since the start, one for all sequences: each runs a stage of the newest row
    stage: jax.Array  # [B] int32, the stage that the newest row runs next
    newest: jax.Array  # [B] int32, the newest row, and the number of tokens that the round has drafted
    token: jax.Array  # [B, R] int32
    drafted_at: jax.Array  # [B, R] int32, the exit 1..K-1 that gave each row but the root
    progress: jax.Array  # [B, R] int32
    states: jax.Array  # [K, B, R, D]
    prefix: jax.Array  # [B] int32, position of the root, and the number of committed positions
    spent: jax.Array  # [B, 2] int32, layers run one after the other and tokens drafted so far
    known: Any  # the policy's own
    memory: Any  # the network's own
    noise: Noise | None  # None when greedy
    record: Record  # its `ticks` are rounds, its `counts` [B, T, 2] what was `spent` when a token was emitted

    @property
    def rows(self) -> ChainRows:
        """The rows of the round as the exits see them."""
        position = self.prefix[:, None] + jnp.arange(self.token.shape[1])[None]
        return ChainRows(self.token, position, self.progress, self.states)


def init(
    network: ChainNetwork,
    memory: Any,
    first_token: jax.Array,
    position: jax.Array,
    *,
    policy: Policy,
    capacity: int,
    limits: Limits,
    sampling: Sampling | None = None,
) -> ChainState:
    """Return the state before the first step.

    Token 0, first_token [B] int32, stands at `position` [B] int32 (the prompt's length); `memory` is what its prefill
    left, with room for 2 R positions past the last token; `capacity` is T.
    """
    batch, rows = first_token.shape[0], policy.rows
    hidden = jax.eval_shape(network.embed, first_token, position)
    blank = jnp.zeros((batch, rows), jnp.int32)
    noise = None
    if sampling is not None:
        noise = Noise(jnp.zeros((batch, rows, network.vocab_size), jnp.float32), position)
    record = new_record(first_token, capacity, limits)
    return ChainState(
        tick=jnp.int32(0),
        stage=jnp.zeros(batch, jnp.int32),
        newest=jnp.zeros(batch, jnp.int32),
        token=blank.at[:, 0].set(first_token),
        drafted_at=blank,
        progress=blank,
        states=jnp.zeros((len(network.depths), batch, rows, hidden.shape[-1]), hidden.dtype),
        prefix=position,
        spent=jnp.zeros((batch, 2), jnp.int32),
        known=policy.initial(batch),
        memory=memory,
        noise=noise,
        record=record._replace(counts=jnp.zeros((*record.tokens.shape, 2), jnp.int32)),
    )


def step(
    network: ChainNetwork, state: ChainState, limits: Limits, sampling: Sampling | None = None, *, policy: Policy
) -> ChainState:
    """Run one stage of the newest row of every sequence that is not done, which then drafts, climbs or is verified."""
    last = len(network.depths) - 1
    active, stage = ~state.record.done, state.stage
    noise = make_noise(state.noise, sampling, state.prefix + state.newest + 1)
    state = state._replace(tick=state.tick + 1, noise=noise)
    for k in range(last + 1):
        state = _run_stage(network, state, k, active & (stage == k))
    fixed = _Fixed(network, limits, sampling, policy)
    drafting, token = _draft(fixed, state, active & (stage < last))
    verifying = active & (stage == last)
    batch = jnp.arange(stage.shape[0])
    child = jnp.where(drafting, state.newest + 1, state.token.shape[1])
    state = state._replace(
        stage=jnp.where(drafting, 0, jnp.where(active & ~verifying, stage + 1, stage)),
        newest=state.newest + drafting,
        token=state.token.at[batch, child].set(token, mode="drop"),
        drafted_at=state.drafted_at.at[batch, child].set(stage + 1, mode="drop"),
        spent=state.spent.at[:, 1].add(drafting),
    )
    return _verify(fixed, state, verifying)


def _run_stage(network: ChainNetwork, state: ChainState, stage: int, where: jax.Array) -> ChainState:
    """Run one stage of the newest row of the sequences in `where`, and of the rows that wait at its depth."""
    batch, rows = state.token.shape
    first = jnp.sum(state.progress > stage, axis=1, dtype=jnp.int32)
    count = jnp.where(where, state.newest + 1 - first, 0)
    chosen = jnp.minimum(first[:, None] + jnp.arange(rows)[None], rows - 1)
    start = state.prefix + first

    def entering(width: int) -> jax.Array:
        if stage > 0:
            return jnp.take_along_axis(state.states[stage - 1], chosen[:, :width, None], axis=1)
        token = jnp.take_along_axis(state.token, state.newest[:, None], axis=1)[:, 0]
        return network.embed(token, state.prefix + state.newest)[:, None].astype(state.states.dtype)

    def run_rows(width: int) -> Any:
        if width == 0:
            whole = jax.ShapeDtypeStruct((batch, rows, state.states.shape[-1]), state.states.dtype)
            shapes = jax.eval_shape(lambda x: network.run(state.memory, stage, x, start), whole)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.tree.map(lambda leaf: fill(leaf, -2, rows), network.run(state.memory, stage, entering(width), start))

    # The first stage runs the newest row alone; on a CPU what lies between one and eight rows costs the same.
    counts = sorted({0, 1} if stage == 0 else {0, 1, rows})
    hidden, fresh = run_rung(jnp.max(count), counts, run_rows)
    memory = network.write(state.memory, stage, fresh, start, where)
    ran = jnp.arange(rows)[None] < count[:, None]
    place = jnp.where(ran, first[:, None] + jnp.arange(rows)[None], rows)
    sequence = jnp.arange(batch)[:, None]
    taken = state.states[stage].at[sequence, place].set(hidden, mode="drop")
    depth = network.depths[stage] - (network.depths[stage - 1] if stage else 0)
    return state._replace(
        memory=memory,
        states=state.states.at[stage].set(taken),
        progress=state.progress.at[sequence, place].set(stage + 1, mode="drop"),
        spent=state.spent.at[:, 0].add(depth * where),
    )


class _Fixed(NamedTuple):
    """The arguments that do not change from step to step."""

    network: ChainNetwork
    limits: Limits
    sampling: Sampling | None
    policy: Policy


def _draft(fixed: _Fixed, state: ChainState, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (which sequences draft [B] bool, the tokens [B] int32)."""
    network, limits, sampling, policy = fixed
    exits, batch = network.exits, where.shape[0]
    if exits is None or policy.draft_length == 0:
        return jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32)
    newest, exit_index = state.newest, jnp.minimum(state.stage, len(network.depths) - 2)
    # A round emits one token more than it drafts.
    room = (newest < policy.draft_length) & (newest + 2 <= limits.max_new_tokens - state.record.lengths)
    asked = where & room & policy.asks(state.known, exit_index, newest)

    def ask() -> tuple[jax.Array, jax.Array]:
        features = exits.newest(state.memory, state.rows, newest, exit_index)
        noise = noise_at(state.noise, (state.prefix + newest + 1)[:, None], exits.vocabulary)
        return _proposed(exits, features, sampling, noise)

    nothing = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)
    token, confidence = jax.lax.cond(jnp.any(asked), ask, lambda: nothing)
    # The row of a token that ends the sequence would be wasted, as the final layer gives that token itself.
    ends = jnp.any(token[:, None] == limits.eos_ids[None], axis=1)
    return asked & ~ends & policy.drafts(state.known, exit_index, newest, confidence), token


def _proposed(
    exits: ChainExits, features: jax.Array, sampling: Sampling | None, noise: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Choose tokens for features [N, D'] under noise [N, V']: (tokens [N] int32, their confidence [N] float32)."""
    adjusted = perturbed_logits(exits.logits(features), sampling, noise)
    column = best_column(adjusted)
    log_all = log_total(adjusted, None if exits.rest is None else exits.rest(features), sampling)
    confidence = jnp.exp(jnp.take_along_axis(adjusted, column[:, None], axis=-1)[:, 0] - log_all)
    return column if exits.vocabulary is None else exits.vocabulary[column], confidence


def _verify(fixed: _Fixed, state: ChainState, where: jax.Array) -> ChainState:
    """Emit what the final layer confirms and one token more, and begin a new round of the sequences of `where`."""
    # Memory and states stay outside: a branch that returned them would copy them.
    nothing: Any = ()
    small = state._replace(memory=(), noise=None, states=nothing)
    settled, count = jax.lax.cond(
        jnp.any(where), lambda: _settle(fixed, state, small, where), lambda: (small, jnp.zeros_like(state.newest))
    )
    done = Chunk(state.token, state.states[-1], state.prefix, state.prefix + count)
    memory = fixed.network.commit(state.memory, done)
    return settled._replace(memory=memory, noise=state.noise, states=state.states)


def _settle(fixed: _Fixed, state: ChainState, small: ChainState, where: jax.Array) -> tuple[ChainState, jax.Array]:
    """Verify without memory, noise and states, and return how many rows [B] to commit."""
    network, limits, sampling, policy = fixed
    batch, rows = state.token.shape
    place = jnp.arange(rows)[None]

    def final_layer(width: int) -> jax.Array:
        hidden = state.states[-1][:, :width].reshape(batch * width, -1)
        noise = noise_at(state.noise, state.rows.position[:, :width] + 1)
        return fill(choose(network.final(hidden), sampling, noise)[0].reshape(batch, width), 1, rows)

    used = jnp.max(jnp.where(where, state.newest + 1, 1))
    final = run_rung(used, sorted({1, rows}), final_layer)
    right = (state.token[:, 1:] == final[:, :-1]) & (place[:, 1:] <= state.newest[:, None])
    accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1, dtype=jnp.int32)
    count = jnp.where(where, accepted + 1, 0)
    verified = Verified(where, count, final, *_shadows(fixed, state))

    stages = len(network.depths)
    drafted_at = jnp.concatenate([state.drafted_at[:, 1:], jnp.full((batch, 1), stages, jnp.int32)], axis=1)
    born_at = jnp.where(place < accepted[:, None], drafted_at, stages)

    record, at = emit_path(state.record, final, born_at, count, limits)
    counts = record.counts.at[jnp.arange(batch)[:, None], at].set(state.spent[:, None], mode="drop")
    record = record._replace(counts=counts, ticks=state.record.ticks + where)

    root = jnp.take_along_axis(final, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    small = small._replace(
        stage=jnp.where(where, 0, state.stage),
        newest=jnp.where(where, 0, state.newest),
        token=state.token.at[:, 0].set(jnp.where(where, root, state.token[:, 0])),
        progress=jnp.where(where[:, None], 0, state.progress),
        prefix=state.prefix + count,
        known=policy.learn(state.known, verified),
        record=record,
    )
    return small, count


def _shadows(fixed: _Fixed, state: ChainState) -> tuple[jax.Array, jax.Array]:
    """Return the tokens that every exit gives for every row, and their confidence, both [K - 1, B, R]."""
    network, _, sampling, policy = fixed
    exits, stages = network.exits, len(network.depths)
    batch, rows = state.token.shape
    shape = (stages - 1, batch, rows)
    if exits is None or not policy.shadows:
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    noise = noise_at(state.noise, state.rows.position + 1, exits.vocabulary)
    # One exit at a time: the logits of all would be by far the largest array here.
    found = jax.lax.map(
        lambda features: _proposed(exits, features, sampling, noise), exits.shadows(state.memory, state.rows)
    )
    return found[0].reshape(shape), found[1].reshape(shape)
