"""Attention of few rows in C++, and of many by XLA, a block of keys at a time: what they compute and what they read."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from test_few_rows import needs_compiler

from dex_jax.nn import few_rows
from dex_jax.nn.attention import KEY_BLOCK, KeyValues, _attend, _attend_fused, _attend_in_blocks, attend


def attention_of(seed: int, rows: int, heads: int, groups: int, width: int, lengths: list[int], batch: int = 2):
    """Return random queries and sources; every row sees at least one key."""
    generator = np.random.default_rng(seed)
    queries = (2 * generator.normal(size=(batch, rows, heads, width))).astype(np.float32)
    sources = []
    for number, length in enumerate(lengths):
        keys, values = (generator.normal(size=(batch, groups, length, width)).astype(np.float32) for _ in range(2))
        mask = generator.random((batch, 1 if number == 1 else rows, length)) < 0.6
        mask[:, :, 0] |= number == 0
        sources.append(KeyValues(keys, values, mask))
    return queries, sources


def plain_attention(queries: np.ndarray, sources: list[KeyValues], cap: float | None) -> np.ndarray:
    """Compute attention one row and head after another, in float64."""
    out = np.zeros(queries.shape)
    batch, rows, heads, width = queries.shape
    for b, r, h in np.ndindex(batch, rows, heads):
        g = h // (heads // sources[0].keys.shape[1])
        seen = [np.broadcast_to(source.mask, (batch, rows, source.mask.shape[2]))[b, r] for source in sources]
        keys = np.concatenate([source.keys[b, g][mask] for source, mask in zip(sources, seen, strict=True)])
        values = np.concatenate([source.values[b, g][mask] for source, mask in zip(sources, seen, strict=True)])
        scores = keys.astype(np.float64) @ queries[b, r, h] / np.sqrt(width)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, r, h] = weights @ values / weights.sum()
    return out


SIZES = [(8, 9, 3, 64, None), (70, 4, 2, 16, 50.0)]
MORE = [slow(1, 9, 3, 16, None), slow(2, 4, 4, 48, 0.7), slow(5, 6, 1, 144, None)]


@needs_compiler
@pytest.mark.parametrize(("rows", "heads", "groups", "width", "cap"), [*SIZES, *MORE])
def test_attention_and_each_row_alone(rows: int, heads: int, groups: int, width: int, cap: float | None) -> None:
    queries, sources = attention_of(rows, rows, heads, groups, width, [37, 5, rows])
    capped = functools.partial(attend, cap=cap)
    assert few_rows.ATTENTION in str(jax.make_jaxpr(capped)(queries, sources))
    found = jax.jit(capped)(queries, sources)
    by_xla = [_attend(cap, queries, sources, on_gpu=on_gpu) for on_gpu in (False, True)]
    # XLA computes here what GPUs ask cuDNN for.
    fused = [] if cap else [_attend_fused(cap, queries, sources, by="xla")]
    for each in (found, *by_xla, *fused):
        chex.assert_trees_all_close(each, plain_attention(queries, sources, cap), atol=3e-6, rtol=0)
    for r in range(rows):
        own = [source._replace(mask=source.mask[:, min(r, source.mask.shape[1] - 1)][:, None]) for source in sources]
        chex.assert_trees_all_equal(capped(queries[:, r : r + 1], own), found[:, r : r + 1])


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_xla_scores_no_more_of_a_cache_than_rows_see(dtype: str) -> None:
    queries, (cached, own) = attention_of(6, 40, 4, 2, 16, [2 * KEY_BLOCK + 44, 40])
    seen = np.arange(cached.mask.shape[2]) < np.array([290, 3])[:, None, None]
    rounded = jax.tree.map(lambda x: jnp.asarray(x, dtype), (queries, cached.keys, cached.values, own.keys, own.values))
    queries, *pairs = rounded
    causal = np.tril(np.ones((2, 40, 40), bool))
    sources = [KeyValues(*pairs[:2], seen), KeyValues(*pairs[2:], causal)]
    cap = 2.0 if dtype == "float32" else None
    in_blocks, at_once = (jax.jit(functools.partial(each, cap)) for each in (_attend_in_blocks, _attend))
    found = in_blocks(queries, sources)
    assert found.dtype == queries.dtype
    chex.assert_trees_all_close(found, at_once(queries, sources), atol=2e-6 if dtype == "float32" else 0.03)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "ready", lambda: False)
        assert "while" in str(jax.make_jaxpr(attend)(queries, sources))
    # Nothing is read beyond the block of the last visible key.
    unread = sources[0]._replace(values=sources[0].values.at[:, :, 2 * KEY_BLOCK :].set(jnp.nan))
    chex.assert_trees_all_equal(in_blocks(queries, [unread, sources[1]]), found)
    gradient, wanted = (
        jax.jit(jax.grad(lambda queries, each=each: jnp.sum(each(queries, sources).astype(jnp.float32))))(queries)
        for each in (in_blocks, at_once)
    )
    chex.assert_trees_all_close(gradient, wanted, atol=1e-5 if dtype == "float32" else 0.1)


@needs_compiler
def test_attention_over_caches_in_bfloat16() -> None:
    queries, sources = attention_of(6, 5, 4, 2, 32, [30, 5])
    narrow = [KeyValues(*(x.astype(few_rows.DTYPES[1]) for x in source[:2]), source.mask) for source in sources]
    exact = [KeyValues(*(x.astype(np.float32) for x in source[:2]), source.mask) for source in narrow]
    found = attend(queries, narrow)
    assert found.dtype == jnp.float32
    chex.assert_trees_all_equal(found, attend(queries, exact))
    half = queries.astype(few_rows.DTYPES[1])
    wanted = attend(half.astype(np.float32), exact).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(attend(half, narrow), wanted)
    jaxpr = str(jax.make_jaxpr(attend)(half, narrow))
    assert few_rows.ATTENTION in jaxpr
    mixed = [narrow[0], exact[1]]
    assert few_rows.ATTENTION not in str(jax.make_jaxpr(attend)(queries, mixed))


@needs_compiler
def test_attention_with_scores_far_apart_and_with_nothing_to_see() -> None:
    queries, (source,) = attention_of(3, 4, 2, 1, 32, [50], batch=1)
    source = source._replace(mask=np.ones((1, 4, 50), bool))
    chex.assert_trees_all_close(
        attend(300 * queries, [source]), plain_attention(300 * queries, [source], None), atol=1e-4
    )
    source.mask[0, 2] = False
    found = np.asarray(attend(queries, [source]))
    assert not found[0, 2].any()
    seeing = np.array([0, 1, 3])
    wanted = plain_attention(queries[:, seeing], [source._replace(mask=source.mask[:, seeing])], None)
    chex.assert_trees_all_close(found[:, seeing], wanted, atol=3e-6)


@needs_compiler
@pytest.mark.parametrize(("bad", "all_keys"), [(np.nan, True), (np.inf, False)])
def test_attention_hides_no_nan(bad: float, all_keys: bool) -> None:
    queries, (source,) = attention_of(5, 2, 2, 1, 16, [20], batch=1)
    source.mask[:] = True
    source.mask[0, 1, 3] = False
    source.keys[0, 0, slice(None) if all_keys else 3] = bad
    found = np.asarray(attend(np.abs(queries), [source]))
    assert np.isnan(found[0, 0]).all()
    assert np.isnan(found[0, 1]).all() == all_keys


@needs_compiler
def test_attention_under_vmap_and_its_gradients() -> None:
    queries, sources = attention_of(4, 3, 4, 2, 16, [11, 3], batch=6)

    def split(x):
        return x.reshape(2, 3, *x.shape[1:])

    parts = jax.vmap(attend)(split(queries), jax.tree.map(split, sources))
    whole = attend(queries, sources)
    chex.assert_trees_all_equal(parts.reshape(whole.shape), whole)
    shared = jax.tree.map(lambda x: x[:3], sources)
    parts = jax.vmap(attend, (0, None))(split(queries), shared)
    chex.assert_trees_all_equal(parts[1], attend(queries[3:], shared))

    def loss(attention):
        def of(queries, pairs):
            both = [KeyValues(*pair, source.mask) for pair, source in zip(pairs, sources, strict=True)]
            return jnp.sum(jnp.sin(attention(queries, both)))

        return jax.jit(jax.grad(of, argnums=(0, 1)))(queries, [source[:2] for source in sources])

    chex.assert_trees_all_close(loss(attend), loss(functools.partial(_attend, None)), atol=1e-5)
