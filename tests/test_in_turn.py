"""Layers that run as one loop on CPUs: they give the numbers of layers apart, and programs hold only one layer."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.small_models import LLAMA, random_transformer, weights_of
from test_few_rows import needs_compiler

import dex_jax
from dex_jax.config import LayerKind
from dex_jax.nn import cache, few_rows, in_turn
from dex_jax.nn.forward import extend, run_rows
from dex_jax.nn.packed import to_int8
from dex_jax.nn.products import ASSUMED, CompileTarget
from dex_jax.nn.transformer import Transformer, build
from dex_jax.nn.weights import merge_model

pytestmark = needs_compiler
ALIKE = dataclasses.replace(LLAMA, num_layers=4, head_dim=16, qkv_bias=True)


def int8_model(*dense: str) -> Transformer:
    """Return ALIKE with kernels in 8 bits, but for those of `dense`."""
    given = weights_of(dex_jax.LanguageModel(random_transformer(ALIKE, 0), None, "random", "0"))

    def read(name: str) -> object:
        return to_int8(given[name]) if given[name].ndim > 1 and name not in dense else given[name]

    return build(ALIKE, read, jnp.float32)


def run(model: Transformer, tokens: jax.Array) -> tuple:
    """Return every state of a prompt, then those of two rows after layers 2 and 3, and the caches."""
    batch = tokens.shape[0]
    memory = cache.allocate(model.config, batch, 24, 0, model.dtype)
    states, memory = extend(model, memory, tokens, jnp.full(batch, 3), jnp.full(batch, 9))
    among = jnp.broadcast_to(jnp.eye(2, dtype=bool), (batch, 2, 2))
    position = jnp.full((batch, 2), 9)
    last, _ = run_rows(model, memory, states[-1][:, :2], position, among, jnp.full(batch, 9), range(1, 3))
    return [states[i] for i in range(model.config.num_layers)], last, memory


@pytest.mark.parametrize("make", ["float32", "bfloat16", "int8"])
def test_states_and_caches_are_those_of_layers_apart(make, monkeypatch) -> None:
    model = int8_model() if make == "int8" else random_transformer(ALIKE, 0, jnp.dtype(make))
    weights = dex_jax.LanguageModel(model, None, "random", "0").weights
    tokens = jnp.asarray(np.random.default_rng(0).integers(ALIKE.vocab_size, size=(3, 8)))

    def compiled() -> jax.stages.Compiled:
        program = jax.jit(lambda weights, tokens: run(merge_model(ALIKE, weights), tokens))
        return program.lower(weights, tokens).compile()

    assert in_turn.is_loop(model)
    loop = compiled()
    monkeypatch.setattr(in_turn, "FEWEST_LAYERS", 99)
    apart = compiled()
    found, wanted = loop(weights, tokens), apart(weights, tokens)
    if make == "int8":  # XLA multiplies with the scales, and may fuse this with what comes next
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        chex.assert_trees_all_equal(found, wanted)
    products = [each.as_text().count(few_rows.PRODUCT) for each in (loop, apart)]
    assert products == [4 + 4, (4 + 2) * 4], "one layer of four products for each loop, in place of six layers"


def test_layers_that_differ_and_programs_for_other_devices_have_none() -> None:
    windows = (LayerKind(window=4), LayerKind())
    assert not in_turn.is_loop(random_transformer(dataclasses.replace(ALIKE, layer_kinds=windows * 2), 0))
    assert not in_turn.is_loop(random_transformer(dataclasses.replace(ALIKE, head_dim=8), 0))
    assert not in_turn.is_loop(random_transformer(ALIKE, 0, jnp.float16))
    assert not in_turn.is_loop(int8_model("layers.1.down"))
    before = ASSUMED.set(CompileTarget("tpu"))
    assert not in_turn.is_loop(random_transformer(ALIKE, 0))
    ASSUMED.reset(before)
