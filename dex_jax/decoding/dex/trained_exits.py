"""Trained exit heads as the loop's callables, and their memory of the committed prefix.

Letters: B sequences, W rows a stage, K stages, R rows of a prefill chunk, D width, V' draft vocabulary, G heads and
d head width there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import ExitsConfig
from dex_jax.decoding.dex.interface import Chunk, Drafter, DraftRows, Exits, StageView, before_nodes, before_rows
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn import few_rows
from dex_jax.nn.attention import KeyValues, capped
from dex_jax.nn.exits import Context, ContextMemory, ExitHeads, exit_graph, heads_of
from dex_jax.nn.layers import linear
from dex_jax.nn.no_copies import ordered_after
from dex_jax.nn.packed import Packed
from dex_jax.nn.transformer import Transformer

EMPTY_ENTRY = -1


class ExitArrays(NamedTuple):
    """The arrays of trained exits that the compiled programs take beside the model."""

    # of ExitHeads at depths x_1 .. x_{K-1} in the model's dtype; a drafter's in its `few_rows.kept_dtype`, or packed
    parameters: Any
    vocabulary: jax.Array | None  # as in Exits; None for the full vocabulary
    columns: jax.Array | None  # as in Exits; None for the full vocabulary
    # [V', D], rows of the draft vocabulary, packed as the model's or in the `kept_dtype`; None for the full vocabulary
    unembed: jax.Array | Packed | None


class Heads(NamedTuple):
    """All trained heads of a generation, None where there are none."""

    exits: ExitArrays | None = None  # of the exits 1..K-1
    drafter: Any = None  # of exit 0, as its ExitZero takes them


class ExitMemory(NamedTuple):
    """The memory that exits keep of the committed prefix."""

    previous: jax.Array  # [B, D], what the final norm gave at the last committed position; zeros when there is none
    context: ContextMemory | None  # of the context layer; None unless the kind is "attn"


def exit_arrays(
    model: Transformer,
    config: ExitsConfig,
    parameters: Mapping[str, np.ndarray | Packed],
    vocabulary: np.ndarray | None,
) -> ExitArrays:
    """Build the arrays that compiled programs take for trained exits or a trained drafter.

    Args:
      model: gives the dtype and the unembedding.
      config: of the heads, which have the model's width.
      parameters: of the heads (`nn.exits.select_exits`).
      vocabulary: ids of the draft vocabulary's tokens, None for the full one.
    """
    kept = few_rows.kept_dtype(model.dtype)
    # Heads at several depths are stacked, and C++ would need copies of them.
    heads = heads_of(config, parameters, kept if config.is_drafter else model.dtype)
    if vocabulary is None:
        return ExitArrays(nnx.state(heads), None, None, None)
    size = len(vocabulary)
    columns = np.full(model.config.vocab_size, size, np.int32)
    columns[vocabulary] = np.arange(size)
    draft, columns = jax.device_put((np.asarray(vocabulary, np.int32), columns))
    return ExitArrays(nnx.state(heads), draft, columns, _rows(model.vocabulary_kernel, vocabulary, kept))


@functools.partial(jax.jit, static_argnums=2)
def _rows(kernel: jax.Array | Packed, index: jax.Array | np.ndarray, dtype: jnp.dtype) -> jax.Array | Packed:
    # Under jit, as a mesh over several hosts wants it.
    return kernel[index] if isinstance(kernel, Packed) else kernel[index].astype(dtype)


@dataclasses.dataclass(frozen=True)
class TrainedHeads:
    """The ExitZero of trained exits or of a trained drafter."""

    config: ExitsConfig
    reads: ClassVar[tuple[int, ...]] = ()
    reads_tokens_only: ClassVar[bool] = False

    def empty(self, batch: int, length: int, dtype: jnp.dtype) -> ExitMemory | tuple[()]:
        """Return the memory before any position is committed; () for heads that need none."""
        config = self.config
        if not config.needs_previous:
            return ()
        context = None
        if config.kind == "attn":
            leaf = (batch, config.heads, config.window, config.head_dim)
            position = jnp.full((batch, config.window), EMPTY_ENTRY, jnp.int32)
            context = ContextMemory(jnp.zeros(leaf, dtype), jnp.zeros(leaf, dtype), position)
        return ExitMemory(jnp.zeros((batch, config.width), dtype), context)

    def extend(self, model: Transformer, arrays: ExitArrays, memory: ExitMemory, chunk: Chunk) -> ExitMemory:
        """Return the memory after a chunk; its `previous` belongs to the last token so far of each sequence."""
        return extend_features(model, self.config, arrays, memory, chunk._replace(hidden=model.normed(chunk.hidden)))

    def drafter(self, model: Transformer, arrays: ExitArrays) -> Drafter:
        """Return a drafter; it reads final features of the position before, an exit's estimate of them, or its own."""
        logits, rest = shared_columns(model, arrays)
        width = self.config.width

        def blank(batch: int, rows: int) -> jax.Array:
            return jnp.zeros((batch, rows, width), model.dtype)

        def features(memory: Any, states: jax.Array, below: DraftRows) -> tuple[jax.Array, jax.Array]:
            batch, rows = below.token.shape
            flat = (1, batch * rows, width)
            both = model.embed_tokens(jnp.maximum(below.token, 0)), before_rows(states, below)
            # Products in C++ skip rows of zeros, and most levels have fewer rows than there is room for.
            there = (below.token != NO_TOKEN)[..., None]
            embedded, before = (jnp.where(there, each, 0).reshape(flat) for each in both)
            found = exit_heads(self.config, arrays).features(embedded, before, None)
            found = found.reshape(batch, rows, -1)
            return found, found[..., :-1]

        return Drafter(lambda memory: memory.exits.previous, None, blank, features, logits, arrays.vocabulary, rest)


