"""The drafter: an exit at depth 0 that goes on from its own outputs, row by row of a token tree.

Letters: B sequences, N rows of a tree, w rows of a level, H heads of the context layer, d head width, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.config import ExitsConfig
from dex_jax.decoding.trained_exits import ExitArrays, ExitMemory, exit_heads, in_window
from dex_jax.lattice import NO_NODE
from dex_jax.nn.layers import KeyValues
from dex_jax.nn.transformer import Transformer


class Drafts(NamedTuple):
    """What the drafter has made of the rows of a tree so far.

    Attributes:
      keys, values: of its context layer, [B, H, N, d].
      features: [B, N, D], its estimates of what the final norm would give.
    """

    keys: jax.Array
    values: jax.Array
    features: jax.Array


def no_drafts(config: ExitsConfig, batch: int, rows: int, dtype: jnp.dtype) -> Drafts:
    """Before any row."""
    leaf = jnp.zeros((batch, config.heads, rows, config.head_dim), dtype)
    return Drafts(leaf, leaf, jnp.zeros((batch, rows, config.width), dtype))


def draft_rows(
    model: Transformer,
    config: ExitsConfig,
    arrays: ExitArrays,
    memory: ExitMemory,
    drafts: Drafts,
    first: int,
    token: jax.Array,
    position: jax.Array,
    parent: jax.Array,
    ancestors: jax.Array,
) -> tuple[jax.Array, Drafts]:
    """Runs the rows of one level.

    Args:
      model, config, arrays: what runs; the one exit is of kind "attn" at depth 0.
      memory: of the committed prefix.
      drafts: of the levels before.
      first: row of the level's first.
      token, position: [B, w] int32.
      parent: [B, w] int32 rows of the tree, NO_NODE for the root.
      ancestors: [B, w, N] bool, each row's ancestors and itself.

    Returns:
      (features [B, w, D + 1] with the rest logit last, drafts with these rows).
    """
    heads = exit_heads(config, arrays)
    layer = heads.context
    assert layer is not None
    assert memory.context is not None
    batch, width = token.shape
    of_parent = jnp.take_along_axis(drafts.features, jnp.maximum(parent, 0)[:, :, None], axis=1)
    previous = jnp.where((parent == NO_NODE)[:, :, None], memory.previous[:, None], of_parent)
    embedded = model.embed_tokens(jnp.maximum(token, 0))
    entered = layer.enter_rows(embedded, previous)

    committed = in_window(memory.context, position, config.window)
    itself = jnp.eye(width, dtype=bool)[None]
    own = jnp.pad(itself, [(0, 0), (0, 0), (first, ancestors.shape[2] - first - width)])
    before = KeyValues(
        jnp.concatenate([memory.context.keys, drafts.keys], axis=2),
        jnp.concatenate([memory.context.values, drafts.values], axis=2),
        jnp.concatenate([committed, ancestors & ~own], axis=2),
    )
    context, keys, values = layer.read(entered, position, before, jnp.broadcast_to(itself, (batch, width, width)))
    flat = (1, batch * width, embedded.shape[-1])
    features = heads.features(embedded.reshape(flat), previous.reshape(flat), context.reshape(flat))
    features = features.reshape(batch, width, -1)
    place = slice(first, first + width)
    return features, Drafts(
        drafts.keys.at[:, :, place].set(keys),
        drafts.values.at[:, :, place].set(values),
        drafts.features.at[:, place].set(features[..., :-1]),
    )
