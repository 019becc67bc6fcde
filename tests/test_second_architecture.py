"""The loop under a caller's own jit, with a model that is not ours: the network of docs/howto_own_model.md."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_docs import run_page

from dex_jax import Limits, Sampling, init, step
from dex_jax.sampling import position_noise, sampling_keys

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
SEEDS = [4, 5, 6]
TEMPERATURE = 0.7
TOKENS = 10


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """What the page defines."""
    return SimpleNamespace(**run_page("docs/howto_own_model.md"))


def prefilled(page: SimpleNamespace) -> tuple[jax.Array, jax.Array]:
    """(memory, lengths of the prompts [B]); padding lies beyond the prefix, to be overwritten."""
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    tokens = jnp.asarray([prompt + [0] * (lengths.max() - len(prompt)) for prompt in PROMPTS])
    slots = len(page.DEPTHS) * page.ROWS
    memory = jnp.zeros((page.LAYERS, len(PROMPTS), page.LENGTH + slots, 2, page.WIDTH))
    places = jnp.arange(lengths.max())[None]
    causal = jnp.arange(memory.shape[2])[None] <= places.T
    _, memory = page.layers(page.embed(tokens, places), memory, range(page.LAYERS), places, causal[None])
    return memory, jnp.asarray(lengths)


def autoregressive(page: SimpleNamespace) -> list[list[int]]:
    """All of the network run anew for every token, and a draw from what it says."""
    size = page.LENGTH // 2
    causal, places = jnp.tril(jnp.ones((1, size, size), bool)), jnp.arange(size)[None]
    nothing = jnp.zeros((page.LAYERS, 1, size, 2, page.WIDTH))
    run = jax.jit(lambda ids: page.logits(page.layers(page.embed(ids, places), nothing, range(6), places, causal)[0]))
    everything = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        tokens = list(prompt)
        for _ in range(TOKENS):
            scores = np.asarray(run(np.array([tokens + [0] * (size - len(tokens))])))[0, len(tokens) - 1]
            noise = position_noise(sampling_keys([seed])[0], jnp.int32(len(tokens)), page.VOCAB)
            tokens.append(int((scores / np.float32(TEMPERATURE) + np.asarray(noise)).argmax()))
        everything.append(tokens[len(prompt) :])
    return everything


def test_the_page_runs(page) -> None:
    tokens = page.done.record.tokens[0].tolist()
    assert tokens == page.said[page.length :]
    assert len(tokens) == page.NEW == 20
    assert len(set(tokens)) > 1
    assert 0 < int(page.done.record.ticks[0]) < len(page.DEPTHS) * (page.NEW - 1)


@pytest.mark.slow
def test_a_ragged_sampled_batch_in_a_loop_of_ones_own_gives_the_networks_tokens(page) -> None:
    expected = autoregressive(page)
    sampling = Sampling(sampling_keys(SEEDS), jnp.float32(TEMPERATURE))
    limits = Limits(jnp.full(len(PROMPTS), TOKENS), jnp.array([-1]))
    shape = {"stages": len(page.DEPTHS), "rows": page.ROWS, "capacity": TOKENS}

    @jax.jit
    def decode(memory, first, lengths):
        state = init(page.network, memory, first, lengths, limits=limits, sampling=sampling, **shape)

        def one(state):
            return step(page.network, state, limits, sampling)

        return jax.lax.while_loop(lambda state: ~jnp.all(state.record.done), one, state).record

    memory, lengths = prefilled(page)
    first = jnp.asarray([tokens[0] for tokens in expected])
    record = jax.tree.map(np.asarray, decode(memory, first, lengths))
    assert record.tokens.tolist() == expected
    np.testing.assert_array_equal(record.exits[:, 0], -1)
    np.testing.assert_array_equal(record.ticks, len(page.DEPTHS) + record.exits[:, 1:-1].sum(axis=1))
    # Early exits are right now and then, so that collapses onto a child are part of this.
    assert set(record.exits[:, 1:].ravel().tolist()) == {1, 2, 3}
