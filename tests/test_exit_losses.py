"""The distillation loss against a float64 twin, its gradient, and the memory that it must not take."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import distillation_twin

from dex_jax.nn.targets import Vocabulary
from dex_jax.training import losses
from dex_jax.training.losses import exit_losses

EXITS, TOKENS, WIDTH, WORDS = 3, 11, 8, 24
DRAFT = (0, 2, 3, 7, 8, 9, 13, 17, 20, 23)
SCALE = np.array([1.0, 0.5, -2.0], np.float32)


def arrays_of(function, *arguments) -> set[tuple[int, ...]]:
    """Return the shapes of all float32 arrays in a function's jaxpr, loops and calls included."""
    text = str(jax.make_jaxpr(function)(*arguments))
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((EXITS, TOKENS, WIDTH + 1)).astype(np.float32)
    final, unembed = (rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (TOKENS, WORDS))
    weight = np.array([1, 0, 0.3, 1, 1, 0, 0.3, 1, 1, 1, 0.5], np.float32)
    return features, final, weight, unembed


def vocabulary_of(unembed, draft) -> Vocabulary:
    unembed = jnp.asarray(unembed)
    if draft is None:
        return Vocabulary(unembed)
    return Vocabulary(unembed, unembed[np.array(draft)], jnp.asarray(draft, jnp.int32))


def losses_and_gradient(vocabulary: Vocabulary):
    """Return a function (features, final, weight) -> ((sum of losses by SCALE, `exit_losses`), gradient of the sum)."""

    def total(features, final, weight):
        found = exit_losses(features, final, weight, vocabulary)
        return jnp.dot(SCALE, found[0]), found

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize(("draft", "cap"), [(None, None), (DRAFT, 1.5)])
def test_values_and_gradients_are_those_of_the_twin(arrays, monkeypatch, draft, cap) -> None:
    monkeypatch.setattr(losses, "BLOCK", 4)  # 11 tokens: two blocks and a part of one
    features, final, weight, unembed = arrays
    vocabulary = vocabulary_of(unembed, draft)._replace(cap=cap)
    compute = losses_and_gradient(vocabulary)
    (_, found), gradient = compute(features, final, weight)
    twin = distillation_twin.losses(features, final, weight, unembed, draft, SCALE, cap)
    np.testing.assert_allclose(found[0], twin.loss, rtol=1e-5)
    np.testing.assert_allclose(found[1], twin.agreement, rtol=1e-5)
    np.testing.assert_allclose(found[2], twin.coverage, rtol=1e-5)
    assert 0 < twin.coverage < 1 or draft is None
    np.testing.assert_allclose(gradient, twin.gradient, atol=1e-6)
    assert not gradient[:, weight == 0].any()
    # If all weights are zero, nothing is divided by zero.
    (_, found), gradient = compute(features, final, 0 * weight)
    assert [float(np.abs(x).max()) for x in found] == [0, 0, 0]
    assert not gradient.any()


@pytest.mark.parametrize("draft", [None, tuple(range(0, 96, 2))])
def test_logits_of_all_tokens_never_exist(monkeypatch, draft) -> None:
    monkeypatch.setattr(losses, "BLOCK", 8)
    tokens, words = 64, 96
    columns = words if draft is None else len(draft)
    features, final, weight = np.ones((EXITS, tokens, WIDTH + 1)), np.ones((tokens, WIDTH)), np.ones(tokens)
    vocabulary = vocabulary_of(np.ones((words, WIDTH), np.float32), draft)

    def largest() -> int:
        return max(map(math.prod, arrays_of(losses_and_gradient(vocabulary), features, final, weight)))

    assert largest() < tokens * columns
    monkeypatch.setattr(losses, "BLOCK", tokens)  # exits still come one at a time
    assert tokens * columns <= largest() < EXITS * tokens * columns