def extend_features(
    model: Transformer, config: ExitsConfig, arrays: ExitArrays, memory: ExitMemory, chunk: Chunk
) -> ExitMemory:
    """Run `TrainedHeads.extend` on a chunk with `hidden` [B, R, D] after the final norm."""
    tokens, features, start, lengths = chunk
    size = tokens.shape[1]
    start = jnp.broadcast_to(start, tokens.shape[:1])
    ends = jnp.minimum(lengths, start + size)  # positions before it are committed
    here = ends > start
    last = jnp.take_along_axis(features, jnp.maximum(ends - start - 1, 0)[:, None, None], axis=1)[:, 0]
    context = memory.context
    if context is not None:
        before = jnp.concatenate([memory.previous[:, None], features[:, :-1]], axis=1)
        layer = exit_heads(config, arrays).context
        assert layer is not None
        entered = layer.enter_rows(model.embed_tokens(jnp.maximum(tokens, 0)), before)
        positions = start[:, None] + jnp.arange(size)[None, :]
        keys, values = layer.keys_values(entered, positions)
        kept = (positions < ends[:, None]) & (positions >= ends[:, None] - config.window)
        context = _write_context(context, keys, values, positions, kept, features)
    return ExitMemory(jnp.where(here[:, None], last, memory.previous), context)


def _write_context(
    context: ContextMemory, keys: jax.Array, values: jax.Array, position: jax.Array, kept: jax.Array, done: jax.Array
) -> ContextMemory:
    """Write the `kept` [B, n] rows at `position` [B, n] into the context's ring, no two of them to one entry.

    keys and values are [B, G, n, d]; `done` is any array that is known only after `context` has been read.
    """
    window = context.position.shape[1]
    at = ordered_after(jnp.where(kept, position % window, window), done)
    sequence = jnp.arange(position.shape[0])[:, None]

    def write(entries: jax.Array, rows: jax.Array) -> jax.Array:
        return entries.at[sequence, :, at].set(jnp.swapaxes(rows, 1, 2), mode="drop")

    written = context.position.at[sequence, at].set(position, mode="drop")
    return ContextMemory(write(context.keys, keys), write(context.values, values), written)


