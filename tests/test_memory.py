"""The compiled loop never copies a cache: read off the program that XLA has made of it."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from reference.small_models import outline_of, programs_of

from dex_jax.config import ModelConfig
from dex_jax.decoding import program
from dex_jax.decoding.plan import plan_for
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.session import Session

# Every size differs from every other, so that a shape names one array.
CONFIG = ModelConfig("llama", 101, 2, 48, 6, 3, 8, 40, 512)


@functools.cache
def compiled(method, batch: int):
    """Return the optimised program of the loop and the state that it takes, from abstract shapes."""
    plan = plan_for(method, CONFIG.num_layers)
    session = Session(outline_of(CONFIG), [[1, 2, 3]] * batch, plan, Request(max_new_tokens=400))
    program, arguments, statics = programs_of(session)["run_ticks"]
    return program.jitted.lower(*arguments, **statics).compile(), arguments[2]


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
    program.forget()
    doubled = program.CompiledFunction(lambda x: 2 * x)
    doubled.compile(jnp.ones(9))
    (found,) = program._PROGRAMS.values()
    monkeypatch.setattr(program, "MOST_CHARACTERS", 2 * found.size + 2)
    monkeypatch.setattr(program, "FEWEST_PROGRAMS", 1)
    program.forget()
    sizes = []

    def lower(*args, jitted=doubled.jitted, **static):
        sizes.append(args[0].shape[0])
        return jitted.lower(*args, **static)

    doubled.jitted = SimpleNamespace(lower=lower, clear_cache=lambda: None)
    for size in (1, 2, 1, 3, 1, 2):
        assert doubled(jnp.ones(size)).tolist() == [2.0] * size
    # Programs of sizes 1 and 2 are held and 1 was used last, so 3 takes the place of 2.
    assert sizes == [1, 2, 3, 2]
    assert doubled.held == 2
