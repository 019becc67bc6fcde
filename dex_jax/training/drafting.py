"""Training an exit at depth 0 as a drafter: several tokens ahead, on its own outputs.

A drafter proposes a token, then the next one from what it made of the first, and so on, before any layer of the model
has run. At draft step s the position before is known by the features of draft step s - 1 there, the true final state
only at step 1; the tokens in between are right, as those that matter are. (The idea of training on several steps of
one's own outputs: EAGLE-3, arXiv 2503.01840, section 3.1.)

Letters: B rows, n steps of a chunk, H steps of history, S draft steps, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax.nn.exits import ExitHeads
from dex_jax.training.stream import Activations


def read_drafts(
    heads: ExitHeads, batch: Activations, normed: jax.Array, draft_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Features of every draft step at every step of a chunk that has at least one step of history.

    `normed` [B, H + n, D] is batch.final after the final norm.

    Returns:
      (features [S, B, n, D + 1], valid [S, B, n] bool: whether the item and the chunk reach back far enough).
    """
    _, rows, steps, width = batch.states.shape
    position = batch.position[:, -steps:]
    state = batch.states[0].reshape(1, rows * steps, width)
    previous = jnp.where((position <= 0)[..., None], 0, normed[:, -steps - 1 : -1])
    found, valid = [], []
    for step in range(1, draft_steps + 1):
        features = heads.features(state, previous.reshape(state.shape), None)
        found.append(features.reshape(rows, steps, width + 1))
        valid.append((position >= step - 1) & (jnp.arange(steps)[None] >= step - 1))
        own = found[-1][..., :-1]
        previous = jnp.concatenate([jnp.zeros_like(own[:, :1]), own[:, :-1]], axis=1)
    return jnp.stack(found), jnp.stack(valid)