def trained_exits(model: Transformer, config: ExitsConfig, arrays: ExitArrays) -> Exits:
    """Build the loop's callables; Memory.exits is an ExitMemory if the exits read the position before."""
    heads = exit_heads(config, arrays)

    def features(memory: Any, hidden: jax.Array, view: StageView) -> jax.Array:
        states, token, position = hidden[:-1], view.token[:-1], view.position[:-1]
        if not config.needs_previous:
            return row_features(model, heads, states, token, position)
        by_node = node_features(model, config, arrays, hidden)
        previous = before_nodes(by_node, memory.exits.previous, view.parent[:-1], view.ring)
        return row_features(model, heads, states, token, position, previous, by_node[:-1], memory.exits.context)

    logits, rest = shared_columns(model, arrays)
    return Exits(features, logits, arrays.vocabulary, arrays.columns, rest)


def shared_columns(
    model: Transformer, arrays: ExitArrays
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array] | None]:
    """Return functions that all exits share, of features [N, D + 1]: -> logits [N, V'], and `Exits.rest` or None."""

    def logits(features: jax.Array) -> jax.Array:
        own = features[:, :-1]
        if arrays.unembed is None:
            return model.unembedding(own)
        return capped(linear(own, arrays.unembed, out_dtype=jnp.float32), model.config.logit_cap)

    return logits, None if arrays.vocabulary is None else lambda features: features[:, -1].astype(jnp.float32)


def node_features(
    model: Transformer, config: ExitsConfig | None, arrays: ExitArrays | None, hidden: jax.Array
) -> jax.Array:
    """Return final features for the nodes of the last stage, and the exits' estimates of them for all others.

    `hidden` and the result are [K, B, W, D]; config and arrays are of the exits 1..K-1, None for the model's own.
    """
    if config is None or arrays is None:
        return model.normed(hidden)
    estimates = base_features(exit_heads(config, arrays), hidden[:-1])
    return jnp.concatenate([estimates, model.normed(hidden[-1:])])


def base_features(heads: ExitHeads, states: jax.Array) -> jax.Array:
    """Run `ExitHeads.base` on nodes: [X, B, W, D] -> [X, B, W, D]."""
    return heads.base(states.reshape(states.shape[0], -1, states.shape[-1])).reshape(states.shape)


def row_features(
    model: Transformer,
    heads: ExitHeads,
    states: jax.Array,
    token: jax.Array,
    position: jax.Array,
    previous: jax.Array | None = None,
    base: jax.Array | None = None,
    context: ContextMemory | None = None,
) -> jax.Array:
    """Compute the features of X exits for nodes that have just reached them: [X, B, W, D] -> [X, B, W, D + 1].

    `previous` [X, B, W, D] comes from `before_nodes`, None without `needs_previous`; `base` [X, B, W, D] from
    `base_features`, where it is known; `context` is None unless the kind is "attn".
    """
    count, batch, rows, width = states.shape

    def flat(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x.reshape(count, batch * rows, width)

    def by_sequence(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(batch, count * rows, *x.shape[3:])

    read = None
    if heads.context is not None:
        assert context is not None
        assert previous is not None
        read = context_rows(model, heads.context, context, *map(by_sequence, (previous, token, position)))
        read = jnp.swapaxes(read.reshape(batch, count, rows, width), 0, 1)
    features = heads.features(states.reshape(count, batch * rows, width), flat(previous), flat(read), flat(base))
    return features.reshape(count, batch, rows, width + 1)


def context_rows(
    model: Transformer,
    layer: Context,
    memory: ContextMemory,
    previous: jax.Array,
    token: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """Run the context layer on rows that see the committed window and themselves, not one another: [B, n, D].

    `previous` [B, n, D] are the features of the position before; token and position are [B, n] int32.
    """
    batch, count = token.shape
    entered = layer.enter_rows(model.embed_tokens(jnp.maximum(token, 0)), previous)
    entries = memory.position[:, None, :]
    visible = (entries != EMPTY_ENTRY) & (position[:, :, None] - entries <= layer.config.window)
    among = jnp.broadcast_to(jnp.eye(count, dtype=bool)[None], (batch, count, count))
    return layer.output(entered, position, KeyValues(memory.keys, memory.values, visible), among)


def exit_heads(config: ExitsConfig, arrays: ExitArrays) -> ExitHeads:
    """Build the exit heads from the compiled programs' arrays."""
    return nnx.merge(exit_graph(config), arrays.parameters)
