"""The compiled loop never copies a cache: read off the program that XLA has made of it."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dex_jax import cache
from dex_jax.config import ModelConfig
from dex_jax.decoding import program
from dex_jax.decoding.dex.trained_exits import Heads
from dex_jax.decoding.methods import AR, Dex
from dex_jax.decoding.record import Limits
from dex_jax.decoding.session import RUN, Spec, start_decoding
from dex_jax.nn.transformer import Unrolled
from dex_jax.nn.weights import abstract_weights

# Every size differs from every other, so that a shape names one array.
CONFIG = ModelConfig("llama", 101, 2, 48, 6, 3, 8, 40, 512)
CACHE_LENGTH = 197


@functools.cache
def compiled(method, batch: int):
    """(optimised program, bytes of one committed cache) of the loop, from abstract shapes."""
    spec = Spec(CONFIG, Unrolled(), method.schedule_for(CONFIG.num_layers))
    weights = abstract_weights(CONFIG, Unrolled(), jnp.float32)
    slots = spec.schedule.stages * spec.schedule.rows if spec.schedule.stages > 1 else 0
    memory = cache.shapes(CONFIG, Unrolled(), batch, CACHE_LENGTH, slots, jnp.float32)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    limits = Limits(ints(batch), ints(1))
    last = jax.ShapeDtypeStruct((batch, CONFIG.width), jnp.float32)
    state = jax.eval_shape(
        lambda *args: start_decoding(*args, spec=spec, capacity=64),
        weights,
        Heads(),
        memory,
        last,
        ints(batch),
        limits,
        None,
        ints(batch, CACHE_LENGTH - 64) if spec.schedule.drafts is not None else None,
    )
    return RUN.jitted.lower(weights, Heads(), state, limits, None, ints(), spec=spec).compile(), state


@pytest.mark.parametrize(
    ("method", "batch"),
    [(AR(), 1), (Dex(explorers=2, draft=False), 3), (Dex(explorers=1), 1)],
    ids=["ar", "dex", "one"],
)
def test_no_step_copies_a_committed_cache(method, batch) -> None:
    program, state = compiled(method, batch)
    leaves = jax.tree.leaves(state.memory.keys)
    dimensions = {",".join(map(str, leaf.shape)) for leaf in leaves}
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not dimensions & set(copies)
    assert f"f32[{dimensions.pop()}]" in program.as_text()


def test_donated_caches_are_updated_in_place() -> None:
    program, state = compiled(Dex(explorers=2, draft=False), 3)
    caches = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.memory))
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= caches
    assert analysis.temp_size_in_bytes < caches


def test_only_the_latest_programs_are_held(monkeypatch) -> None:
    monkeypatch.setattr(program, "HELD", 2)
    doubled = program.Program(lambda x: 2 * x)
    sizes = []

    def lower(*args, jitted=doubled.jitted, **static):
        sizes.append(args[0].shape[0])
        return jitted.lower(*args, **static)

    doubled.jitted = SimpleNamespace(lower=lower, clear_cache=lambda: None)
    for size in (1, 2, 1, 3, 1, 2):
        assert doubled(jnp.ones(size)).tolist() == [2.0] * size
    # With 1 and 2 held, 1 was used last: 3 takes the place of 2.
    assert sizes == [1, 2, 3, 2]
    assert doubled.held == 2
