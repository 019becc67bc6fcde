"""The transformer as the decode loop's callables, on one device (mesh/device.py: on a mesh).

Letters: B sequences, W rows a stage, K stages, D width, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dex_jax.decoding.dex.interface import Committed, Drafter, Exits, Network, StageView
from dex_jax.decoding.dex.trained_exits import Heads, node_features, trained_exits
from dex_jax.decoding.ladder import fill, last_row, row_counts, run_rung
from dex_jax.decoding.plan import Plan
from dex_jax.nn.cache import Memory, commit_slots, write_in_place, written_in_place
from dex_jax.nn.forward import Beside, InUse, commit_rows, run_rows, run_tree
from dex_jax.nn.in_turn import is_loop
from dex_jax.nn.no_copies import ordered_after
from dex_jax.nn.transformer import Transformer, stage_ranges


def network_of(model: Transformer, heads: Heads, plan: Plan) -> Network:
    """Build the loop's network for a model, its trained heads if there are any, and a plan."""
    depths, drafts = plan.depths, plan.drafts
    cached, arrays = plan.cached_heads, plan.cached_arrays(heads)

    def extend_exits(memory: Any, done: Committed) -> Any:
        if cached is None or arrays is None:
            return memory
        return cached.extend(model, arrays, memory, done.chunk)

    drafter = None
    if plan.drafter is not None and heads.drafter is not None:
        drafter = plan.drafter.drafter(model, heads.drafter)
    if len(depths) == 1:
        return tree_network(model, (1,) if drafts is None else drafts.counts, drafter, extend_exits, plan.reads)

    def of_nodes(memory: Any, hidden: jax.Array, view: StageView) -> jax.Array:
        return node_features(model, plan.exits, heads.exits, hidden)

    drafter = None if drafter is None else drafter._replace(node_features=of_nodes)
    trained = None if plan.exits is None or heads.exits is None else trained_exits(model, plan.exits, heads.exits)
    return transformer_network(model, depths, trained or shared_exits(model), extend_exits, drafter=drafter)


def transformer_network(
    model: Transformer,
    depths: tuple[int, ...],
    exits: Exits | None,
    commit_exits: Callable[[Any, Committed], Any] = lambda memory, done: memory,
    in_use: InUse = (),
    drafter: Drafter | None = None,
    counts: tuple[int, ...] | None = None,
) -> Network:
    """Build the callables of `model` cut at exit depths x_1 < ... < x_K = L.

    `commit_exits` updates Memory.exits together with the caches. `in_use` is as in `run_rows`. `counts` are the row
    counts that a stage is compiled for, None for those of `stage_rungs`.
    """
    return Network(
        vocab_size=model.config.vocab_size,
        embed=lambda tokens, positions: model.embed_tokens(jnp.maximum(tokens, 0)),
        advance=lambda memory, hidden, view: _advance(model, depths, memory, hidden, view, in_use, counts),
        drafter=drafter,
        commit=lambda memory, done: commit_slots(memory, done.slot, done.position, model.kinds)._replace(
            exits=commit_exits(memory.exits, done)
        ),
        final=model.logits,
        exits=exits,
    )


