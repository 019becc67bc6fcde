"""The estimate of a training against what XLA counts and what arrays take, on a small model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from flax import nnx
from reference.small_models import LLAMA, small_model

from dex_jax import cache
from dex_jax.config import ExitsConfig
from dex_jax.nn import few_rows
from dex_jax.nn.exits import ExitHeads, exit_graph, initial_heads
from dex_jax.nn.forward import extend_with_states
from dex_jax.nn.targets import Vocabulary
from dex_jax.nn.weights import merge_model
from dex_jax.training.distillation import history_for, read_chunk_for_training
from dex_jax.training.estimate import (
    MACHINES,
    Machine,
    exits_flops_per_token,
    model_flops_per_token,
    parameter_count,
    this_machine,
    training_cost,
)
from dex_jax.training.losses import exit_losses
from dex_jax.training.stream import Activations

# Wide enough for products to outweigh all else, as in models that people use.
MODEL = dataclasses.replace(LLAMA, vocab_size=1024, width=128, head_dim=32, mlp_width=256, num_layers=2)
EXITS = ExitsConfig("linear", (1,), 128, fused=True, rank=32, hidden=256, heads=4, head_dim=32, window=16)
# The whole vocabulary and a draft vocabulary, alone and fused.
KINDS = [slow("linear", True, None), ("mlp", True, 256), slow("attn", False, 256)]
BATCH, CHUNK, LENGTH = 8, 8, 32
RUN = {"batch": BATCH, "chunk": CHUNK, "length": LENGTH, "steps": 10, "dtype": jnp.dtype(jnp.float32)}


@pytest.fixture(autouse=True, scope="module")
def all_of_it_is_xlas():
    """XLA counts what it does itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "ready", lambda: False)
        yield


