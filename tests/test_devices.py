"""A dry run counts what is really allocated."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import slow
from reference.small_models import LLAMA, outline_of, packed_alike, random_exits, random_transformer

import dex_jax
from dex_jax.cli import devices
from dex_jax.cli.devices import REMEDIES, free_memory, held, verdict
from dex_jax.decoding.plan import GivenHeads, plan_for
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.session import Session
from dex_jax.nn.packed import INT8
from dex_jax.nn.sharding import nbytes
from dex_jax.planner import SHAPES


@pytest.mark.parametrize(("method", "dtype"), [(AR(), jnp.float32), slow(Dex(explorers=2, draft=False), jnp.bfloat16)])
def test_what_is_counted_is_what_is_allocated(method, dtype) -> None:
    lm = dex_jax.LanguageModel(random_transformer(LLAMA, seed=0, dtype=dtype), None, "random", "0")
    plan = plan_for(method, LLAMA.num_layers)
    exits = random_exits("attn", draft=20, depths=(2,)) if plan.stages > 1 else None
    if exits is not None:
        plan = dataclasses.replace(plan, exits=exits.config, heads=GivenHeads(exits))
    request = Request(max_new_tokens=70, temperature=1.0, top_k=5)
    session = Session(lm, [[3, 4, 5], list(range(2, 22))], plan, request)
    sizes = held(session)
    session.prefill()
    state, memory = session.state, session.state.memory
    assert sizes["weights"] == lm.parameter_bytes
    assert sizes["cache"] == nbytes((memory.keys, memory.values))
    assert sizes["exits"] == nbytes((session.heads, memory.exits))
    assert (sizes["exits"] > 0) == (exits is not None)
    assert sum(sizes.values()) == nbytes((lm.weights, state, session.heads))


@pytest.mark.parametrize(("kind", "size"), [(None, 16.06), (INT8, 8.04), ("Q4_K", 4.52), ("Q4_K in planes", 6.02)])
def test_a_model_of_8_billion_weights(kind, size) -> None:
    config = SHAPES["llama-3-8b"]
    outline = outline_of(config, "bfloat16", () if kind is None else packed_alike(config, kind))
    session = Session(outline, [[1]], plan_for(AR(), config.num_layers), Request(max_new_tokens=2000))
    found = {name: round(each / 1e9, 2) for name, each in held(session).items()}
    assert found == {"weights": size, "cache": 0.27, "lattice": 0.0, "exits": 0.0}


def test_free_memory_may_be_unknown(monkeypatch) -> None:
    assert 10**7 < (free_memory() or 10**8) < 10**15
    monkeypatch.setattr(devices, "_text", lambda path: "")
    assert free_memory() is None
    for stats, left in (({"bytes_limit": 1000, "bytes_in_use": 10}, 990), (None, None)):
        accelerator = SimpleNamespace(platform="tpu", memory_stats=lambda stats=stats: stats)
        monkeypatch.setattr(jax, "devices", lambda accelerator=accelerator: [accelerator])
        assert free_memory() == left


@pytest.mark.parametrize("largest", REMEDIES)
def test_verdict(largest) -> None:
    sizes = {name: 9 * 10**9 if name == largest else 10**9 for name in REMEDIES}
    assert verdict(sizes, 100e9) == "fits: 12.00 GB of the 92.00 GB that may be used."
    short = verdict(sizes, 2e9)
    assert short == f"does not fit: 12.00 GB are needed and 1.84 GB may be used; {REMEDIES[largest]}."
    assert "does not say" in verdict(sizes, None)
