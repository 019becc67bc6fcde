"""The loop under a caller's own jit, with a model that is not ours (reference/gpt2_like.py)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gpt2_like

from dex_jax import Limits, Record, Sampling, init, step
from dex_jax.sampling import position_noise, sampling_keys

DEPTHS = (1, 3, 6)
ROWS = 2
TOKENS = 16
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
LENGTH = 32
SEEDS = [4, 5, 6]
TEMPERATURE = 0.7


def padded() -> tuple[jax.Array, jax.Array]:
    width = max(map(len, PROMPTS))
    return (
        jnp.asarray([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS]),
        jnp.asarray([len(prompt) for prompt in PROMPTS]),
    )


@functools.cache
def autoregressive(sampled: bool) -> list[list[int]]:
    """The model's own loop: all of it run anew for every token."""
    weights = gpt2_like.random_weights(0)
    logits_of = jax.jit(gpt2_like.full_logits)
    everything = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        tokens = list(prompt)
        for _ in range(TOKENS):
            ids = np.zeros((1, LENGTH), np.int32)
            ids[0, : len(tokens)] = tokens
            scores = np.asarray(logits_of(weights, ids))[0, len(tokens) - 1]
            if sampled:
                noise = position_noise(sampling_keys([seed])[0], jnp.int32(len(tokens)), gpt2_like.VOCAB)
                scores = scores / np.float32(TEMPERATURE) + np.asarray(noise)
            tokens.append(int(scores.argmax()))
        everything.append(tokens[len(prompt) :])
    return everything


@jax.jit
def decode(weights: gpt2_like.Weights, first: jax.Array, sampling: Sampling | None) -> Record:
    """init and a while_loop over step, as somebody else would write it."""
    prompts, lengths = padded()
    slots = len(DEPTHS) * ROWS
    network = gpt2_like.network(weights, DEPTHS, LENGTH)
    limits = Limits(jnp.full(len(PROMPTS), TOKENS), jnp.array([-1]))
    cache = gpt2_like.prefill(weights, prompts, LENGTH, slots)
    shape = {"stages": len(DEPTHS), "rows": ROWS, "capacity": TOKENS}
    state = init(network, cache, first, lengths, limits=limits, sampling=sampling, **shape)
    state = jax.lax.while_loop(lambda s: ~jnp.all(s.record.done), lambda s: step(network, s, limits, sampling), state)
    return state.record


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_tokens_equal_the_model_s_own_loop(sampled: bool) -> None:
    expected = autoregressive(sampled)
    sampling = Sampling(sampling_keys(SEEDS), jnp.float32(TEMPERATURE)) if sampled else None
    first = jnp.asarray([tokens[0] for tokens in expected])
    record = jax.tree.map(np.asarray, decode(gpt2_like.random_weights(0), first, sampling))
    assert record.tokens.tolist() == expected
    np.testing.assert_array_equal(record.exits[:, 0], -1)
    np.testing.assert_array_equal(record.ticks, len(DEPTHS) + record.exits[:, 1:-1].sum(axis=1))
    # Early exits are right now and then, so that collapses onto a child are part of this.
    assert set(record.exits[:, 1:].ravel().tolist()) == {1, 2, 3}
