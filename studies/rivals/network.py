"""The transformer and its exits as the callables that the loop of chains needs.

Letters: B sequences, K stages, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dex_jax.config import ExitsConfig
from dex_jax.decoding.dex.interface import Chunk
from dex_jax.decoding.dex.trained_exits import ExitArrays, TrainedHeads, context_rows, exit_heads, shared_columns
from dex_jax.nn.attention import causal_rows
from dex_jax.nn.cache import NOWHERE
from dex_jax.nn.exits import ExitHeads, exit_graph
from dex_jax.nn.forward import run_rows, write_layers
from dex_jax.nn.layers import names_in
from dex_jax.nn.transformer import Transformer, stage_ranges
from studies.rivals.interface import ChainExits, ChainNetwork, ChainRows


def chain_network(
    model: Transformer, depths: tuple[int, ...], config: ExitsConfig | None, arrays: ExitArrays | None
) -> ChainNetwork:
    """Return the callables of `model`, cut at depths x_1 < ... < x_K = L.

    `config` and `arrays` are of trained exits at x_1 .. x_{K-1}, None for the model's own final norm and unembedding.
    """
    stages = stage_ranges(depths)

    def run(memory: Any, stage: int, hidden: jax.Array, start: jax.Array) -> Any:
        batch, rows = hidden.shape[:2]
        position = start[:, None] + jnp.arange(rows)[None]
        return run_rows(model, memory, hidden, position, causal_rows(batch, rows), start, stages[stage])

    def write(memory: Any, stage: int, fresh: Any, start: jax.Array, where: jax.Array) -> Any:
        # The write must come after all reads of the cache, so it depends on the last of them.
        read = jax.tree.leaves(fresh)[-1]
        return write_layers(model, memory, fresh, jnp.where(where, start, NOWHERE), stages[stage], read)

    def commit(memory: Any, done: Chunk) -> Any:
        if config is None or arrays is None or not config.needs_previous:
            return memory
        taken = jax.lax.cond(
            jnp.any(done.lengths > done.start),
            lambda: TrainedHeads(config).extend(model, arrays, memory.exits, done),
            lambda: memory.exits,
        )
        return memory._replace(exits=taken)

    exits = None
    if len(depths) > 1:
        exits = _shared(model) if config is None or arrays is None else _trained(model, config, arrays)
    return ChainNetwork(
        vocab_size=model.config.vocab_size,
        depths=depths,
        embed=lambda token, position: model.embed_tokens(jnp.maximum(token, 0)),
        run=run,
        write=write,
        commit=commit,
        final=model.logits,
        exits=exits,
    )


def _shared(model: Transformer) -> ChainExits:
    def newest(memory: Any, rows: ChainRows, row: jax.Array, exit_index: jax.Array) -> jax.Array:
        return model.normed(_state(rows, row, exit_index))

    def shadows(memory: Any, rows: ChainRows) -> jax.Array:
        states = rows.states[:-1]
        return model.normed(states).reshape(states.shape[0], -1, states.shape[-1])

    return ChainExits(newest, shadows, model.unembedding)


def _trained(model: Transformer, config: ExitsConfig, arrays: ExitArrays) -> ChainExits:
    heads = exit_heads(config, arrays)

    def newest(memory: Any, rows: ChainRows, row: jax.Array, exit_index: jax.Array) -> jax.Array:
        own = _state(rows, row, exit_index)[:, None]
        chosen = _heads_of(config, arrays, exit_index)
        if not config.needs_previous:
            return chosen.features(own, None, None)[:, 0]
        above = jnp.maximum(row - 1, 0)
        waits_at = jnp.take_along_axis(rows.progress, above[:, None], axis=1)[:, 0] - 1
        parent = _state(rows, above, waits_at)
        # The parent waits at an exit, so the exit's estimate stands for it, unless the parent is committed.
        estimate = _heads_of(config, arrays, waits_at).base(parent[:, None])[:, 0]
        before = jnp.where((row == 0)[:, None], memory.exits.previous, estimate)
        context = None
        if heads.context is not None:
            token, position = (jnp.take_along_axis(x, row[:, None], axis=1) for x in (rows.token, rows.position))
            context = context_rows(model, heads.context, memory.exits.context, before[:, None], token, position)
        return chosen.features(own, before[:, None], context)[:, 0]

    def shadows(memory: Any, rows: ChainRows) -> jax.Array:
        states = rows.states[:-1]
        exits, batch, count, width = states.shape
        flat = states.reshape(exits, batch * count, width)
        if not config.needs_previous:
            return heads.features(flat, None, None)
        base = heads.base(flat)
        committed = jnp.broadcast_to(memory.exits.previous[None, :, None], (exits, batch, 1, width))
        before = jnp.concatenate([committed, base.reshape(states.shape)[:, :, :-1]], axis=2)
        context = None
        if heads.context is not None:
            context = jax.lax.map(
                lambda b: context_rows(model, heads.context, memory.exits.context, b, rows.token, rows.position), before
            ).reshape(flat.shape)
        return heads.features(flat, before.reshape(flat.shape), context, base)

    logits, rest = shared_columns(model, arrays)
    return ChainExits(newest, shadows, logits, arrays.vocabulary, rest)


def _state(rows: ChainRows, row: jax.Array, exit_index: jax.Array) -> jax.Array:
    """Return the states of one row a sequence after stage `exit_index` [B]: [B, D]."""
    return rows.states[exit_index, jnp.arange(row.shape[0]), row]


def _heads_of(config: ExitsConfig, arrays: ExitArrays, exit_index: jax.Array) -> ExitHeads:
    """Return the exits `exit_index` [B] as B heads, one for the row of each sequence."""
    batch = exit_index.shape[0]
    graph = exit_graph(dataclasses.replace(config, depths=tuple(range(1, batch + 1))))

    def chosen(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "context" in names_in(path) else leaf[exit_index]

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(chosen, arrays.parameters))
