"""The transformer as the decode loop's callables, in the weight layouts of one device (decoding/stage.py: of a mesh).

Letters: B sequences, W rows a stage, K stages, l layers in a stage, D width, S cache length, G key-value heads,
d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dex_jax.cache import Memory, after, allocate, commit_slots, write_rows
from dex_jax.decoding.interface import Committed, Drafter, Exits, Network, StageView
from dex_jax.decoding.ladder import climb, fill
from dex_jax.nn.layers import DecoderLayer, KeyValues, attend, causal_rows, rope_table
from dex_jax.nn.transformer import Stacked, Transformer, stage_ranges

InUse = Sequence[jax.Array | None]
"""By layer, whether it is there at all (bool); None, and what lies beyond the sequence's end: it is."""


def transformer_network(
    model: Transformer,
    depths: tuple[int, ...],
    exits: Exits | None,
    commit_exits: Callable[[Any, Committed], Any] = lambda memory, done: memory,
    in_use: InUse = (),
    drafter: Drafter | None = None,
) -> Network:
    """The callables of `model` cut at exit depths x_1 < ... < x_K = L; a stacked model must be stacked for them.

    `commit_exits` moves on what exits remember, Memory.exits, in step with the caches. `in_use` as of `run_rows`.
    """
    unrolled = functools.partial(_advance_unrolled, in_use=in_use)
    advance = _advance_stacked if isinstance(model.layout, Stacked) else unrolled

    return Network(
        vocab_size=model.config.vocab_size,
        embed=lambda tokens, positions: model.embed_tokens(jnp.maximum(tokens, 0)),
        advance=lambda memory, hidden, view: advance(model, depths, memory, hidden, view),
        drafter=drafter,
        commit=lambda memory, done: commit_slots(memory, done.slot, done.position)._replace(
            exits=commit_exits(memory.exits, done)
        ),
        final=model.logits,
        exits=exits,
    )


def tree_network(
    model: Transformer,
    counts: tuple[int, ...],
    drafter: Drafter | None,
    commit_exits: Callable[[Any, Committed], Any] = lambda memory, done: memory,
) -> Network:
    """The callables of `model` in any layout for K = 1: a cohort runs through all layers in one tick.

    `counts` are the row counts that are compiled. Memory must come from `cache.with_cohort`.
    """
    layers = range(model.config.num_layers)

    def advance(memory: Memory, hidden: jax.Array, view: StageView) -> tuple[jax.Array, Memory]:
        rows = hidden.shape[2]
        among = view.ancestors[0] | jnp.eye(rows, dtype=bool)[None]
        used = jnp.max(jnp.where(view.live[0], jnp.arange(1, rows + 1)[None], 0))

        def run(width: int) -> Any:
            if width == 0:
                return hidden[0], memory.lattice_keys, memory.lattice_values
            position, seen = view.position[0, :, :width], among[:, :width, :width]
            x, fresh = run_rows(model, memory, hidden[0, :, :width], position, seen, view.prefix, layers)
            # One array to commit from, not one a layer: each operation costs a device more than these few rows do.
            keys, values = (jnp.stack(each) if isinstance(each, tuple) else each for each in fresh)
            return fill(x, 1, rows), fill(keys, 3, rows), fill(values, 3, rows)

        x, keys, values = climb(used, (0, *(count for count in counts if count < rows), rows), run)
        return x[None], memory._replace(lattice_keys=keys, lattice_values=values)

    def commit(memory: Memory, done: Committed) -> Memory:
        fresh = (memory.lattice_keys, memory.lattice_values)
        memory = commit_rows(model, memory, fresh, done.slot, done.position, done.hidden)
        return memory._replace(exits=commit_exits(memory.exits, done))

    return Network(
        vocab_size=model.config.vocab_size,
        embed=lambda tokens, positions: model.embed_tokens(jnp.maximum(tokens, 0)),
        advance=advance,
        commit=commit,
        final=model.logits,
        drafter=drafter,
    )


def shared_exits(model: Transformer) -> Exits:
    """Exits of kind "shared": the model's own final norm and unembedding at every depth."""
    return Exits(features=lambda memory, hidden, view: model.normed(hidden[:-1]), logits=model.unembedding)


