"""Autoregressive decoding: one token a step through all layers.

Letters: B sequences, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.decoding.record import Limits, Record, emit, new_record
from dex_jax.nn.cache import Memory
from dex_jax.nn.forward import extend
from dex_jax.nn.transformer import Transformer
from dex_jax.sampling import Sampling, choose, position_noise


class ARState(NamedTuple):
    """The state that AR carries from step to step."""

    tick: jax.Array  # int32, steps since the start
    token: jax.Array  # [B] int32, the last emitted token, not yet in memory
    prefix: jax.Array  # [B] int32, its position, and the number of committed positions
    memory: Memory  # committed keys and values
    record: Record  # what has been emitted; every token has exit 1, as K = 1


def init(memory: Memory, first_token: jax.Array, position: jax.Array, *, capacity: int, limits: Limits) -> ARState:
    """Return the state after prefill: first_token [B] stands at absolute `position` [B]."""
    return ARState(jnp.int32(0), first_token, position, memory, new_record(first_token, capacity, limits))


def step(model: Transformer, state: ARState, limits: Limits, sampling: Sampling | None) -> ARState:
    """Decode one token for every sequence that is not done."""
    # A sequence that is done is a row of zeros, which costs nothing on CPUs (nn/cpp) while others of its batch go on.
    end = None if len(state.token) == 1 else jnp.where(state.record.done, 0, state.prefix + 1)
    states, memory = extend(model, state.memory, state.token[:, None], state.prefix, end)
    return emitted(state, memory, next_token(model, states[-1][:, 0], state.prefix + 1, sampling), limits)


def emitted(state: ARState, memory: Memory, token: jax.Array, limits: Limits) -> ARState:
    """Return the state after a step that gives each sequence its token [B]; those that are done take none."""
    active = ~state.record.done
    record = emit(state.record, token, jnp.ones_like(token), active, limits)
    return ARState(
        tick=state.tick + 1,
        token=jnp.where(active, token, state.token),
        prefix=state.prefix + active,
        memory=memory,
        record=record,
    )


def next_token(model: Transformer, hidden: jax.Array, position: jax.Array, sampling: Sampling | None) -> jax.Array:
    """Return the token at absolute `position` [B] by the final hidden states [B, D] of the one before: [B] int32."""
    noise = None
    if sampling is not None:
        noise = jax.vmap(position_noise, (0, 0, None))(sampling.keys, position, model.config.vocab_size)
    return choose(model.logits(hidden), sampling, noise)[0]