def tree_network(
    model: Transformer,
    counts: tuple[int, ...],
    drafter: Drafter | None,
    commit_exits: Callable[[Any, Committed], Any],
    reads: tuple[int, ...],
) -> Network:
    """Build the callables of `model` for K = 1, where a cohort runs through all layers in one tick.

    `counts` are the row counts that are compiled. Memory must come from `cache.with_cohort`. Hidden states are [K, B,
    W, (1 + reads) D], those at depth L with those at the depths `reads` behind them.
    """
    size = model.config.width

    def embed(tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # `advance` knows which rows are in use, and to gather all of them takes longer than a tick's other small work.
        return jnp.zeros((*tokens.shape, (1 + len(reads)) * size), model.dtype)

    def advance(memory: Memory, hidden: jax.Array, view: StageView) -> tuple[jax.Array, Memory]:
        rows = hidden.shape[2]
        among = view.ancestors[0] | jnp.eye(rows, dtype=bool)[None]

        def run(width: int) -> Any:
            if width == 0:
                return hidden[0], memory.lattice_keys, memory.lattice_values
            position, seen = view.position[0, :, :width], among[:, :width, :width]
            entered = model.embed_tokens(jnp.maximum(view.token[0, :, :width], 0)).astype(hidden.dtype)
            x, (keys, values) = run_tree(model, memory, entered, position, seen, view.prefix, reads)
            return fill(x, 1, rows), fill(keys, 3, rows), fill(values, 3, rows)

        # Only tick 0 is empty; with one count there is no conditional, and weights are fetched ahead.
        x, keys, values = run_rung(last_row(view.live[0]), row_counts(counts, rows, empty=len(counts) > 1), run)
        return x[None], memory._replace(lattice_keys=keys, lattice_values=values)

    def commit(memory: Memory, done: Committed) -> Memory:
        fresh = (memory.lattice_keys, memory.lattice_values)
        memory = commit_rows(model, memory, fresh, done.slot, done.position, done.hidden)
        return memory._replace(exits=commit_exits(memory.exits, done))

    return Network(
        vocab_size=model.config.vocab_size,
        embed=embed,
        advance=advance,
        commit=commit,
        final=lambda hidden: model.logits(hidden[:, :size]),
        drafter=drafter,
    )


def shared_exits(model: Transformer) -> Exits:
    """Return exits of kind "shared": the model's own final norm and unembedding at every depth."""
    return Exits(features=lambda memory, hidden, view: model.normed(hidden[:-1]), logits=model.unembedding)


def stage_rungs(batch: int, rows: int) -> tuple[int, ...]:
    """Return the row counts that a stage is compiled for; each costs a compilation of all layers.

    An empty stage is skipped. On a CPU one row is cheaper than eight, and eight are cheaper than many more, but two to
    seven rows cost as much as eight.
    """
    between = {8} if rows > 8 else {max(1, rows // 2)} if batch > 1 else set()
    return tuple(sorted({0, 1, rows} | between))


def _masks(view: StageView) -> tuple[jax.Array, jax.Array]:
    """Return (the attention mask of older cohorts [K, B, W, K W], that of the cohort itself [K, B, W, W]).

    Older cohorts have run a stage in earlier ticks and are in memory; a cohort's own nodes run it together.
    """
    stages, batch, rows, slots = view.ancestors.shape
    elsewhere = (jnp.arange(slots)[None] // rows != view.ring[:, None])[:, None, None]
    by_ring = view.ancestors.reshape(stages, batch, rows, slots // rows, rows)
    own = jnp.take_along_axis(by_ring, view.ring[:, None, None, None, None], axis=3)[:, :, :, 0]
    return view.ancestors & elsewhere, own | jnp.eye(rows, dtype=bool)[None, None]


def _advance(
    model: Transformer,
    depths: tuple[int, ...],
    memory: Memory,
    hidden: jax.Array,
    view: StageView,
    in_use: InUse,
    counts: tuple[int, ...] | None,
) -> tuple[jax.Array, Memory]:
    _, batch, rows, _ = hidden.shape
    counts = stage_rungs(batch, rows) if counts is None else row_counts(counts, rows)
    _, groups, _, head_dim = memory.keys[0].shape
    ancestor_mask, among = _masks(view)
    loop = not in_use and is_loop(model)
    used = jax.vmap(last_row)(view.live)
    out, lattice = [], [list(memory.lattice_keys), list(memory.lattice_values)]

    for k, stage in enumerate(stage_ranges(depths)):

        def run_stage(width: int, k: int = k, stage: range = stage) -> Any:
            if width == 0:
                nothing = jnp.zeros((batch, groups, rows, head_dim), memory.keys[0].dtype)
                each = jnp.stack([nothing] * len(stage)) if loop else (nothing,) * len(stage)
                return hidden[k], (each, each)
            x, position = hidden[k, :, :width], view.position[k, :, :width]
            own = among[k, :, :width, :width]
            older = Beside(memory.lattice_keys, memory.lattice_values, ancestor_mask[k, :, :width], view.slots)
            x, fresh = run_rows(model, memory, x, position, own, view.prefix, stage, in_use, beside=older)
            return fill(x, 1, rows), jax.tree.map(lambda each: fill(each, -2, rows), fresh)

        x, fresh = run_rung(used[k], counts, run_stage)
        out.append(x)
        start = ordered_after(view.ring[k] * rows, x)
        old = [each[stage.start : stage.stop] for each in lattice]
        for each, new in zip(lattice, _with_cohort(old, fresh, start), strict=True):
            each[stage.start : stage.stop] = new
    keys, values = map(tuple, lattice)
    return jnp.stack(out), memory._replace(lattice_keys=keys, lattice_values=values)


def _with_cohort(lattice: list[list[jax.Array]], fresh: Any, start: jax.Array) -> list[Sequence[jax.Array]]:
    """Return the keys and values of a stage's lattice slots with `fresh`, those of a cohort, from slot `start` on."""
    if written_in_place(tuple(lattice[0]), jax.tree.leaves(fresh)[0].shape[-2]):
        keys, values = lattice
        places = jnp.broadcast_to(start, keys[0].shape[0])
        return [*write_in_place(keys, values, fresh, None, places, [()] * len(keys))]
    pairs = (zip(old, new, strict=True) for old, new in zip(lattice, fresh, strict=True))
    at = (0, 0, start, 0)  # of [B, G, K W, d], the same slots in every sequence
    return [[jax.lax.dynamic_update_slice(old, new, at) for old, new in each] for each in pairs]
