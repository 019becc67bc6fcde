"""Drafts in training: every draft step at every position against one chain of nodes at a time, as in decoding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dex_jax.config import ExitsConfig
from dex_jax.nn.exits import ExitHeads, exit_parameters, heads_of, initial_heads
from dex_jax.nn.layers import KeyValues
from dex_jax.training.drafting import read_drafts
from dex_jax.training.items import NO_ITEM
from dex_jax.training.stream import Activations

WIDTH, WINDOW, STEPS, VOCABULARY = 12, 5, 8, 20
ATTN = ExitsConfig("attn", (0,), WIDTH, hidden=10, heads=2, head_dim=8, window=WINDOW, draft_size=VOCABULARY)
KINDS = {"attn": ATTN, "mlp": ExitsConfig("mlp", (0,), WIDTH, fused=True, hidden=10, draft_size=VOCABULARY)}
HISTORY = WINDOW + 1
ROWS = ((14,), (4, 7, None, 2))
"""Lengths of the items in each row, one after the other; None is an idle step."""


@functools.cache
def heads(kind: str) -> ExitHeads:
    rng = np.random.default_rng(0)
    made = {}
    for name, (shape, start) in exit_parameters(KINDS[kind]).items():
        scale = 0.5 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        made[name] = (rng.standard_normal(shape) * scale + (start in ("norm", "scale"))).astype(np.float32)
    return heads_of(KINDS[kind], made, jnp.float32)


@functools.cache
def embeddings() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


@functools.cache
def chunk() -> tuple[Activations, np.ndarray]:
    """(a chunk of two rows, its final features [B, H + n, D])."""
    rng = np.random.default_rng(2)
    position = np.full((2, HISTORY + STEPS), NO_ITEM, np.int32)
    for row, lengths in zip(position, ROWS, strict=True):
        steps = [p for length in lengths for p in ([NO_ITEM] if length is None else range(length))]
        row[: len(steps)] = steps
    token = np.where(position == NO_ITEM, NO_ITEM, rng.integers(0, VOCABULARY, position.shape)).astype(np.int32)
    normed = rng.standard_normal((*position.shape, WIDTH)).astype(np.float32)
    states = embeddings()[np.maximum(token[:, -STEPS:], 0)][None]
    weight = np.ones((2, STEPS), np.float32)
    return Activations(*map(jnp.asarray, (states, normed, token, position, weight))), normed


def chain(kind: str, row: int, last: int, drafted: int) -> np.ndarray:
    """Features of the last of `drafted` nodes, the last one at step `last` of a row and all before them committed."""
    batch, normed = chunk()
    token, position = np.array(batch.token[row]), np.array(batch.position[row])
    start = last - position[last]  # the step at which its item begins

    def before(step: int) -> np.ndarray:
        return np.zeros(WIDTH, np.float32) if step == start else normed[row, step - 1]

    def keys_values(step: int, previous: np.ndarray):
        layer = heads(kind).context
        entered = layer.enter_rows(embeddings()[token[step]][None, None], jnp.asarray(previous)[None, None])
        return entered, layer.keys_values(entered, jnp.asarray([[position[step]]]))

    def context(step: int, previous: np.ndarray) -> np.ndarray:
        visible = [seen[s] for s in sorted(seen) if step - s <= WINDOW]
        entered, own = keys_values(step, previous)
        source = None
        if visible:
            keys, values = (jnp.concatenate([pair[i] for pair in visible], axis=2) for i in range(2))
            source = KeyValues(keys, values, jnp.ones((1, 1, len(visible)), bool))
        itself = jnp.ones((1, 1, 1), bool)
        seen[step] = own
        return heads(kind).context.output(entered, jnp.asarray([[position[step]]]), source, itself)

    first = last - drafted + 1
    attends = KINDS[kind].kind == "attn"
    seen = {step: keys_values(step, before(step))[1] for step in range(start, first)} if attends else {}
    previous = before(first)
    for step in range(first, last + 1):
        state = jnp.asarray(embeddings()[token[step]])[None, None]
        read = context(step, previous) if attends else None
        found = heads(kind).features(state, jnp.asarray(previous)[None, None], read)[0, 0]
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


@pytest.mark.parametrize("kind", KINDS)
def test_each_draft_step_reads_what_a_chain_of_nodes_reads(kind) -> None:
    batch, normed = chunk()
    found, valid = jax.jit(read_drafts, static_argnums=4)(heads(kind), batch, normed, embeddings(), 4)
    position = np.array(batch.position)
    compared = 0
    for drafted in range(1, 5):
        for row in range(2):
            for step in range(STEPS):
                reaches = position[row, HISTORY + step] >= drafted - 1 and step >= drafted - 1
                assert bool(valid[drafted - 1, row, step]) == reaches
                if reaches:
                    want = chain(kind, row, HISTORY + step, drafted)
                    np.testing.assert_allclose(found[drafted - 1, row, step], want, rtol=2e-5, atol=2e-5)
                    compared += 1
    assert compared > 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["final", "token"])
def test_other_items_and_idle_steps_reach_no_draft(what, kind) -> None:
    """Row 1 holds three items: what the first two and the idle step hold changes nothing of the third."""
    batch, normed = chunk()
    position = np.array(batch.position)
    third = HISTORY + STEPS - 2
    assert position[1, third] == 0
    token = np.array(batch.token)
    if what == "token":
        token[1, :third] = np.where(token[1, :third] < 0, token[1, :third], (token[1, :third] + 3) % VOCABULARY)
    else:
        normed = normed.copy()
        normed[1, :third] += 1
    changed = batch._replace(token=jnp.asarray(token))
    read = jax.jit(read_drafts, static_argnums=4)
    one, valid = read(heads(kind), batch, chunk()[1], embeddings(), 3)
    other, _ = read(heads(kind), changed, normed, embeddings(), 3)
    same = np.array(valid)[:, 1, -2:]
    np.testing.assert_array_equal(np.array(one)[:, 1, -2:][same], np.array(other)[:, 1, -2:][same])
    # Without attention a token is read as the states alone, which are the same here.
    unread = kind == "mlp" and what == "token"
    assert np.array_equal(one[0, 1, : STEPS - 2], other[0, 1, : STEPS - 2]) == unread
