"""Asking the exits: which nodes, in which order, and what they propose.

Letters: B sequences, W rows a stage, K stages, D' exit features, N gathered nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.interface import Exits, StageView
from dex_jax.decoding.ladder import climb, fill, rungs
from dex_jax.decoding.noise import Noise, noise_at
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
        flat = jnp.append(jnp.arange(batch)[:, None] * count + node, batch * count)
        index = flat[jnp.nonzero(worth.reshape(-1), size=batch * block, fill_value=batch * block)[0]]

        def heads(row: jax.Array) -> Proposals:
            sequence, node = row // count, row % count
            held = held_below(nodes.token[sequence], nodes.parent[sequence], slot[sequence, node])
            asked = Asked(features[sequence, node], held, position[sequence, node], sequence)
            return ask_rows(exits, asked, sampling, noise, decs=decs)

        proposals = _with_asked(proposals, heads, index, jnp.sum(worth), rungs(batch * block))
        valid, step = (x.reshape(batch, count) for x in (proposals.valid, proposals.log_probability))
        return i + 1, proposals, jnp.where(valid, score + lat.quantized(step), -jnp.inf)

    def more(carry: tuple[jax.Array, Proposals, jax.Array]) -> jax.Array:
        return (carry[0] < blocks) & jnp.any(asked_next(carry[0], carry[2])[1])

    unasked = jnp.full((batch, count), -jnp.inf)
    _, proposals, _ = jax.lax.while_loop(more, ask, (jnp.int32(0), _nothing(batch * count), unasked))
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

        def heads(row: jax.Array) -> Proposals:
            return ask_rows(exits, jax.tree.map(lambda x: x[row], asked), sampling, noise, decs=decs)

        return i + 1, _with_asked(proposals, heads, index, needed - i * block, counts)

    start = (jnp.int32(0), _nothing(count))
    if blocks == 1:
        # Of a loop of one turn XLA takes out what no turn changes, and so the heads would run without any live row.
        return ask(start)[1]
    _, proposals = jax.lax.while_loop(lambda carry: carry[0] * block < needed, ask, start)
    return proposals


def _nothing(count: int) -> Proposals:
    return Proposals(jnp.full(count, lat.NO_TOKEN, jnp.int32), jnp.zeros(count, jnp.float32), jnp.zeros(count, bool))


def _with_asked(
    proposals: Proposals,
    heads: Callable[[jax.Array], Proposals],
    index: jax.Array,
    needed: jax.Array,
    counts: Sequence[int],
) -> Proposals:
    """Proposals with those of the first `needed` rows of `index` [n] int32; what lies beyond the end is left out.

    `heads` is asked for as many rows at once as the least of `counts` that is enough.
    """

    def ask(count: int) -> Proposals:
        found = heads(jnp.minimum(index[:count], proposals.token.shape[0] - 1))
        return jax.tree.map(lambda x: fill(x, 0, index.shape[0]), found)

    found = climb(needed, counts, ask)
    return jax.tree.map(lambda whole, part: whole.at[index].set(part, mode="drop"), proposals, found)


def ask_rows(exits: Exits, asked: Asked, sampling: Sampling | None, noise: Noise | None, *, decs: bool) -> Proposals:
    """The heads of N gathered rows: Proposals with fields [N]; `decs` as of `propose`.

    Log-probabilities are those of the tempered distribution, without noise.
    """
    logits = exits.logits(asked.features)
    row_noise = noise_at(noise, asked.position, exits.vocabulary, asked.sequence)
    scaled = logits if sampling is None else logits / sampling.temperature
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