def counted(function, *arguments) -> float:
    """Operations of a function as XLA counts them; the body of a loop counts once, so there are none here."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_the_models_arithmetic_is_what_xla_counts() -> None:
    config = dataclasses.replace(MODEL, tied=False)
    lm = small_model(config)
    memory = cache.allocate(config, lm.layout, BATCH, LENGTH, 0, jnp.dtype(jnp.float32))

    def one_step(weights, memory, tokens, start):
        model = merge_model(config, lm.layout, weights)
        states, memory = extend_with_states(model, memory, tokens, start)
        return model.logits(states[-1]), memory

    tokens, start = jnp.zeros((BATCH, 1), jnp.int32), jnp.zeros(BATCH, jnp.int32)
    found = counted(one_step, lm.weights, memory, tokens, start) / BATCH
    assert model_flops_per_token(config, LENGTH) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(("kind", "fused", "draft"), KINDS)
def test_the_exits_arithmetic_is_what_xla_counts(kind: str, fused: bool, draft: int | None) -> None:
    config = dataclasses.replace(EXITS, kind=kind, fused=fused, draft_size=draft)
    history, width = history_for(config), MODEL.width
    embed = jnp.ones((MODEL.vocab_size, width))
    words = None if draft is None else jnp.arange(draft)
    vocabulary = Vocabulary(embed, None if draft is None else embed[:draft], words)
    batch = Activations(
        states=jnp.zeros((1, BATCH, CHUNK, width)),
        final=jnp.zeros((BATCH, history + CHUNK, width)),
        token=jnp.zeros((BATCH, history + CHUNK), jnp.int32),
        position=jnp.zeros((BATCH, history + CHUNK), jnp.int32),
        weight=jnp.ones((BATCH, CHUNK)),
    )

    def loss(params, batch, vocabulary, key):
        heads = nnx.merge(exit_graph(config), params)
        features = read_chunk_for_training(heads, batch, batch.final, vocabulary.unembed, 0.5, key)
        now = batch.final[:, -CHUNK:].reshape(-1, width)
        return exit_losses(features.reshape(1, -1, width + 1), now, batch.weight.reshape(-1), vocabulary)[0].mean()

    params = nnx.state(initial_heads(config, np.ones(width, np.float32)))
    found = counted(jax.value_and_grad(loss), params, batch, vocabulary, jax.random.key(0)) / (BATCH * CHUNK)
    assert exits_flops_per_token(MODEL, config, CHUNK) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_are_those_of_the_arrays(dtype) -> None:
    lm = small_model(MODEL)
    config = dataclasses.replace(EXITS, kind="attn", fused=False, draft_size=256)
    cost = training_cost(MODEL, config, MACHINES["t4"], **RUN | {"dtype": dtype})
    weights = jax.tree.leaves(lm.weights)
    size = jnp.dtype(dtype).itemsize
    assert cost.model_bytes == (sum(x.size for x in weights) + 256 * MODEL.width) * size
    memory = cache.allocate(MODEL, lm.layout, BATCH, LENGTH, 0, jnp.dtype(dtype))
    assert cost.cache_bytes == sum(x.nbytes for x in jax.tree.leaves(memory))
    heads: ExitHeads = initial_heads(config, np.ones(MODEL.width, np.float32))
    numbers = sum(x.size for x in jax.tree.leaves(nnx.state(heads)))
    assert cost.exits_bytes == 4 * 4 * numbers
    assert parameter_count(config) == numbers
    parts = (cost.model_bytes, cost.cache_bytes, cost.exits_bytes, cost.activation_bytes)
    assert cost.total_bytes == sum(parts)


def test_time_is_bound_by_what_is_slower() -> None:
    def seconds(flops: float, bandwidth: float) -> tuple[float, float]:
        cost = training_cost(MODEL, EXITS, Machine("any", flops, bandwidth, None, reached=0.5), **RUN)
        return cost.model_seconds, cost.exits_seconds

    cost = training_cost(MODEL, EXITS, MACHINES["t4"], **RUN)
    by_arithmetic, by_memory = seconds(1e9, 1e15), seconds(1e15, 1e9)
    flops = model_flops_per_token(MODEL, LENGTH), exits_flops_per_token(MODEL, EXITS, CHUNK)
    assert by_arithmetic == pytest.approx([cost.tokens * each / 5e8 for each in flops])
    moved = 10 * 7 * 4 * parameter_count(EXITS) / 5e8
    assert by_memory == pytest.approx((cost.tokens * (cost.model_bytes + cost.cache_bytes) / BATCH / 5e8, moved))
    assert cost.tokens == 10 * BATCH * CHUNK


def test_the_sentence_says_whether_it_fits_and_this_machine_is_measured() -> None:
    small = training_cost(MODEL, EXITS, MACHINES["t4"], **RUN)
    sizes = {"model_bytes": 16_060_000_000, "cache_bytes": 90_000_000, "exits_bytes": 0, "activation_bytes": 0}
    cost = dataclasses.replace(small, **sizes, tokens=1_234_567, model_seconds=100.0, exits_seconds=50.0)
    assert cost.sentence(MACHINES["t4"]) == (
        "estimate: 2 min 30 s for 1,234,567 tokens on one T4, 16.1 GB of 16.0 GB (does not fit): model 16.1, caches "
        "0.09, exits 0.00, activations 0.00"
    )
    # Not all memory can be had.
    larger = [dataclasses.replace(MACHINES["t4"], memory=cost.total_bytes * times) for times in (1.05, 1.1)]
    assert [cost.fits(machine) for machine in larger] == [False, True]
    assert "(fits)" in cost.sentence(larger[1])
    unknown = dataclasses.replace(MACHINES["t4"], memory=None)
    assert cost.fits(unknown) is None
    assert "GB of" not in cost.sentence(unknown)
    machine = this_machine(jnp.dtype(jnp.float32))
    assert 1e8 < machine.flops < 1e16
    assert 1e7 < machine.bandwidth < 1e14
    assert machine.memory is None or machine.memory > 1e7
