"""The proposals that live nodes get from their exits.

Letters: B sequences, W rows a stage, K stages, X stages whose nodes are asked, D' exit features, N rows asked at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax.decoding.dex.interface import Exits
from dex_jax.decoding.ladder import fill, run_rung
from dex_jax.decoding.noise import Noise, noise_at
from dex_jax.lattice import NO_NODE, NO_TOKEN, Lattice, Proposals
from dex_jax.sampling import DROPPED, Sampling, choose, log_total

NODE_BLOCKS = (1, 8, 16)
"""Numbers of nodes that heads run for at a time: the largest, or the smallest that holds those that are left. On a CPU
sizes between two of them cost as much as the larger one."""


def ask_exits(
    exits: Exits,
    features: jax.Array,
    ring: jax.Array,
    position: jax.Array,
    live: jax.Array,
    lattice: Lattice,
    sampling: Sampling | None,
    noise: Noise | None,
    *,
    decs: bool,
) -> Proposals:
    """Return the proposals of the exits below nodes of X stages: fields [X, B, W].

    The cohorts of these stages stand in `ring` rows [X]; nodes have features [X, B, W, D'], and position and live
    [X, B, W]. Those that are not live propose nothing and cost nothing. With `decs` the tokens of a node's children are
    masked; otherwise a repeated token is no proposal.
    """
    _, batch, rows = live.shape
    count = live.size
    parents = jnp.where(lattice.live, lattice.parent, NO_NODE).reshape(batch, -1)
    tokens = lattice.token.reshape(batch, -1)
    features, position = features.reshape(count, -1), position.reshape(-1)
    needed, block = jnp.sum(live), min(NODE_BLOCKS[-1], count)
    chosen = jnp.nonzero(live.reshape(-1), size=-(-count // block) * block, fill_value=count)[0]

    def ask(node: jax.Array) -> Proposals:
        sequence, slot = node // rows % batch, ring[node // (rows * batch)] * rows + node % rows
        held = jnp.where(parents[sequence] == slot[:, None], tokens[sequence], NO_TOKEN)
        return _ask_rows(exits, features[node], held, position[node] + 1, sequence, sampling, noise, decs=decs)

    def ask_block(carry: tuple[jax.Array, Proposals]) -> tuple[jax.Array, Proposals]:
        i, proposals = carry
        node = jax.lax.dynamic_slice_in_dim(chosen, i * block, block)

        def ask_first(size: int) -> Proposals:
            return jax.tree.map(lambda x: fill(x, 0, block), ask(jnp.minimum(node[:size], count - 1)))

        found = run_rung(needed - i * block, (0, *(size for size in NODE_BLOCKS if size < block), block), ask_first)
        return i + 1, jax.tree.map(lambda whole, part: whole.at[node].set(part, mode="drop"), proposals, found)

    none = Proposals(jnp.full(count, NO_TOKEN, jnp.int32), jnp.zeros(count, jnp.float32), jnp.zeros(count, bool))
    found = (jnp.int32(0), none)
    # XLA moves work out of a loop of one turn, and so the heads would run without any live row.
    if count == block:
        found = ask_block(found)
    else:
        found = jax.lax.while_loop(lambda carry: carry[0] * block < needed, ask_block, found)
    return jax.tree.map(lambda field: field.reshape(live.shape), found[1])


def _ask_rows(
    exits: Exits,
    features: jax.Array,
    held: jax.Array,
    position: jax.Array,
    sequence: jax.Array,
    sampling: Sampling | None,
    noise: Noise | None,
    *,
    decs: bool,
) -> Proposals:
    """Run the heads for N nodes and return Proposals with fields [N].

    `held` [N, K W] are the tokens of each node's children, NO_TOKEN elsewhere, `position` [N] those of the proposed
    tokens. Log-probabilities are those of the tempered distribution, without noise.
    """
    logits = exits.logits(features)
    row_noise = noise_at(noise, position, exits.vocabulary, sequence)
    scaled = logits if sampling is None else logits / sampling.temperature
    allowed = _mask_columns(logits, held, exits.columns) if decs else logits
    column, left = choose(allowed, sampling, row_noise)
    token = column if exits.vocabulary is None else exits.vocabulary[column]
    log_all = log_total(scaled, None if exits.rest is None else exits.rest(features), sampling)
    log_probability = jnp.take_along_axis(scaled, column[:, None], axis=-1)[:, 0] - log_all
    return Proposals(token, log_probability, left & ~jnp.any(held == token[:, None], axis=-1))


def _mask_columns(logits: jax.Array, tokens: jax.Array, columns: jax.Array | None) -> jax.Array:
    """Mask each row's `tokens` ([N, C] full ids, NO_TOKEN for none) in logits [N, V']."""
    width = logits.shape[-1]
    column = tokens if columns is None else columns[jnp.maximum(tokens, 0)]
    column = jnp.where(tokens == NO_TOKEN, width, column)
    return logits.at[jnp.arange(logits.shape[0])[:, None], column].set(DROPPED, mode="drop")
