"""Kernels for newer GPUs: they compute what XLA computes without them, and programs have them where they fit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from hypothesis import given, settings
from jax.experimental import pallas as pl
from reference.compiled import assumed
from reference.small_models import LLAMA, outline_of, programs_of, random_transformer
from test_few_rows_attention import attention_of, plain_attention

from dex_jax.config import LayerKind
from dex_jax.decoding.plan import plan_for
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.session import Session
from dex_jax.nn import cache, few_rows, gpu_attention, gpu_writes, planes, products, trial
from dex_jax.nn.attention import KeyValues, _attend
from dex_jax.nn.cache import MOST_WRITTEN, write_rows
from dex_jax.nn.forward import commit_rows, extend, run_tree
from dex_jax.nn.kinds import ring_length, ring_of
from dex_jax.nn.products import TRITON, CompileTarget

KERNEL = "__gpu$xla.gpu.triton"
WIDE = dataclasses.replace(LLAMA, head_dim=16, num_layers=2)


@pytest.mark.parametrize(
    ("dtype", "rows", "heads", "length"),
    [
        ("bfloat16", 1, (9, 3), 300),
        ("bfloat16", 16, (4, 4), 1),
        ("float16", 7, (6, 1), 129),
        ("float16", 12, (4, 4), 128),
    ],
)
def test_attention(dtype: str, rows: int, heads: tuple[int, int], length: int) -> None:
    queries, sources = attention_of(rows, rows, *heads, 16, [length, 70, rows])
    rounded = jax.tree.map(lambda x: jnp.asarray(x, dtype), (queries, [source[:2] for source in sources]))
    queries, sources = rounded[0], [KeyValues(*two, s.mask) for two, s in zip(rounded[1], sources, strict=True)]
    found = jax.jit(functools.partial(gpu_attention.attend_in_one_kernel, interpret=True))(queries, sources)
    assert found.dtype == queries.dtype
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == queries.dtype else x, (queries, sources))
    tolerance = 0.03 if dtype == "bfloat16" else 0.004
    chex.assert_trees_all_close(np.asarray(found, np.float64), plain_attention(*exact, None), atol=tolerance)


def test_attention_reads_no_more_than_what_is_seen_and_the_same_whatever_is_beside() -> None:
    queries, (cached, own) = attention_of(3, 4, 4, 2, 16, [300, 4])
    seen = np.broadcast_to(np.arange(300) < np.array([70, 3])[:, None, None], (2, 4, 300))
    queries, *pairs = (jnp.asarray(x, jnp.bfloat16) for x in (queries, *cached[:2], *own[:2]))
    sources = [KeyValues(*pairs[:2], seen), KeyValues(*pairs[2:], np.broadcast_to(np.eye(4, dtype=bool), (2, 4, 4)))]
    run = jax.jit(functools.partial(gpu_attention.attend_in_one_kernel, interpret=True))
    found = run(queries, sources)
    bad = sources[0]._replace(values=sources[0].values.at[:, :, 128:].set(jnp.nan))
    chex.assert_trees_all_equal(run(queries, [bad, sources[1]]), found)
    one_mask = sources[0]._replace(mask=seen[:, :1])
    chex.assert_trees_all_equal(run(queries, [one_mask, sources[1]]), found)


@settings(max_examples=3)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, 10]), st.integers(-1, 90))
def test_writes(seed: int, count: int, rows: int, window: int | None, start: int) -> None:
    generator = np.random.default_rng(seed)
    length = 128 if window is None else ring_length(window)
    kinds = [() if window is None else (LayerKind(window=window),)] * 2

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), jnp.bfloat16)

    caches, fresh = tuple(random(2, 3, length, 16) for _ in range(4)), (random(2, 2, 3, rows, 16),) * 2
    row = jnp.asarray(generator.integers(rows, size=(2, count)), jnp.int32)
    at = jnp.asarray([start, 5], jnp.int32)
    rings = [ring_of(each, length) for each in kinds]
    written = gpu_writes.write(caches, fresh, row, at, rings, MOST_WRITTEN, interpret=True)
    for number, (before, after) in enumerate(zip(caches, written, strict=True)):
        chosen = jnp.take_along_axis(fresh[0][number % 2], row[:, None, :, None], axis=2)
        wanted = write_rows(before, chosen, jnp.maximum(at, 0), kinds=kinds[0])
        wanted = wanted if start >= 0 else wanted.at[0].set(before[0])  # a negative start writes nothing
        chex.assert_trees_all_equal(after, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_transformer_over_caches_computes_with_them_what_it_does_without(batch: int, monkeypatch) -> None:
    """It runs a prompt, a token, a tree and its commit, with kernels that XLA interprets in the place of Triton."""
    model = random_transformer(WIDE, 0, jnp.dtype(jnp.bfloat16))
    tokens = jnp.asarray(np.random.default_rng(0).integers(WIDE.vocab_size, size=(batch, 9)))
    among, position = jnp.tril(jnp.ones((batch, 3, 3), bool)), jnp.asarray([[10, 11, 11]] * batch)

    def run() -> Any:
        memory = cache.allocate(WIDE, batch, 64, 0, model.dtype)
        states, memory = extend(model, memory, tokens, jnp.zeros(batch, jnp.int32))
        last, memory = extend(model, memory, tokens[:, :1], jnp.full(batch, 9))
        rows, fresh = run_tree(model, memory, model.embed_tokens(tokens[:, :3]), position, among, jnp.full(batch, 10))
        chosen = jnp.asarray([[0, 2], [0, 1]])[:batch]
        memory = commit_rows(model, memory, fresh, chosen, jnp.full(batch, 10), rows)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (states, last, rows, memory.keys, memory.values))

    monkeypatch.setattr(few_rows, "ready", lambda: False)
    wanted = jax.jit(run)()
    calls = []

    def interpreted(kernel, **options):
        calls.append(options["name"])
        return pallas_call(kernel, **options | {"interpret": True})

    def on_a_gpu(*arguments, default, **others):
        return others.get("cuda", default)(*arguments)

    pallas_call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", interpreted)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_gpu)
    for module in (gpu_attention, gpu_writes):
        monkeypatch.setattr(module, "for_triton", lambda: True)
    jax.clear_caches()
    found = jax.jit(run)()
    jax.clear_caches()
    assert calls.count("write_rows") == 3
    assert calls.count("few_rows_attention") >= 3
    chex.assert_trees_all_close(found, wanted, atol=0.15, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("h100", "bfloat16", AR()),
        slow("h100", "bfloat16", Dex(explorers=1)),
        slow("h100", "bfloat16", Dex(explorers=2, draft=False)),
        ("h100", "float32", AR()),
        ("t4", "float16", AR()),
    ],
)
def test_programs_for_newer_gpus_have_one_for_each_layers_attention_and_one_for_all_writes(name, dtype, method) -> None:
    """The programs are lowered without a GPU or its compiler."""
    with assumed(name):
        plan = plan_for(method, WIDE.num_layers)
        session = Session(outline_of(WIDE, dtype), [[1, 2], [3]], plan, Request(max_new_tokens=64))
        program, arguments, statics = programs_of(session)["run_ticks"]
        text = program.jitted.trace(*arguments, **statics).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(KERNEL) >= 2 if dtype == "bfloat16" else KERNEL not in text


def test_what_does_not_fit_is_left_to_xla() -> None:
    queries, sources = attention_of(0, 2, 4, 2, 48, [40, 2])
    narrow = [KeyValues(*(x.astype(jnp.bfloat16) for x in source[:2]), source.mask) for source in sources]
    with assumed("h100"):
        assert not gpu_attention.fits(queries.astype(jnp.bfloat16), narrow)  # 48 is no power of two
        assert not gpu_writes.fits(jnp.zeros((1, 1, 8, 16)), 1)
        assert not gpu_writes.fits(jnp.zeros((1, 1, 8, 16), jnp.bfloat16), gpu_writes.MOST_ROWS + 1)
        assert gpu_writes.fits(jnp.zeros((1, 1, 8, 16), jnp.bfloat16), 1)
    assert not gpu_writes.fits(jnp.zeros((1, 1, 8, 16), jnp.bfloat16), 1)
    chex.assert_trees_all_close(_attend(None, queries, sources), plain_attention(queries, sources, None), atol=3e-6)


def _on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(trial, "gpu_capability", lambda: 9.0)
    monkeypatch.setattr(trial, "DISTRUSTED", set())
    trial._try.cache_clear()


@pytest.mark.parametrize("fault", [None, "raises", "differs"])
def test_a_kernel_is_tried_beside_xla_and_left_where_it_raises_or_differs(fault, monkeypatch, capsys) -> None:
    _on_a_gpu(monkeypatch)
    for module, name in ((gpu_attention, "attend_in_one_kernel"), (gpu_writes, "write")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    right = gpu_writes.write

    def wrong(*arguments: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return tuple(cache + 1 for cache in right(*arguments))

    if fault is not None:
        monkeypatch.setattr(gpu_writes, "write", wrong)
    trial.try_kernels()
    trial.try_kernels()
    said = capsys.readouterr().err.splitlines()
    assert ({TRITON} if fault else set()) == trial.DISTRUSTED
    assert [line for line in said if "XLA's operations are used" in line] == said
    assert len(said) == (fault is not None), said
    if fault is not None:
        assert {"raises": "no kernel image", "differs": "differs from XLA"}[fault] in said[0]
        monkeypatch.setattr(products, "DISTRUSTED", trial.DISTRUSTED)
        with assumed("h100"):
            assert not gpu_writes.fits(jnp.zeros((1, 1, 8, 16), jnp.bfloat16), 1)


@pytest.mark.parametrize("fault", [None, "raises", "differs"])
def test_so_is_the_layout_in_planes(fault, monkeypatch, capsys) -> None:
    _on_a_gpu(monkeypatch)
    monkeypatch.setattr(trial, "gpu_capability", lambda: 0.0)
    monkeypatch.setattr(trial, "compiled_for", lambda: CompileTarget("tpu"))
    right = planes.in_planes

    def wrong(blocks: np.ndarray, format: str) -> Any:
        if fault == "raises":
            raise RuntimeError("cannot lower")
        return jax.tree.map(lambda plane: plane[..., ::-1], right(blocks, format))

    if fault is not None:
        monkeypatch.setattr(planes, "in_planes", wrong)
    trial.try_kernels()
    said = capsys.readouterr().err
    assert ({planes.PLANES} if fault else set()) == trial.DISTRUSTED
    assert said.count("XLA's operations are used") == (fault is not None), said
