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
      features: [B, N, D], its estimates of what the final norm would give.
      context: keys and values of its context layer, two of [B, H, N, d]; None unless the kind is "attn".
    """

    features: jax.Array
    context: tuple[jax.Array, jax.Array] | None


def no_drafts(config: ExitsConfig, batch: int, rows: int, dtype: jnp.dtype) -> Drafts:
    """Before any row."""
    leaf = jnp.zeros((batch, config.heads, rows, config.head_dim), dtype)
    return Drafts(jnp.zeros((batch, rows, config.width), dtype), (leaf, leaf) if config.kind == "attn" else None)


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
      model, config, arrays: what runs; the one exit is a drafter, see ExitsConfig.is_drafter.
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
    batch, width = token.shape
    of_parent = jnp.take_along_axis(drafts.features, jnp.maximum(parent, 0)[:, :, None], axis=1)
    previous = jnp.where((parent == NO_NODE)[:, :, None], memory.previous[:, None], of_parent)
    embedded = model.embed_tokens(jnp.maximum(token, 0))
    place = slice(first, first + width)
    flat = (1, batch * width, embedded.shape[-1])

    read, context = None, drafts.context
    if heads.context is not None:
        assert memory.context is not None
        assert context is not None
        committed = in_window(memory.context, position, config.window)
        itself = jnp.eye(width, dtype=bool)[None]
        own = jnp.pad(itself, [(0, 0), (0, 0), (first, ancestors.shape[2] - first - width)])
        before = KeyValues(
            jnp.concatenate([memory.context.keys, context[0]], axis=2),
            jnp.concatenate([memory.context.values, context[1]], axis=2),
            jnp.concatenate([committed, ancestors & ~own], axis=2),
        )
        entered = heads.context.enter_rows(embedded, previous)
        among = jnp.broadcast_to(itself, (batch, width, width))
        read, *made = heads.context.read(entered, position, before, among)
        read = read.reshape(flat)
        keys, values = (old.at[:, :, place].set(new) for old, new in zip(context, made, strict=True))
        context = keys, values
    features = heads.features(embedded.reshape(flat), previous.reshape(flat), read).reshape(batch, width, -1)
    return features, Drafts(drafts.features.at[:, place].set(features[..., :-1]), context)
