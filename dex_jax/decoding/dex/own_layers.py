"""Drafters with layers of their own, which attend to the committed prefix: EAGLE-3 heads and small models.

Their keys and values of committed positions lie in a cache beside the model's, and those of drafted rows among the
states of the rows. They draft below one head, the root: K = 1.

Letters: B sequences, R rows of a chunk, N rows of a cohort, n rows of a level, l layers, G key-value heads, d head
width, E width of a drafter's features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import EagleConfig, ModelConfig
from dex_jax.decoding.dex.interface import Chunk, Drafter, DraftRows, before_rows
from dex_jax.io.eagle import EagleHead
from dex_jax.lattice import NO_NODE
from dex_jax.nn import cache
from dex_jax.nn.eagle import Eagle, eagle_graph, eagle_of
from dex_jax.nn.forward import Beside, extend_rows, run_rows
from dex_jax.nn.transformer import Transformer
from dex_jax.nn.weights import merge_model


class OwnMemory(NamedTuple):
    """The memory that such a drafter keeps of the committed prefix."""

    caches: cache.Memory
    end: jax.Array  # [B] int32, the number of committed positions
    previous: Any = ()  # [B, E], features of the last of them; () for a model


class Drafted(NamedTuple):
    """The states that such a drafter keeps of the N rows of a cohort."""

    features: jax.Array  # [B, N, E]
    keys: jax.Array  # [B, N, l, G, d]
    values: jax.Array
    position: jax.Array  # [B, N] int32
    path: jax.Array  # [B, N, N] bool, the rows that each descends from


@dataclasses.dataclass(frozen=True)
class EagleDrafter:
    """The ExitZero of an EAGLE-3 head (decoding/dex/interface.py)."""

    config: EagleConfig
    reads_tokens_only: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[int, ...]:
        return self.config.reads

    def empty(self, batch: int, length: int, dtype: jnp.dtype) -> OwnMemory:
        empty = _empty(self.config.layer, batch, length, dtype)
        return empty._replace(previous=jnp.zeros((batch, self.config.layer.width), dtype))

    def extend(self, model: Transformer, arrays: OwnArrays, memory: OwnMemory, chunk: Chunk) -> OwnMemory:
        head = nnx.merge(eagle_graph(self.config), arrays.parameters)
        joined = head.joined(chunk.hidden[..., model.config.width :])
        before = jnp.concatenate([memory.previous[:, None], joined[:, :-1]], axis=1)
        x = jnp.concatenate([_embedded(model, head, chunk.tokens), before], axis=-1)
        read = _extended(head, memory, x, chunk, first_seen=1)  # before the first token there are no features
        at = jnp.maximum(read.end - chunk.start - 1, 0)[:, None, None]
        last, here = jnp.take_along_axis(joined, at, axis=1)[:, 0], (read.end > memory.end)[:, None]
        return read._replace(previous=jnp.where(here, last, memory.previous))

    def drafter(self, model: Transformer, arrays: OwnArrays) -> Drafter:
        head = nnx.merge(eagle_graph(self.config), arrays.parameters)

        def rows(states: Drafted, below: DraftRows) -> jax.Array:
            return jnp.concatenate([_embedded(model, head, below.token), before_rows(states.features, below)], axis=-1)

        def given(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            normed = head.normed(hidden)
            return normed, normed if self.config.norm_output else hidden

        return _drafter(head, model.dtype, rows, given, head.logits, arrays.vocabulary, self.config.layer.width, 1)


@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """The ExitZero of a small model (decoding/dex/interface.py)."""

    config: ModelConfig
    dtype: jnp.dtype  # its own
    vocab_size: int  # of the model that it drafts for
    reads: ClassVar[tuple[int, ...]] = ()
    reads_tokens_only: ClassVar[bool] = True

    def empty(self, batch: int, length: int, dtype: jnp.dtype) -> OwnMemory:
        return _empty(self.config, batch, length, self.dtype)

    def extend(self, model: Transformer, arrays: OwnArrays, memory: OwnMemory, chunk: Chunk) -> OwnMemory:
        small = merge_model(self.config, arrays.parameters)
        return _extended(small, memory, _known(small, chunk.tokens), chunk)

    def drafter(self, model: Transformer, arrays: OwnArrays) -> Drafter:
        small = merge_model(self.config, arrays.parameters)
        known = min(self.vocab_size, self.config.vocab_size)
        vocabulary = None if known == self.vocab_size else jnp.arange(known, dtype=jnp.int32)

        def given(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            return small.normed(hidden), hidden[..., :0]

        def logits(normed: jax.Array) -> jax.Array:
            return small.unembedding(normed)[:, :known]

        def rows(states: Drafted, below: DraftRows) -> jax.Array:
            return _known(small, below.token)

        return _drafter(small, small.dtype, rows, given, logits, vocabulary, 0, 0)


class OwnArrays(NamedTuple):
    """The arrays of such a drafter that the compiled programs take beside the model."""

    parameters: Any
    vocabulary: jax.Array | None = None  # [V'] int32, as in Drafter


def eagle_arrays(head: EagleHead, dtype: jnp.dtype) -> OwnArrays:
    """Build the arrays of an EAGLE-3 head for compiled programs, in `dtype`."""
    vocabulary = None if head.vocabulary is None else jax.device_put(head.vocabulary.astype(np.int32))
    return OwnArrays(nnx.state(eagle_of(head.config, head.parameters, dtype)), vocabulary)


def _empty(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> OwnMemory:
    caches = cache.shapes(config, batch, length, 0, dtype, rings=True)
    caches = caches._replace(lattice_keys=(), lattice_values=())
    return OwnMemory(jax.tree.map(jnp.zeros_like, caches), jnp.zeros(batch, jnp.int32))


def _extended(model: Any, memory: OwnMemory, x: jax.Array, chunk: Chunk, first_seen: int = 0) -> OwnMemory:
    """Return the memory after a chunk, except `previous`; `x` [B, R, ...] is what the first layer reads."""
    start = jnp.broadcast_to(chunk.start, chunk.lengths.shape)
    _, caches = extend_rows(model, memory.caches, x, start, chunk.lengths, first_seen)
    ends = jnp.minimum(chunk.lengths, start + x.shape[1])
    return memory._replace(caches=caches, end=jnp.where(ends > start, ends, memory.end))


def _embedded(model: Transformer, head: Eagle, tokens: jax.Array) -> jax.Array:
    tokens = jnp.maximum(tokens, 0)
    if head.embed is None:
        return model.embed_tokens(tokens)
    return jnp.take(head.embed[...], tokens, axis=0).astype(model.dtype)


def _known(small: Transformer, tokens: jax.Array) -> jax.Array:
    """Embed tokens by a small model, which may have fewer ids than the model that it drafts for."""
    return small.embed_tokens(jnp.clip(tokens, 0, small.config.vocab_size - 1))


def _drafter(
    model: Any,
    dtype: jnp.dtype,
    rows: Callable[[Drafted, DraftRows], jax.Array],
    given: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    logits: Callable[[jax.Array], jax.Array],
    vocabulary: jax.Array | None,
    width: int,
    first_seen: int,
) -> Drafter:
    """Build the loop's callables of a `model` with config, kinds and layers, as nn/forward.py takes it.

    `rows` gives the input of its first layer; `given` turns its last states [B, n, ...] into (the input of `logits`,
    features [B, n, E]).
    """
    c = model.config

    def blank(batch: int, count: int) -> Drafted:
        keys = jnp.zeros((batch, count, c.num_layers, c.num_kv_heads, c.head_dim), dtype)
        position, path = jnp.zeros((batch, count), jnp.int32), jnp.zeros((batch, count, count), bool)
        return Drafted(jnp.zeros((batch, count, width), dtype), keys, keys, position, path)

    def features(memory: Any, states: Drafted, below: DraftRows) -> tuple[jax.Array, Drafted]:
        own: OwnMemory = memory.exits
        parent = jnp.maximum(below.parent, 0)
        above = jnp.take_along_axis(states.path, parent[:, :, None], axis=1)
        path = above | (parent[:, :, None] == jnp.arange(states.path.shape[2])[None, None])
        path &= (below.parent != NO_NODE)[:, :, None]
        keys, values = (jnp.moveaxis(x, (2, 3), (0, 2)) for x in (states.keys, states.values))
        batch, count = below.token.shape
        # Rows of one level are no ancestors of each other.
        among = jnp.broadcast_to(jnp.eye(count, dtype=bool)[None], (batch, count, count))
        beside = Beside(tuple(keys), tuple(values), path, states.position)
        about = (below.position, among, own.end, range(c.num_layers))
        hidden, fresh = run_rows(model, own.caches, rows(states, below), *about, beside=beside, first_seen=first_seen)
        found, passed = given(hidden)
        keys, values = (jnp.moveaxis(jnp.stack(x), (0, 2), (2, 3)) for x in fresh)
        return found, Drafted(passed, keys, values, below.position, path)

    def committed(memory: Any) -> jax.Array:
        own: OwnMemory = memory.exits
        return jnp.zeros((own.end.shape[0], 0), dtype) if isinstance(own.previous, tuple) else own.previous

    return Drafter(committed, None, blank, features, logits, vocabulary)
