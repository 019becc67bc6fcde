"""The forward pass of the transformer over KV caches, on one device.

Letters: B sequences, R consecutive tokens, N rows of each sequence, P rows of a path, l layers that run, D width,
S cache length, G key-value heads, d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dex_jax.nn.attention import KeyValues, attend, causal_rows
from dex_jax.nn.cache import NOWHERE, Memory, allocate, lengths_of, write_in_place, write_rows, written_in_place
from dex_jax.nn.gpu_writes import MOST_ROWS
from dex_jax.nn.in_turn import Place, cached, in_turn, is_loop
from dex_jax.nn.kinds import MasksAndRotation, masks_and_rotation_at, masks_and_rotations
from dex_jax.nn.layers import DecoderLayer
from dex_jax.nn.no_copies import ordered_after, without_recompute
from dex_jax.nn.products import FEWEST, fills_rows
from dex_jax.nn.transformer import Transformer


class Beside(NamedTuple):
    """M rows of each sequence that have run before and are not in the committed cache."""

    keys: Sequence[jax.Array]  # by layer, [B, G, M, d]
    values: Sequence[jax.Array]
    seen: jax.Array  # [B, N, M] bool, which of them each row sees
    position: jax.Array  # [B, M] int32


InUse = Sequence[jax.Array | None]
"""The presence of each layer on this device (bool), by layer; None, or a missing entry, says that it is there."""


def extend(
    model: Transformer, memory: Memory, tokens: jax.Array, start: jax.Array, lengths: jax.Array | None = None
) -> tuple[Any, Memory]:
    """Run R consecutive tokens [B, R] int32 of each sequence through all layers and commit their keys and values.

    They attend to committed positions 0 .. start - 1; `start` [B] int32 is the position of the first token, and start
    + R must not pass the cache's end. Tokens beyond a sequence's length, `lengths` [B] int32, are hardly computed, and
    their results mean nothing; None runs all. Returns (hidden states [B, R, D] after every layer: L of them, or one
    array [L, B, R, D]; memory).
    """
    return extend_rows(model, memory, model.embed_tokens(tokens), start, lengths)


def last_states(hidden: jax.Array, last: jax.Array, start: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return the state of each prompt's last token, as far as the chunks of a prefill have come: [B, D].

    `hidden` [B, R, D] are the states of a chunk that begins at position `start` (int32), `last` [B, D] is the result up
    to the chunk before, and `lengths` [B] int32 are those of the prompts.
    """
    index = lengths - 1 - start
    here = (index >= 0) & (index < hidden.shape[1])
    chosen = jnp.take_along_axis(hidden, jnp.clip(index, 0, hidden.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(here[:, None], chosen, last)


def depth_states(model: Transformer, tokens: jax.Array, depths: tuple[int, ...]) -> jax.Array:
    """Compute hidden states at some depths, without a prefix: tokens [B, R] int32 -> [X, B, R, D]."""
    batch, rows = tokens.shape
    memory = allocate(model.config, batch, rows, 0, model.dtype)
    states, _ = extend(model, memory, tokens, jnp.zeros(batch, jnp.int32))
    return jnp.stack(states_at(model, tokens, states, depths))


def states_apart(model: Transformer, tokens: jax.Array, position: jax.Array, among: jax.Array) -> tuple[jax.Array, Any]:
    """Compute hidden states of rows that hold several texts each, without any cache.

    Args:
      model: a model on one device.
      tokens: [B, R] int32.
      position: [B, R] int32, the position within the token's text, from 0; below 0 there is no token.
      among: [B, R, R] bool, the tokens that each one sees.

    Returns:
      States [B, R, D] at depth 0, and those after every layer, L of them or one array [L, B, R, D].
    """
    there = (position >= 0)[:, :, None]
    # A row of zeros that sees nothing stays one through all layers, and on CPUs (nn/cpp) costs nothing there.
    embedded = jnp.where(there, model.embed_tokens(jnp.maximum(tokens, 0)), 0)
    nothing = jnp.zeros(tokens.shape[0], jnp.int32)
    found = masks_and_rotations(model.config, model.kinds, jnp.maximum(position, 0), nothing, [1], among & there)

    def run(layer: DecoderLayer, x: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
        x, _, _ = run_layer(layer, x, masks_and_rotation_at(model.kinds, found, place, 0), [])
        return x, x

    _, states = in_turn(model, range(model.config.num_layers), run, embedded, is_loop(model))
    return embedded, states


def states_at(model: Transformer, tokens: jax.Array, states: Any, depths: tuple[int, ...]) -> list[jax.Array]:
    """Return the states [B, R, D] at `depths` 0..L out of those that `extend` gave for tokens [B, R]."""
    return [model.embed_tokens(tokens) if depth == 0 else states[depth - 1] for depth in depths]


def extend_rows(
    model: Any, memory: Memory, x: jax.Array, start: jax.Array, lengths: jax.Array | None = None, first_seen: int = 0
) -> tuple[Any, Memory]:
    """Run `extend` on rows [B, R, ...] in the form that the first layer reads.

    `model` is a Transformer, or an Eagle head. Positions before `first_seen` are seen by themselves only.
    """
    batch, count = x.shape[:2]
    loop = is_loop(model)
    at_once = loop or (count <= MOST_ROWS and written_in_place(memory.keys, count))
    rows = _rows_that_run(x)
    x = jnp.pad(x, ((0, 0), (0, rows - count), (0, 0)))
    positions = start[:, None] + jnp.arange(rows)[None, :]
    causal = causal_rows(batch, rows)
    if first_seen:
        causal &= (positions >= first_seen)[:, None] | jnp.eye(rows, dtype=bool)[None]
    live, first = None, start
    if lengths is not None:
        # A row of zeros that sees nothing stays one through all layers, and on CPUs (nn/cpp) costs nothing there.
        live = (positions < lengths[:, None])[:, :, None]
        x, causal = jnp.where(live, x, 0), causal & live
        if model.config.layer_kinds:
            # Rows long after a sequence's end would overwrite what its last rows still see in a ring.
            first = jnp.where(start < lengths, start, NOWHERE)
    sizes = lengths_of(memory)
    found = masks_and_rotations(
        model.config, model.kinds, positions, start, sizes, causal, live=live, first_seen=first_seen
    )

    def run(layer: DecoderLayer, x: jax.Array, place: Place, keys: Any, values: Any) -> tuple[jax.Array, ...]:
        own = cached(keys, place), cached(values, place)
        masks = masks_and_rotation_at(model.kinds, found, place, sizes.index(own[0].shape[-2]))
        return run_layer(layer, x, masks, [own])

    def run_only(layer: DecoderLayer, x: jax.Array, place: Place) -> Any:
        x, *fresh = run(layer, x, place, memory.keys, memory.values)
        return x, (x, *fresh)

    def run_and_write(layer: DecoderLayer, carry: Any, place: Place) -> Any:
        x, *caches = carry
        x, *fresh = run(layer, x, place, *caches)
        at = ordered_after(first, x)
        own = (each[:, :, :count] for each in fresh)
        return (x, *(_write(model, *each, at, place) for each in zip(caches, own, strict=True))), x[:, :count]

    layers = range(model.config.num_layers)
    if at_once:
        x, (states, *fresh) = in_turn(model, layers, run_only, x, loop)
        row = jnp.broadcast_to(jnp.arange(count), (batch, count))
        memory = write_layers(model, memory, fresh, first, layers, x, row)
        return jax.tree.map(lambda each: each[..., :count, :], states), memory
    (_, keys, values), states = in_turn(model, layers, run_and_write, (x, memory.keys, memory.values))
    return states, memory._replace(keys=keys, values=values)


def _write(model: Transformer, caches: Any, rows: jax.Array, start: jax.Array, layer: int) -> Any:
    """Return all layers' keys or values after `write_rows` into one layer's."""
    return (*caches[:layer], write_rows(caches[layer], rows, start, model.kinds.rows[layer]), *caches[layer + 1 :])


def run_tree(
    model: Transformer,
    memory: Memory,
    hidden: jax.Array,
    position: jax.Array,
    among: jax.Array,
    prefix: jax.Array,
    reads: tuple[int, ...] = (),
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Run N embedded rows of each sequence through all layers without a commit; arguments are those of `run_rows`.

    Returns (hidden states [B, N, (1 + reads) D] at depth L with those at depths `reads` behind them, the rows' (keys,
    values), both [L, B, G, N, d]).
    """
    layers, count = range(model.config.num_layers), hidden.shape[1]
    more = _rows_that_run(hidden) - count
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
    position, among = jnp.pad(position, ((0, 0), (0, more))), jnp.pad(among, ((0, 0), (0, more), (0, more)))
    hidden, fresh = run_rows(model, memory, hidden, position, among, prefix, layers, reads=reads)
    # One array to choose rows from, not one a layer: each operation costs a device more than these few rows do.
    keys, values = (jnp.stack(each) if isinstance(each, tuple) else each for each in fresh)
    return hidden[:, :count], (keys[:, :, :, :count], values[:, :, :, :count])


def _rows_that_run(x: jax.Array) -> int:
    """Return how many rows of each sequence a step of x [B, R, D] computes: at least FEWEST if that takes no longer."""
    batch, rows = x.shape[:2]
    return max(rows, FEWEST) if batch == 1 and fills_rows(x.dtype) else rows


def run_rows(
    model: Any,
    memory: Memory,
    hidden: jax.Array,
    position: jax.Array,
    among: jax.Array,
    prefix: jax.Array,
    layers: range,
    in_use: InUse = (),
    reads: tuple[int, ...] = (),
    beside: Beside | None = None,
    first_seen: int = 0,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """Run N rows of each sequence, hidden [B, N, D] at position [B, N], through l consecutive `layers` (0-based).

    Nothing is written. Rows attend to positions 0 .. prefix - 1 (prefix [B] int32) of these layers, to the rows that
    `among` [B, N, N] bool says, themselves included, and to those `beside` them. Layers that are not `in_use` are
    skipped, and give zeros as keys and values. `model` and `first_seen` are those of `extend_rows`.

    Returns (hidden states [B, N, D] after the final layer, the rows' (keys, values): l of [B, G, N, d], or one array
    [l, B, G, N, d]). If all layers run, states at depths `reads` can stand behind the last ones, [B, N, (1 + reads) D].
    """
    sizes = lengths_of(memory)
    seen, places = (None, None) if beside is None else (beside.seen, beside.position)
    found = masks_and_rotations(
        model.config, model.kinds, position, prefix, sizes, among, seen, places, first_seen=first_seen
    )

    def layer_step(layer: DecoderLayer, x: jax.Array, place: Place) -> Any:
        used = in_use[place] if isinstance(place, int) and place < len(in_use) else None
        pairs = [memory[:2]] if beside is None else [memory[:2], beside[:2]]
        sources = [(cached(keys, place), cached(values, place)) for keys, values in pairs]
        masks = masks_and_rotation_at(model.kinds, found, place, sizes.index(sources[0][0].shape[-2]))
        x, *rows = run_layer(layer, x, masks, sources, used)
        return x, (*rows, x) if reads else tuple(rows)

    entered = hidden
    hidden, (keys, values, *states) = in_turn(model, layers, layer_step, hidden, not in_use and is_loop(model))
    if reads:
        read = [entered if depth == 0 else states[0][depth - 1] for depth in reads]
        hidden = jnp.concatenate([hidden, *read], axis=-1)
    return hidden, (keys, values)


def commit_rows(
    model: Transformer, memory: Memory, fresh: tuple[Any, Any], row: jax.Array, prefix: jax.Array, done: jax.Array
) -> Memory:
    """Write the P rows `row` [B, P] of what `run_tree` returned at consecutive positions from `prefix` [B] on.

    Rows past the path's end may be anything, later commits overwrite them; prefix + P must not pass the cache's end.
    `done` is any array that is known only after memory has been read.
    """
    layers = range(model.config.num_layers)
    if written_in_place(memory.keys, row.shape[1]):
        return write_layers(model, memory, fresh, prefix, layers, done, row)

    def chosen(row: jax.Array, done: jax.Array, *fresh: jax.Array) -> tuple[jax.Array, ...]:
        rows = (jnp.take_along_axis(each, row[None, :, None, :, None], axis=3, mode="clip") for each in fresh)
        return done.reshape(-1)[:1], *rows

    # Otherwise XLA chooses all layers' rows anew for every layer that it writes, and compiles that six times as long.
    done, *keys_values = without_recompute(chosen, row, done, *fresh)
    return write_layers(model, memory, keys_values, prefix, layers, done)


def write_layers(
    model: Transformer,
    memory: Memory,
    fresh: tuple[Any, Any],
    start: jax.Array,
    layers: range,
    done: jax.Array,
    row: jax.Array | None = None,
) -> Memory:
    """Write P rows of what `run_rows` returned for `layers` at consecutive positions from `start` [B] on, or NOWHERE.

    start + P must not pass the cache's end. `done` is any array that is known only after memory has been read. All rows
    are written; where memory is written in place, `row` [B, P] may choose some.
    """
    at = ordered_after(start, done)
    rows = jax.tree.leaves(fresh)[0].shape[-2] if row is None else row.shape[1]
    if written_in_place(memory.keys, rows):
        here = slice(layers.start, layers.stop)
        old, kinds = (memory.keys[here], memory.values[here]), model.kinds.rows[here]
        pairs = zip(memory[:2], write_in_place(*old, fresh, row, at, kinds), strict=True)
        keys, values = ((*each[: here.start], *new, *each[here.stop :]) for each, new in pairs)
        return memory._replace(keys=keys, values=values)

    keys, values = memory.keys, memory.values
    for i, own_keys, own_values in zip(layers, *fresh, strict=True):
        keys, values = _write(model, keys, own_keys, at, i), _write(model, values, own_values, at, i)
    return memory._replace(keys=keys, values=values)


def run_layer(
    layer: DecoderLayer,
    x: jax.Array,
    masks: MasksAndRotation,
    memory: list[tuple[Any, Any]],
    used: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run one layer over the rows of each sequence, [B, R, D], and return (x, keys, values) of the rows.

    `memory` holds keys and values [B, G, S, d], or a few_rows.OneOf, of the committed prefix and, where there is one,
    of the lattice. It is only read: writing first and attending to the result makes XLA copy the whole cache in every
    step. A layer that is not `used` is skipped.
    """
    graph, weights = nnx.split(layer)

    def run() -> tuple[jax.Array, jax.Array, jax.Array]:
        return _layer_rows(graph, weights, x, masks, memory)

    def skip() -> tuple[jax.Array, jax.Array, jax.Array]:
        batch, groups, _, head_dim = memory[0][0].shape
        nothing = jnp.zeros((batch, groups, x.shape[1], head_dim), x.dtype)
        return x, nothing, nothing

    return run() if used is None else jax.lax.cond(used, run, skip)


# Jitted so that a model is traced once per shape of its layers and not once per layer; XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=0)
def _layer_rows(
    graph: Any, weights: Any, x: jax.Array, masks: MasksAndRotation, memory: list[tuple[Any, Any]]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    layer = nnx.merge(graph, weights)
    queries, keys, values = layer.project(x, masks.rotation)
    sources = [KeyValues(*each, mask) for each, mask in zip(memory, (masks.committed, masks.lattice), strict=False)]
    sources.append(KeyValues(keys, values, masks.among))
    attended = attend(queries, sources, layer.config.attention_cap)
    return layer.finish(x, attended), keys, values
