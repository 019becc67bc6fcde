"""The planned memory is what is really allocated."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import slow
from reference.small_models import LLAMA, random_transformer

import dex_jax
from dex_jax.decoding.footprint import Footprint, device_memory, footprint, session_shapes, verdict
from dex_jax.decoding.methods import AR, Dex
from dex_jax.decoding.resolve import Resolved
from dex_jax.decoding.session import PREFILL, RUN, Session, Spec
from dex_jax.decoding.sizes import cache_length_for
from dex_jax.nn.transformer import Unrolled
from dex_jax.sampling import Sampling, sampling_keys
from dex_jax.sharding import nbytes

UNTIED = dataclasses.replace(LLAMA, family="qwen2", num_layers=2, tied=False, qkv_bias=True, eos_ids=(1,))


def session_of(layout, method, dtype, sampled: bool) -> Session:
    """A prefilled session of two ragged prompts."""
    lm = dex_jax.LanguageModel(random_transformer(UNTIED, seed=0, dtype=dtype), None, "random", "0")
    sampling = Sampling(sampling_keys([0, 1]), jnp.float32(1.0), jnp.int32(5), jnp.float32(1.0)) if sampled else None
    schedule = Resolved(method.schedule_for(UNTIED.num_layers))
    session = Session(lm, [[3, 4, 5], list(range(2, 22))], schedule, 70, sampling)
    session.prefill()
    return session


@pytest.mark.parametrize(
    ("layout", "method", "sampled", "dtype"),
    [
        (Unrolled(), AR(), False, jnp.float32),
        (Unrolled(), Dex(explorers=1), False, jnp.bfloat16),
        slow(Unrolled(), Dex(explorers=2), True, jnp.float32),
    ],
)
def test_planned_equals_allocated(layout, method, sampled, dtype) -> None:
    session = session_of(layout, method, dtype, sampled)
    schedule = session.spec.schedule
    length = cache_length_for(20, 70, schedule.ahead, 2)
    assert length == session.cache_length
    plan = footprint(UNTIED, jnp.dtype(dtype), schedule, 2, length, layout, sampled=sampled)
    state, memory = session.state, session.state.memory
    assert plan.weights_bytes == session.lm.parameter_bytes == nbytes(session.lm.weights)
    assert plan.cache_bytes == nbytes((memory.keys, memory.values))
    assert plan.lattice_bytes == nbytes(state) - plan.cache_bytes
    assert plan.exits_bytes == 0
    assert plan.total_bytes == sum(getattr(plan, field.name) for field in dataclasses.fields(plan))


@pytest.mark.parametrize("method", [AR(), Dex(explorers=2, draft=False)])
def test_workspace_is_of_the_size_that_the_compiler_reports(method) -> None:
    config, batch, length, layout = UNTIED, 8, 384, Unrolled()
    schedule = method.schedule_for(config.num_layers)
    shapes = session_shapes(config, jnp.dtype(jnp.float32), schedule, layout, batch, length)
    spec = Spec(config, layout, schedule)
    prefill = PREFILL.jitted.lower(*shapes.of_prefill(length - 64), spec=spec)
    run = RUN.jitted.lower(*shapes.of_run, spec=spec)
    reported = max(low.compile().memory_analysis().temp_size_in_bytes for low in (prefill, run))
    planned = footprint(config, jnp.dtype(jnp.float32), schedule, batch, length, layout).workspace_bytes
    assert reported / 2 < planned < 3 * reported


def test_device_memory_is_plausible_and_may_be_unknown() -> None:
    free = device_memory()
    assert free is None or 10**7 < free < 10**15

    for stats, left in (({"bytes_limit": 1000, "bytes_in_use": 10}, 990), (None, None)):
        accelerator = SimpleNamespace(platform="tpu", memory_stats=lambda stats=stats: stats)
        assert device_memory(accelerator) == left


def test_without_linux_files_all_physical_memory_counts(monkeypatch) -> None:
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert device_memory(jax.devices("cpu")[0]) == 4096000
    monkeypatch.delattr("os.sysconf")
    assert device_memory(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ((9, 1, 1, 0, 1), "smaller dtype"),
        ((1, 9, 1, 0, 1), "max_new_tokens"),
        ((1, 1, 9, 0, 1), "explorers"),
        ((1, 1, 1, 9, 1), "exits"),
        ((1, 1, 1, 0, 9), "rows"),
    ],
)
def test_verdict(sizes, advice) -> None:
    plan = Footprint(*(int(size * 1e9) for size in sizes))
    total = f"{sum(sizes):.2f} GB"
    assert verdict(plan, int(100e9)) == f"fits: {total} of the 100.00 GB that are free."
    short = verdict(plan, int(2e9))
    assert short.startswith(f"does not fit: {total} are needed and 2.00 GB are free; ")
    assert advice in short
    assert "does not say" in verdict(plan, None)
