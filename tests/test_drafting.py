"""Drafts in training: every draft step at every position equals a chain of nodes that is run alone, as in decoding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.small_models import random_parameters

from dex_jax.config import ExitsConfig
from dex_jax.nn.exits import ExitHeads, heads_of, initial_heads
from dex_jax.training.distillation import read_drafts
from dex_jax.training.packing import NOTHING, Activations

WIDTH, STEPS, VOCABULARY = 12, 14, 20
DRAFTER = ExitsConfig("mlp", (0,), WIDTH, fused=True, hidden=10, draft_size=VOCABULARY)
"""A fused MLP, which has all that a fused map has, and more."""
ROWS = ((14,), (4, 7, None, 2))
"""Lengths of the texts in each row, one after the other; None is an idle step."""


@functools.cache
def heads() -> ExitHeads:
    return heads_of(DRAFTER, random_parameters(DRAFTER, seed=0, spread=0.5), jnp.float32)


@functools.cache
def embeddings() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


@functools.cache
def chunk() -> tuple[Activations, np.ndarray]:
    """Return two rows of texts, and their final features [B, S, D]."""
    rng = np.random.default_rng(2)
    position = np.full((2, STEPS), NOTHING, np.int32)
    for row, lengths in zip(position, ROWS, strict=True):
        steps = [p for length in lengths for p in ([NOTHING] if length is None else range(length))]
        row[: len(steps)] = steps
    token = np.where(position == NOTHING, NOTHING, rng.integers(0, VOCABULARY, position.shape)).astype(np.int32)
    normed = rng.standard_normal((*position.shape, WIDTH)).astype(np.float32)
    states = embeddings()[np.maximum(token, 0)][None]
    weight = np.ones((2, STEPS), np.float32)
    return Activations(*map(jnp.asarray, (states, normed, states[0], token, position, weight))), normed


def chain(row: int, last: int, drafted: int) -> np.ndarray:
    """Return the last features of a chain of `drafted` nodes that ends at step `last` of a row, the rest committed."""
    batch, normed = chunk()
    token, position = np.array(batch.token[row]), np.array(batch.position[row])
    first = last - drafted + 1
    previous = np.zeros(WIDTH, np.float32) if position[first] == 0 else normed[row, first - 1]
    for step in range(first, last + 1):
        state = jnp.asarray(embeddings()[token[step]])[None, None]
        found = heads().features(state, jnp.asarray(previous)[None, None], None)[0, 0]
        previous = np.array(found[:-1])
    return np.array(found)


def test_an_exit_at_depth_0_starts_without_an_opinion() -> None:
    config = ExitsConfig("attn", (0, 2), WIDTH, hidden=12, heads=2, head_dim=8, window=5)
    heads = initial_heads(config, np.full(WIDTH, 3.0, np.float32))
    states = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, WIDTH)), jnp.float32)
    context = jnp.ones((2, 4, WIDTH))
    features = heads.features(states, states, context)
    assert np.all(np.asarray(features[0, :, :-1]) == 0)
    assert np.abs(features[1, :, :-1]).max() > 1


@pytest.mark.slow
def test_each_draft_step_reads_what_a_chain_of_nodes_reads() -> None:
    batch, normed = chunk()
    found, valid = jax.jit(read_drafts, static_argnums=3)(heads(), batch, normed, 4)
    position = np.array(batch.position)
    compared = 0
    for drafted in range(1, 5):
        for row in range(2):
            for step in range(STEPS):
                reaches = position[row, step] >= drafted - 1
                assert bool(valid[drafted - 1, row, step]) == reaches
                if reaches:
                    want = chain(row, step, drafted)
                    np.testing.assert_allclose(found[drafted - 1, row, step], want, rtol=2e-5, atol=2e-5)
                    compared += 1
    assert compared > 30
