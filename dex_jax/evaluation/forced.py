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

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.heads import mask_columns
from dex_jax.decoding.interface import Exits
from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.network import depth_states, shared_exits
from dex_jax.decoding.output import ticks_of
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.decoding.trained_exits import ExitArrays, exit_arrays, exit_heads, trained_exits
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel, merge_model
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn.transformer import Layout, Transformer
from dex_jax.sampling import Sampling, choose, position_noise


def forced_exits(
    lm: LanguageModel,
    prompt: list[int],
    tokens: list[int],
    schedule: Schedule,
    sampling: Sampling | None = None,
    exits: TrainedExits | None = None,
) -> np.ndarray:
    """The exit that first gives each emitted token, teacher-forced, in the order and with the masks of DECS.

    An exit that reads the position before sees as much of it as its parent has run by then, which follows from the exit
    that the node itself was born at: the parent of a node born at exit b stands in stage min(K, k + b) when the node
    finishes stage k.

    Args:
      lm: the model.
      prompt: token ids.
      tokens: the N tokens emitted after it.
      schedule: depths and DECS.
      sampling: keys of one sequence; None for greedy.
      exits: trained exits at x_1 .. x_{K-1}; None for the model's own head.

    Returns:
      [N] int32 as Stats.exits: -1 for token 0, then 1..K.

    Raises:
      DexError: exits of kind "attn", which also see which of their other ancestors are committed.
    """
    if exits is not None and exits.config.kind == "attn":
        raise DexError('exits of kind "attn" cannot be teacher-forced exactly: run the lattice instead')
    born = np.full(len(tokens), PREFILL_EXIT, np.int32)
    if len(tokens) < 2:
        return born
    ids = np.zeros(-(-(len(prompt) + len(tokens)) // 64) * 64, np.int32)
    ids[: len(prompt) + len(tokens) - 1] = [*prompt, *tokens[:-1]]
    at = len(prompt) + np.arange(len(tokens) - 1)
    config, heads = None, None
    if exits is not None:
        model = merge_model(lm.config, lm.layout, lm.weights)
        config, heads = exits.config, exit_arrays(model, exits.config, exits.parameters, exits.vocabulary)
    shape = (lm.config, lm.layout, schedule.depths, schedule.decs, config)
    given = np.asarray(_proposals(*shape, lm.weights, heads, jnp.asarray(ids), jnp.asarray(at), sampling))
    here = schedule.stages
    for i, token in enumerate(tokens[1:]):
        right = np.flatnonzero(given[(here - 1) % len(given), :, i] == token)
        here = int(right[0]) + 1 if len(right) else schedule.stages
        born[i + 1] = here
    return born


def forced_ticks(
    lm: LanguageModel,
    prompt: list[int],
    tokens: list[int],
    schedule: Schedule,
    sampling: Sampling | None = None,
    exits: TrainedExits | None = None,
) -> int:
    """Ticks of an unpruned run that emits `tokens` after `prompt`; arguments as `forced_exits`."""
    return ticks_of(forced_exits(lm, prompt, tokens, schedule, sampling, exits), len(tokens), schedule.stages)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _proposals(
    config: ModelConfig,
    layout: Layout,
    depths: tuple[int, ...],
    decs: bool,
    exits_config: ExitsConfig | None,
    weights: Any,
    heads: ExitArrays | None,
    ids: jax.Array,
    at: jax.Array,
    sampling: Sampling | None,
) -> jax.Array:
    """What exits 1..K-1 give at positions `at` [N] of `ids`: [K, K - 1, N] int32, NO_TOKEN where nothing is left.

    The first axis is the exit 1..K that the node at that position was born at; it has length 1 where that is all one.
    """
    model = merge_model(config, layout, weights)
    exits = shared_exits(model)
    noise = None
    if sampling is not None:
        noise = jax.vmap(position_noise, (None, 0, None))(sampling.keys[0], at + 1, config.vocab_size)
    states = depth_states(model, ids[None], depths)[:, 0]
    if exits_config is None or heads is None:
        features = [model.normed(states[:-1, at])]
    else:
        exits = trained_exits(model, exits_config, heads)
        if exits.vocabulary is not None and noise is not None:
            noise = noise[:, exits.vocabulary]
        features = _trained_features(model, exits_config, heads, states, at)
    return jnp.stack([_given(exits, rows, decs, sampling, noise) for rows in features])


def _trained_features(
    model: Transformer, config: ExitsConfig, arrays: ExitArrays, states: jax.Array, at: jax.Array
) -> list[jax.Array]:
    """Features [K - 1, N, D'] for a node born at exit 1, 2, .. K, or one for all."""
    heads = exit_heads(config, arrays)
    stages = states.shape[0]
    if not config.needs_previous:
        return [heads.features(states[:-1, at], None, None)]
    reached = jnp.concatenate([heads.base(states[:-1, at - 1]), model.normed(states[-1:, at - 1])])
    found = []
    for born in range(1, stages + 1):
        parent = jnp.asarray([min(stages, k + born) - 1 for k in range(1, stages)])
        found.append(heads.features(states[:-1, at], reached[parent], None))
    return found


def _given(
    exits: Exits, features: jax.Array, decs: bool, sampling: Sampling | None, noise: jax.Array | None
) -> jax.Array:
    """What each exit proposes after the ones before it: features [K - 1, N, D'] -> [K - 1, N] int32."""
    given = jnp.full(features.shape[:2], NO_TOKEN, jnp.int32)
    for k in range(features.shape[0]):
        logits = exits.logits(features[k])
        allowed = mask_columns(logits, given[:k].T, exits.columns) if decs and k else logits
        column, left = choose(allowed, sampling, noise)
        token = column if exits.vocabulary is None else exits.vocabulary[column]
        given = given.at[k].set(jnp.where(left, token, NO_TOKEN))
    return given
