"""Teacher forcing: which exit would first give each token of a text, without running the lattice.

With rows that never prune, the loop's `exits` and ticks equal these counts exactly; with fewer rows they are never
smaller (README, "What is tested").

Letters: N tokens, K stages, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.decoding.heads import mask_columns
from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.network import depth_states, shared_exits
from dex_jax.decoding.output import ticks_of
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.language_model import LanguageModel, merge_model
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn.transformer import Layout
from dex_jax.sampling import Sampling, choose, position_noise


def forced_exits(
    lm: LanguageModel, prompt: list[int], tokens: list[int], schedule: Schedule, sampling: Sampling | None = None
) -> np.ndarray:
    """The exit that first gives each emitted token, teacher-forced, in the order and with the masks of DECS.

    Args:
      lm: the model.
      prompt: token ids.
      tokens: the N tokens emitted after it.
      schedule: depths and DECS.
      sampling: keys of one sequence; None for greedy.

    Returns:
      [N] int32 as Stats.exits: -1 for token 0, then 1..K.
    """
    exits = np.full(len(tokens), PREFILL_EXIT, np.int32)
    if len(tokens) < 2:
        return exits
    ids = np.zeros(-(-(len(prompt) + len(tokens)) // 64) * 64, np.int32)
    ids[: len(prompt) + len(tokens) - 1] = [*prompt, *tokens[:-1]]
    exits[1:] = schedule.stages
    at = len(prompt) + np.arange(len(tokens) - 1)
    shape = (lm.config, lm.layout, schedule.depths, schedule.decs)
    given = np.asarray(_proposals(*shape, lm.weights, jnp.asarray(ids), jnp.asarray(at), sampling))
    for number in range(schedule.stages - 1, 0, -1):
        exits[1:][given[number - 1] == np.asarray(tokens[1:])] = number
    return exits


def forced_ticks(
    lm: LanguageModel, prompt: list[int], tokens: list[int], schedule: Schedule, sampling: Sampling | None = None
) -> int:
    """Ticks of an unpruned run that emits `tokens` after `prompt`."""
    return ticks_of(forced_exits(lm, prompt, tokens, schedule, sampling), len(tokens), schedule.stages)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _proposals(
    config: ModelConfig,
    layout: Layout,
    depths: tuple[int, ...],
    decs: bool,
    weights: Any,
    ids: jax.Array,
    at: jax.Array,
    sampling: Sampling | None,
) -> jax.Array:
    """What exits 1..K-1 give at positions `at` [N] of `ids`: [K - 1, N] int32, NO_TOKEN where nothing is left."""
    model = merge_model(config, layout, weights)
    exits = shared_exits(model)
    noise = None
    if sampling is not None:
        noise = jax.vmap(position_noise, (None, 0, None))(sampling.keys[0], at + 1, config.vocab_size)
    states = depth_states(model, ids[None], depths)[:-1, :, at]
    features = exits.features(states, None)[:, 0]
    given = jnp.full((len(depths) - 1, at.shape[0]), NO_TOKEN, jnp.int32)
    for k in range(len(depths) - 1):
        logits = exits.logits(features[k])
        allowed = mask_columns(logits, given[:k].T, exits.columns) if decs and k else logits
        token, left = choose(allowed, sampling, noise)
        given = given.at[k].set(jnp.where(left, token, NO_TOKEN))
    return given
