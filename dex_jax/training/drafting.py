"""Training an exit at depth 0 as a drafter: several tokens ahead, on its own outputs.

A drafter proposes a token, then the next one from what it made of the first, and so on, before any layer of the model
has run. At draft step s the position before is known by the features of draft step s - 1 there, the true final state
only at step 1; the tokens in between are right, as those that matter are. (The idea of training on several steps of
one's own outputs: EAGLE-3, arXiv 2503.01840, section 3.1.)

Letters: B rows, n steps of a chunk, H steps of history, S draft steps, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dex_jax.nn.exits import Context, ExitHeads
from dex_jax.nn.layers import KeyValues
from dex_jax.training.stream import Activations


def read_drafts(
    heads: ExitHeads, batch: Activations, normed: jax.Array, embed: jax.Array, draft_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Features of every draft step at every step of a chunk.

    Args:
      heads: one exit at depth 0 that reads the position before, in training.
      batch: the chunk, with at least `history_for(heads.config)` steps of history.
      normed: [B, H + n, D], batch.final after the final norm.
      embed: [V, D], token embeddings.
      draft_steps: S.

    Returns:
      (features [S, B, n, D + 1], valid [S, B, n] bool: whether the item and the chunk reach back far enough).
    """
    _, rows, steps, width = batch.states.shape
    where = batch.position[:, 1:]
    position = where[:, -steps:]
    before = jnp.where((where <= 0)[..., None], 0, normed[:, :-1])
    context = None if heads.context is None else _context(heads.context, batch, before, embed)
    state = batch.states[0].reshape(1, rows * steps, width)

    previous = before[:, -steps:]
    found, valid = [], []
    for step in range(1, draft_steps + 1):
        read = None if context is None else context(step, previous).reshape(state.shape)
        features = heads.features(state, previous.reshape(state.shape), read)
        found.append(features.reshape(rows, steps, width + 1))
        valid.append((position >= step - 1) & (jnp.arange(steps)[None] >= step - 1))
        own = found[-1][..., :-1]
        previous = jnp.concatenate([jnp.zeros_like(own[:, :1]), own[:, :-1]], axis=1)
    return jnp.stack(found), jnp.stack(valid)


def _context(
    layer: Context, batch: Activations, before: jax.Array, embed: jax.Array
) -> Callable[[int, jax.Array], jax.Array]:
    """(draft step, previous features [B, n, D]) -> what the layer gives the exit [B, n, D]; steps in order from 1."""
    _, rows, steps, _ = batch.states.shape
    where = batch.position[:, 1:]
    seen = jnp.maximum(where, 0)
    here = batch.states[0]
    position = where[:, -steps:]
    entered = layer.enter_rows(jnp.take(embed, jnp.maximum(batch.token[:, 1:], 0), axis=0), before)
    keys, values = layer.keys_values(entered, seen)
    length = where.shape[1]
    distance = jnp.arange(length - steps, length)[None, :, None] - jnp.arange(length)[None, None, :]
    same_item = (where[:, None, :] >= 0) & (position[:, :, None] - where[:, None, :] == distance)
    itself = jnp.broadcast_to(jnp.eye(steps, dtype=bool)[None], (rows, steps, steps))
    drafted: list[KeyValues] = []

    def read(step: int, previous: jax.Array) -> jax.Array:
        # The position of draft step 1 has the true state before it, as committed ones have.
        committed = same_item & (distance >= max(1, step - 1)) & (distance <= layer.config.window)
        among = [
            source._replace(mask=same_item[:, :, -steps:] & (distance[:, :, -steps:] == step - number))
            for number, source in enumerate(drafted, 2)
        ]
        sources = [KeyValues(keys, values, committed), *among]
        entered = layer.enter_rows(here, previous)
        context, own_keys, own_values = layer.read(entered, seen[:, -steps:], _joined(sources), itself)
        if step > 1:
            drafted.append(KeyValues(own_keys, own_values, itself))
        return context

    return read


def _joined(sources: list[KeyValues]) -> KeyValues:
    keys, values = (jnp.concatenate([source[i] for source in sources], axis=2) for i in range(2))
    return KeyValues(keys, values, jnp.concatenate([source.mask for source in sources], axis=2))
