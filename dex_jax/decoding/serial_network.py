"""The transformer and its drafter as the callables of serial rounds.

Letters: B sequences, N rows of a tree, w rows of a level, D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dex_jax.config import ExitsConfig
from dex_jax.decoding.network import commit_rows, run_tree
from dex_jax.decoding.serial import Confirmed, Drafter, TreeNetwork
from dex_jax.decoding.trained_exits import ExitArrays, ExitMemory, exit_heads, read_chunk, shared_columns
from dex_jax.lattice import NO_NODE
from dex_jax.nn.transformer import Transformer


def tree_network(model: Transformer, config: ExitsConfig | None, arrays: ExitArrays | None) -> TreeNetwork:
    """The callables of `model`.

    Args:
      model: any layout.
      config, arrays: of a drafter, see ExitsConfig.is_drafter; None for none.
    """

    def run(memory: Any, token: Any, position: Any, ancestors: Any, prefix: Any) -> Any:
        return run_tree(model, memory, token, position, ancestors, prefix)

    def commit(memory: Any, fresh: Any, path: Confirmed) -> Any:
        memory = commit_rows(model, memory, fresh, path.row, path.prefix, path.hidden)
        return memory._replace(exits=commit_drafts(model, config, arrays, memory.exits, path))

    drafter = None if config is None or arrays is None else tree_drafter(model, config, arrays)
    return TreeNetwork(model.config.vocab_size, run, commit, model.logits, drafter)


def commit_drafts(
    model: Transformer, config: ExitsConfig | None, arrays: ExitArrays | None, memory: Any, path: Confirmed
) -> Any:
    """What a drafter remembers of the prefix, `memory.exits`, with the rows of a path; as it is without a drafter."""
    if config is None or arrays is None:
        return memory
    ends = path.prefix + path.length
    return read_chunk(model, config, arrays, memory, path.token, path.hidden, path.prefix, ends)


def tree_drafter(model: Transformer, config: ExitsConfig, arrays: ExitArrays) -> Drafter:
    """The callables of a drafter alone, arguments as of `tree_network`.

    Its drafts are [B, rows, D], estimates of what the final norm would give at each row.
    """
    dtype = model.embed[...].dtype
    logits, rest = shared_columns(model, arrays)

    def run(memory: Any, of_parent: jax.Array, token: Any, position: Any, parent: Any) -> Any:
        del position
        return draft_rows(model, config, arrays, memory.exits, of_parent, token, parent)

    return Drafter(
        begin=lambda batch, rows: jnp.zeros((batch, rows, config.width), dtype),
        run=run,
        logits=logits,
        rest=rest,
        vocabulary=arrays.vocabulary,
    )


def draft_rows(
    model: Transformer,
    config: ExitsConfig,
    arrays: ExitArrays,
    memory: ExitMemory,
    of_parent: jax.Array,
    token: jax.Array,
    parent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs some rows of one level: each reads its token and what the drafter made of its parent.

    Args:
      model, config, arrays: what runs; the one exit is a drafter, see ExitsConfig.is_drafter.
      memory: of the committed prefix; the root's parent is the last position of it.
      of_parent: [B, w, D], what this gave for their parents.
      token: [B, w] int32.
      parent: [B, w] int32 rows of the tree, NO_NODE for the root.

    Returns:
      (features [B, w, D + 1] with the rest logit last, [B, w, D] for the rows below).
    """
    batch, width = token.shape
    previous = jnp.where((parent == NO_NODE)[:, :, None], memory.previous[:, None], of_parent)
    state = model.embed_tokens(jnp.maximum(token, 0))
    flat = (1, batch * width, config.width)
    features = exit_heads(config, arrays).features(state.reshape(flat), previous.reshape(flat), None)
    features = features.reshape(batch, width, -1)
    return features, features[..., :-1].astype(of_parent.dtype)