def extend(model: Transformer, memory: Memory, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, Memory]:
    """Runs R consecutive tokens of each sequence through all layers and commits their keys and values.

    Args:
      model: any layout.
      memory: committed positions 0 .. start - 1 are attended to.
      tokens: [B, R] int32; what lies beyond a sequence's end may be anything, later calls overwrite it.
      start: [B] int32 absolute position of the first; start + R must not pass the cache's end.

    Returns:
      (hidden states [B, R, D] at depth L, memory).
    """
    states, memory = extend_with_states(model, memory, tokens, start)
    return states[-1], memory


def last_states(hidden: jax.Array, last: jax.Array, start: jax.Array, lengths: jax.Array) -> jax.Array:
    """The state of each prompt's last token, as far as the chunks of a prefill have come: [B, D].

    Args:
      hidden: [B, R, D], of a chunk.
      last: [B, D], as before the chunk.
      start: int32 scalar, position of the chunk's first token.
      lengths: [B] int32, prompt lengths.
    """
    index = lengths - 1 - start
    here = (index >= 0) & (index < hidden.shape[1])
    chosen = jnp.take_along_axis(hidden, jnp.clip(index, 0, hidden.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(here[:, None], chosen, last)


def depth_states(model: Transformer, tokens: jax.Array, depths: tuple[int, ...]) -> jax.Array:
    """Hidden states at some depths, without a prefix: tokens [B, R] int32 -> [X, B, R, D]."""
    batch, rows = tokens.shape
    memory = allocate(model.config, model.layout, batch, rows, 0, model.embed[...].dtype)
    states, _ = extend_with_states(model, memory, tokens, jnp.zeros(batch, jnp.int32))
    return jnp.stack(states_at(model, tokens, states, depths))


def states_at(model: Transformer, tokens: jax.Array, states: Any, depths: tuple[int, ...]) -> list[jax.Array]:
    """The states [B, R, D] at `depths` 0..L of what `extend_with_states` gave for tokens [B, R]."""
    return [model.embed_tokens(tokens) if depth == 0 else states[depth - 1] for depth in depths]


def extend_with_states(model: Transformer, memory: Memory, tokens: jax.Array, start: jax.Array) -> tuple[Any, Memory]:
    """`extend`, with the states after every layer: L of [B, R, D] (stacked layout: one array [L, B, R, D])."""
    batch, rows = tokens.shape
    positions = start[:, None] + jnp.arange(rows)[None, :]
    table = rope_table(positions, model.config)
    causal = causal_rows(batch, rows)
    x = model.embed_tokens(tokens)

    def layer_step(
        layer: DecoderLayer, x: jax.Array, keys: jax.Array, values: jax.Array, place: tuple = ()
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        committed = jnp.arange(keys.shape[-2])[None, None, :] < start[:, None, None]
        memory = [KeyValues(keys[place], values[place], committed)]
        x, new_keys, new_values = _run_layer(layer, x, table, memory, causal)
        at = after(start, x)
        return x, write_rows(keys, new_keys, at, place), write_rows(values, new_values, at, place)

    if not isinstance(model.layout, Stacked):
        all_keys, all_values = list(memory.keys), list(memory.values)
        states = []
        for i, layer in enumerate(model.layers):
            x, all_keys[i], all_values[i] = layer_step(layer, x, all_keys[i], all_values[i])
            states.append(x)
        return states, memory._replace(keys=tuple(all_keys), values=tuple(all_values))

    layout = model.layout
    graph, weights = nnx.split(model.layers)
    places = jnp.asarray([layout.place(i) for i in range(model.config.num_layers)])

    def scan_body(carry, place):
        x, keys, values = carry
        j, k = place[0], place[1]
        layer = nnx.merge(graph, jax.tree.map(lambda w: w[j, k], weights))
        x, keys, values = layer_step(layer, x, keys, values, (j, k))
        return (x, keys, values), x

    (_, keys, values), states = jax.lax.scan(scan_body, (x, memory.keys, memory.values), places)
    return states, memory._replace(keys=keys, values=values)


def run_tree(
    model: Transformer, memory: Memory, token: jax.Array, position: jax.Array, among: jax.Array, prefix: jax.Array
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Runs N rows of each sequence through all layers and commits nothing.

    Args:
      model: any layout.
      memory: committed positions 0 .. prefix - 1 are attended to.
      token, position: [B, N] int32.
      among: [B, N, N] bool, which rows each attends to, itself included.
      prefix: [B] int32.

    Returns:
      (hidden states [B, N, D] at depth L, the rows' (keys, values), both [L, B, G, N, d]).
    """
    hidden = model.embed_tokens(jnp.maximum(token, 0))
    hidden, fresh = run_rows(model, memory, hidden, position, among, prefix, range(model.config.num_layers))
    # One array to choose rows from, not one a layer: each operation costs a device more than these few rows do.
    keys, values = (jnp.stack(each) if isinstance(each, tuple) else each for each in fresh)
    return hidden, (keys, values)


def run_rows(
    model: Transformer,
    memory: Memory,
    hidden: jax.Array,
    position: jax.Array,
    among: jax.Array,
    prefix: jax.Array,
    layers: range,
    in_use: InUse = (),
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Runs N rows of each sequence through some consecutive layers and writes nothing.

    Args:
      model: any layout.
      memory: positions 0 .. prefix - 1 of these layers are attended to.
      hidden: [B, N, D] before the first of them.
      position: [B, N] int32.
      among: [B, N, N] bool, which rows each attends to, itself included.
      prefix: [B] int32.
      layers: 0-based, l of them.
      in_use: of an unrolled model's layers; those that are not are skipped, and give zeros as keys and values.

    Returns:
      (hidden states [B, N, D] after the last, the rows' (keys, values): l of [B, G, N, d], stacked [l, B, G, N, d]).
    """
    table = rope_table(position, model.config)

    def layer_step(
        layer: DecoderLayer, x: jax.Array, keys: jax.Array, values: jax.Array, used: jax.Array | None = None
    ) -> Any:
        committed = jnp.arange(keys.shape[-2])[None, None, :] < prefix[:, None, None]
        return _run_layer(layer, x, table, [KeyValues(keys, values, committed)], among, used)

    if not isinstance(model.layout, Stacked):
        fresh = []
        for i in layers:
            hidden, *rows = layer_step(model.layers[i], hidden, memory.keys[i], memory.values[i], _used(in_use, i))
            fresh.append(rows)
        return hidden, (tuple(keys for keys, _ in fresh), tuple(values for _, values in fresh))

    layout = model.layout
    graph, weights = nnx.split(model.layers)

    def scan_body(x: jax.Array, place: jax.Array) -> Any:
        j, k = place[0], place[1]
        layer = nnx.merge(graph, jax.tree.map(lambda w: w[j, k], weights))
        x, *rows = layer_step(layer, x, memory.keys[j, k], memory.values[j, k])
        return x, tuple(rows)

    return jax.lax.scan(scan_body, hidden, jnp.asarray([layout.place(i) for i in layers]))


def commit_rows(
    model: Transformer, memory: Memory, fresh: tuple[Any, Any], row: jax.Array, prefix: jax.Array, done: jax.Array
) -> Memory:
    """Writes P rows of each sequence at consecutive positions.

    Args:
      model: any layout.
      memory: is read before this.
      fresh: from `run_tree`.
      row: [B, P] int32; those past the path's end may be anything, later commits overwrite them.
      prefix: [B] int32, the first position; prefix + P must not pass the cache's end.
      done: any array that is known only after memory has been read.
    """

    def chosen(row: jax.Array, *fresh: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.take_along_axis(each, row[None, :, None, :, None], axis=3, mode="clip") for each in fresh)

    def branch(row: jax.Array, *fresh: jax.Array) -> tuple[jax.Array, ...]:
        # No row is as low as this, which XLA does not know: it leaves branches alone.
        return jax.lax.cond(jnp.any(row > -(2**30)), chosen, lambda row, *fresh: chosen(0 * row, *fresh), row, *fresh)

    # Otherwise XLA chooses all layers' rows anew for every layer that it writes, and compiles that six times as long.
    keys_values = jax.lax.platform_dependent(row, *fresh, cpu=branch, default=chosen)
    return write_layers(model, memory, keys_values, prefix, range(model.config.num_layers), done)


def write_layers(
    model: Transformer,
    memory: Memory,
    fresh: tuple[Any, Any],
    start: jax.Array,
    layers: range,
    done: jax.Array,
) -> Memory:
    """Writes what `run_rows` gave for `layers` at consecutive positions from `start` [B] on.

    Of P rows of each, start + P must not pass the cache's end. `done` is any array that is known only after memory has
    been read.
    """
    at = after(start, done)

    if not isinstance(model.layout, Stacked):
        written = []
        for caches, each in zip((memory.keys, memory.values), fresh, strict=True):
            whole = list(caches)
            for i, rows in zip(layers, each, strict=True):
                whole[i] = write_rows(whole[i], rows, at)
            written.append(tuple(whole))
        return memory._replace(keys=written[0], values=written[1])

    def one_layer(caches: Any, part: Any) -> Any:
        place, *rows = part
        where = (place[0], place[1])
        return tuple(write_rows(c, r, at, where) for c, r in zip(caches, rows, strict=True)), None

    places = jnp.asarray([model.layout.place(i) for i in layers])
    (keys, values), _ = jax.lax.scan(one_layer, (memory.keys, memory.values), (places, *fresh))
    return memory._replace(keys=keys, values=values)


def _run_layer(
    layer: DecoderLayer,
    x: jax.Array,
    table,
    memory: list[KeyValues],
    among_rows: jax.Array,
    used: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer over the rows of each sequence, [B, R, D]: returns (x, keys, values) of the rows.

    Rows attend to `memory` and to one another as `among_rows` [B, R, R] says. Memory is only read: writing first and
    attending to the result makes XLA copy the whole cache in every step. A layer that is not `used` is skipped.
    """
    graph, weights = nnx.split(layer)

    def run() -> tuple[jax.Array, jax.Array, jax.Array]:
        return _run_layer_of(graph, weights, x, table, memory, among_rows)

    def skip() -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, groups, _, head_dim = memory[0].keys.shape
        nothing = jnp.zeros((batch, groups, x.shape[1], head_dim), x.dtype)
        return x, nothing, nothing

    return run() if used is None else jax.lax.cond(used, run, skip)


def _used(in_use: InUse, layer: int) -> jax.Array | None:
    return in_use[layer] if layer < len(in_use) else None


# Jitted so that a model is traced once per shape of its layers and not once per layer; XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=0)
def _run_layer_of(
    graph: Any, weights: Any, x: jax.Array, table: Any, memory: list[KeyValues], among_rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    layer = nnx.merge(graph, weights)
    queries, keys, values = layer.project(x, table)
    attended = attend(queries, [*memory, KeyValues(keys, values, among_rows)], layer.whole)
    return layer.finish(x, attended), keys, values


def stage_rungs(batch: int, rows: int) -> tuple[int, ...]:
    """Row counts that a stage is compiled for; each costs a compilation of all layers.

    An empty stage is skipped. On a CPU one row is cheaper than eight, and eight than many times eight, but what lies
    between one and eight rows costs the same.
    """
    between = {8} if rows > 8 else {max(1, rows // 2)} if batch > 1 else set()
    return tuple(sorted({0, 1, rows} | between))


def _masks(view: StageView, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(committed [B, 1, S], ancestors in older cohorts [K, B, W, K W], the cohort's own [K, B, W, W]).

    Older cohorts have run a stage in earlier ticks and are in memory; a cohort's own nodes run it together.
    """
    stages, batch, rows, slots = view.ancestors.shape
    prefix = (jnp.arange(length)[None, :] < view.prefix[:, None])[:, None, :]
    elsewhere = (jnp.arange(slots)[None] // rows != view.ring[:, None])[:, None, None]
    by_ring = view.ancestors.reshape(stages, batch, rows, slots // rows, rows)
    own = jnp.take_along_axis(by_ring, view.ring[:, None, None, None, None], axis=3)[:, :, :, 0]
    return prefix, view.ancestors & elsewhere, own | jnp.eye(rows, dtype=bool)[None, None]


def _advance_unrolled(
    model: Transformer,
    depths: tuple[int, ...],
    memory: Memory,
    hidden: jax.Array,
    view: StageView,
    in_use: InUse = (),
) -> tuple[jax.Array, Memory]:
    _, batch, rows, _ = hidden.shape
    _, groups, length, head_dim = memory.keys[0].shape
    prefix_mask, ancestor_mask, among = _masks(view, length)
    # Survivors of a collapse stand anywhere in a cohort: the row count that matters is the last live one.
    used = jnp.max(jnp.where(view.live, jnp.arange(1, rows + 1)[None, None, :], 0), axis=(1, 2))
    out, lattice_keys, lattice_values = [], list(memory.lattice_keys), list(memory.lattice_values)

    for k, stage in enumerate(stage_ranges(depths)):

        def run_stage(width: int, k: int = k, stage: range = stage) -> Any:
            if width == 0:
                nothing = jnp.zeros((batch, groups, rows, head_dim), memory.keys[0].dtype)
                return hidden[k], tuple((nothing, nothing) for _ in stage)
            x = hidden[k, :, :width]
            table = rope_table(view.position[k, :, :width], model.config)
            ancestors, own = ancestor_mask[k, :, :width], among[k, :, :width, :width]
            fresh = []
            for i in stage:
                committed = KeyValues(memory.keys[i], memory.values[i], prefix_mask)
                lattice = KeyValues(memory.lattice_keys[i], memory.lattice_values[i], ancestors)
                sources = [committed, lattice]
                x, keys, values = _run_layer(model.layers[i], x, table, sources, own, _used(in_use, i))
                fresh.append((fill(keys, 2, rows), fill(values, 2, rows)))
            return fill(x, 1, rows), tuple(fresh)

        x, fresh = climb(used[k], stage_rungs(batch, rows), run_stage)
        out.append(x)
        start = after(view.ring[k] * rows, x)
        for i, (keys, values) in zip(stage, fresh, strict=True):
            lattice_keys[i] = _write_cohort(lattice_keys[i], keys, start)
            lattice_values[i] = _write_cohort(lattice_values[i], values, start)
    memory = memory._replace(lattice_keys=tuple(lattice_keys), lattice_values=tuple(lattice_values))
    return jnp.stack(out), memory


def _advance_stacked(
    model: Transformer, depths: tuple[int, ...], memory: Memory, hidden: jax.Array, view: StageView
) -> tuple[jax.Array, Memory]:
    assert isinstance(model.layout, Stacked)
    assert model.layout.depths == depths
    rows = hidden.shape[2]
    prefix_mask, ancestor_mask, among = _masks(view, memory.keys.shape[4])
    graph, weights = nnx.split(model.layers)
    table = rope_table(view.position, model.config)

    def one_stage(weights, x, table, keys, values, lattice_keys, lattice_values, ancestors, own):
        committed = KeyValues(keys, values, prefix_mask)
        lattice = KeyValues(lattice_keys, lattice_values, ancestors)
        return _run_layer(nnx.merge(graph, weights), x, table, [committed, lattice], own)

    def scan_body(x, layer):
        arguments = (layer[0], x, table, *layer[1:], ancestor_mask, among)
        x, keys, values = jax.vmap(one_stage)(*arguments)
        return x, (keys, values)

    hidden, (keys, values) = jax.lax.scan(scan_body, hidden, (weights, *memory[:4]))
    slot = after(view.ring * rows, hidden)

    def write(lattice: jax.Array, fresh: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(_write_cohort), (0, 0, None))(lattice, fresh, slot)

    memory = memory._replace(
        lattice_keys=write(memory.lattice_keys, keys), lattice_values=write(memory.lattice_values, values)
    )
    return hidden, memory


def _write_cohort(lattice: jax.Array, fresh: jax.Array, start: jax.Array) -> jax.Array:
    """Writes a cohort's rows at its slots, the same for every sequence: lattice [B, G, K W, d], fresh [B, G, W, d]."""
    return jax.lax.dynamic_update_slice(lattice, fresh, (0, 0, start, 0))
