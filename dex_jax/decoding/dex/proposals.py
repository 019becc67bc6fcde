"""Asking the exits: which nodes, in which order, and what they propose.

Letters: B sequences, W rows a stage, K stages, D' exit features, N gathered nodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.interface import Exits, StageView
from dex_jax.decoding.ladder import climb, rungs
from dex_jax.decoding.noise import Noise
from dex_jax.lattice import Proposals
from dex_jax.sampling import DROPPED, Sampling, choose, log_total

HEAD_BLOCK = 8
"""How many nodes of a sequence the heads are asked at a time."""

ROW_BLOCK = 64
"""How many nodes of all sequences `propose_rows` asks at a time."""

ROW_RUNGS = (1, 8)
"""Smaller numbers of rows that it is compiled for: on a CPU what lies between costs as much as the next one."""


class Proposers(NamedTuple):
    """The nodes that have just finished stages 1..K-1."""

    live: jax.Array  # [K - 1, B, W] bool, which rows propose
    score: jax.Array  # [K - 1, B, W] float32, path scores
    token: jax.Array  # [B, K W] int32, of all live nodes by slot
    parent: jax.Array  # [B, K W] int32, of all live nodes by slot; NO_NODE for all others


class Asked(NamedTuple):
    """N nodes gathered for the heads."""

    features: jax.Array  # [N, D']
    held: jax.Array  # [N, K W] int32, tokens that each node's children hold, NO_TOKEN elsewhere
    position: jax.Array  # [N] int32, absolute position of the proposed token
    sequence: jax.Array  # [N] int32, index into the batch


def propose(
    exits: Exits,
    memory: Any,
    hidden: jax.Array,
    view: StageView,
    nodes: Proposers,
    sampling: Sampling | None,
    noise: Noise | None,
    *,
    decs: bool,
) -> Proposals:
    """Asks the exits for children, best-scoring nodes first, until no other could win a row: fields [K - 1, B, W].

    A child never scores above its node, so once W proposals score above every node not yet asked, the rest of the heads
    need not run. What is spawned is the same as if all had. `memory` is the network's after this tick's commit, hidden
    [K, B, W, D] are the states at x_1 .. x_K. With `decs` what the children hold is masked; otherwise a repeated token
    is no proposal.
    """
    stages, batch, rows = nodes.live.shape
    count = stages * rows
    block = min(rows, HEAD_BLOCK)

    def by_sequence(field: jax.Array) -> jax.Array:
        return jnp.swapaxes(field, 0, 1).reshape(batch, count, *field.shape[3:])

    features = by_sequence(exits.features(memory, hidden, view))
    position = by_sequence(view.position[:-1]) + 1
    slot = jnp.broadcast_to((view.ring[:-1, None] * rows + jnp.arange(rows)[None]).reshape(-1), (batch, count))
    score = jnp.where(by_sequence(nodes.live), by_sequence(nodes.score), -jnp.inf)
    order = jnp.argsort(-score, axis=1, stable=True)
    blocks = -(-count // block)
    order = jnp.pad(order, [(0, 0), (0, blocks * block - count)], constant_values=count)

    def asked_next(i: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        node = jax.lax.dynamic_slice_in_dim(order, i * block, block, axis=1)
        least = jax.lax.top_k(total, rows)[0][:, -1:]
        own = jnp.take_along_axis(score, jnp.minimum(node, count - 1), axis=1)
        return node, (node < count) & (own > -jnp.inf) & (own >= least)

    def ask(carry: tuple[jax.Array, Proposals, jax.Array]) -> tuple[jax.Array, Proposals, jax.Array]:
        i, proposals, total = carry
        node, worth = asked_next(i, total)
        flat = (jnp.arange(batch)[:, None] * count + node).reshape(-1)
        chosen = jnp.nonzero(worth.reshape(-1), size=batch * block, fill_value=batch * block)[0]

        def heads(size: int) -> tuple[jax.Array, Proposals]:
            index = jnp.where(chosen[:size] < batch * block, flat[jnp.minimum(chosen[:size], batch * block - 1)], -1)
            row = jnp.maximum(index, 0)
            sequence, node = row // count, row % count
            held = held_below(nodes.token[sequence], nodes.parent[sequence], slot[sequence, node])
            asked = Asked(features[sequence, node], held, position[sequence, node], sequence)
            found = ask_rows(exits, asked, sampling, noise, decs=decs)
            padding = (0, batch * block - size)
            return jnp.pad(index, padding, constant_values=-1), jax.tree.map(lambda x: jnp.pad(x, padding), found)

        index, found = climb(jnp.sum(worth), rungs(batch * block), heads)
        place = jnp.where(index < 0, batch * count, index)
        proposals = jax.tree.map(
            lambda whole, part: whole.reshape(-1).at[place].set(part, mode="drop").reshape(whole.shape),
            proposals,
            found,
        )
        total = jnp.where(proposals.valid, score + lat.quantized(proposals.log_probability), -jnp.inf)
        return i + 1, proposals, total

    def more(carry: tuple[jax.Array, Proposals, jax.Array]) -> jax.Array:
        return (carry[0] < blocks) & jnp.any(asked_next(carry[0], carry[2])[1])

    nothing = Proposals(
        jnp.full((batch, count), lat.NO_TOKEN, jnp.int32),
        jnp.zeros((batch, count), jnp.float32),
        jnp.zeros((batch, count), bool),
    )
    unasked = jnp.full((batch, count), -jnp.inf)
    _, proposals, _ = jax.lax.while_loop(more, ask, (jnp.int32(0), nothing, unasked))
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(batch, stages, rows), 0, 1), proposals)


def propose_rows(
    exits: Exits, asked: Asked, live: jax.Array, sampling: Sampling | None, noise: Noise | None, *, decs: bool
) -> Proposals:
    """Asks the exits for every live one of N rows, a block at a time: Proposals with fields [N].

    Rows that `propose` would not ask are asked too: what is spawned is the same. Rows that are not live, `live` [N]
    bool, propose nothing and, where there are only few live ones, cost nothing. `features` of the exits is not called.
    """
    count = live.shape[0]
    block = min(count, ROW_BLOCK)
    blocks = -(-count // block)
    counts = (0, *(rung for rung in ROW_RUNGS if rung < block), block)
    needed = jnp.sum(live)
    chosen = jnp.nonzero(live, size=blocks * block, fill_value=count)[0]

    def ask(carry: tuple[jax.Array, Proposals]) -> tuple[jax.Array, Proposals]:
        i, proposals = carry
        index = jax.lax.dynamic_slice_in_dim(chosen, i * block, block)

        def heads(size: int) -> Proposals:
            rows = jnp.minimum(index[:size], count - 1)
            found = ask_rows(exits, jax.tree.map(lambda x: x[rows], asked), sampling, noise, decs=decs)
            return jax.tree.map(lambda x: jnp.pad(x, (0, block - size)), found)

        found = climb(needed - i * block, counts, heads)
        return i + 1, jax.tree.map(lambda whole, part: whole.at[index].set(part, mode="drop"), proposals, found)

    nothing = Proposals(jnp.full(count, lat.NO_TOKEN, jnp.int32), jnp.zeros(count, jnp.float32), jnp.zeros(count, bool))
    start = (jnp.int32(0), nothing)
    if blocks == 1:
        # Of a loop of one turn XLA takes out what no turn changes, and so the heads would run without any live row.
        return ask(start)[1]
    _, proposals = jax.lax.while_loop(lambda carry: carry[0] * block < needed, ask, start)
    return proposals


def ask_rows(exits: Exits, asked: Asked, sampling: Sampling | None, noise: Noise | None, *, decs: bool) -> Proposals:
    """The heads of N gathered rows: Proposals with fields [N]; `decs` as of `propose`.

    Log-probabilities are those of the tempered distribution, without noise.
    """
    logits = exits.logits(asked.features)
    row_noise, scaled = None, logits
    if sampling is not None:
        assert noise is not None
        row_noise = noise.ring[asked.sequence, asked.position % noise.ring.shape[1]]
        if exits.vocabulary is not None:
            row_noise = row_noise[:, exits.vocabulary]
        scaled = logits / sampling.temperature
    allowed = mask_columns(logits, asked.held, exits.columns) if decs else logits
    column, left = choose(allowed, sampling, row_noise)
    token = column if exits.vocabulary is None else exits.vocabulary[column]
    log_probability = jnp.take_along_axis(scaled, column[:, None], axis=-1)[:, 0]
    log_all = log_total(scaled, None if exits.rest is None else exits.rest(asked.features), sampling)
    log_probability = log_probability - log_all
    repeated = jnp.any(asked.held == token[:, None], axis=-1)
    return Proposals(token, log_probability, left & ~repeated)


def held_below(token: jax.Array, parent: jax.Array, slot: jax.Array) -> jax.Array:
    """Tokens of the nodes right below `slot` [N], NO_TOKEN for all others: of token and parent [N, K W] -> [N, K W]."""
    return jnp.where(parent == slot[:, None], token, lat.NO_TOKEN)


def mask_columns(logits: jax.Array, tokens: jax.Array, columns: jax.Array | None) -> jax.Array:
    """Drops each row's `tokens` ([N, C] full ids, NO_TOKEN for none) from logits [N, V']."""
    width = logits.shape[-1]
    column = tokens if columns is None else columns[jnp.maximum(tokens, 0)]
    column = jnp.where(tokens == lat.NO_TOKEN, width, column)
    return logits.at[jnp.arange(logits.shape[0])[:, None], column].set(DROPPED, mode="drop")
