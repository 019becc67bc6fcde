"""A trained exit at depth 0 as the loop's drafter.

Letters: B sequences, n rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dex_jax.config import ExitsConfig
from dex_jax.decoding.dex.interface import Drafter, StageView
from dex_jax.decoding.dex.trained_exits import ExitArrays, exit_heads, shared_columns
from dex_jax.nn.transformer import Transformer


def transformer_drafter(
    model: Transformer,
    config: ExitsConfig,
    arrays: ExitArrays,
    reached: Callable[[Any, jax.Array, StageView], jax.Array] | None,
) -> Drafter:
    """The callables of a drafter, see ExitsConfig.is_drafter; memory has an ExitMemory as `exits`.

    What it reads of a position before is what the final norm gives there, an exit's estimate of that (`reached`, as of
    Drafter), or its own.
    """
    logits, rest = shared_columns(model, arrays)

    def features(before: jax.Array, token: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        del position
        batch, rows = token.shape
        flat = (1, batch * rows, config.width)
        state = model.embed_tokens(jnp.maximum(token, 0))
        found = exit_heads(config, arrays).features(state.reshape(flat), before.reshape(flat), None)
        found = found.reshape(batch, rows, -1)
        return found, found[..., :-1]

    def committed(memory: Any) -> jax.Array:
        return memory.exits.previous

    return Drafter(committed, reached, features, logits, arrays.vocabulary, rest)
