"""Few rows in C++: products, norms, gates and turned heads, when they are used, and that they change only speed."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from hypothesis import example, given, settings
from reference.small_models import LLAMA, random_transformer

import dex_jax
from dex_jax.nn import cache, few_rows, native
from dex_jax.nn.few_rows import few_rows_norm, few_rows_product
from dex_jax.nn.forward import extend, run_tree
from dex_jax.nn.layers import _rms_norm, gated, linear, rms_norm
from dex_jax.nn.rotary import Rotation, _rotated, turned
from dex_jax.nn.weights import merge_model

COMPILER = os.environ.get("CXX") or next(filter(None, map(shutil.which, native.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")


# Without jit these would be compiled anew at every call.
gated_once = jax.jit(gated, static_argnums=1)
turned_once = jax.jit(turned, static_argnums=(2, 3))
norm_once = jax.jit(rms_norm, static_argnums=2)


def random(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_product(found: jax.Array, rows: np.ndarray, kernel: np.ndarray) -> None:
    """Assert that a product is right to within float32's rounding of the sum of magnitudes."""
    wide, magnitudes = rows.astype(np.float64) @ kernel.T, np.abs(rows).astype(np.float64) @ np.abs(kernel).T
    assert found.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(found) - wide) <= 1e-7 * (4 + rows.shape[-1] / 8) * magnitudes)


@needs_compiler
def test_it_is_used_here() -> None:
    assert few_rows.ready()

    def asked(rows: int, dtype: str, kept: str) -> bool:
        return few_rows.PRODUCT in str(jax.make_jaxpr(linear)(jnp.zeros((rows, 8), dtype), jnp.zeros((5, 8), kept)))

    assert not asked(1, "float16", "float16")
    assert all(asked(rows, "float32", kept) for rows in (1, 700) for kept in ("float32", "bfloat16"))
    assert all(asked(rows, "bfloat16", "bfloat16") for rows in (1, 700))


# Each size is another program, so there are only a few examples.
few_examples = settings(max_examples=12)


@needs_compiler
@few_examples
@given(
    st.integers(0, 80), st.integers(0, 70), st.integers(0, 90), st.sampled_from(few_rows.DTYPES), st.integers(0, 100)
)
@example(rows=131, width=1539, outputs=577, kept=few_rows.DTYPES[0], seed=0)
@example(rows=131, width=1539, outputs=577, kept=few_rows.DTYPES[1], seed=0)
@example(rows=8, width=1536, outputs=576, kept=few_rows.DTYPES[0], seed=0)
@example(rows=12, width=576, outputs=3072, kept=few_rows.DTYPES[0], seed=0)
@example(rows=12, width=576, outputs=3072, kept=few_rows.DTYPES[1], seed=0)
def test_the_product_and_each_row_alone(rows: int, width: int, outputs: int, kept: np.dtype, seed: int) -> None:
    x, kernel = random(seed, (rows, width), (outputs, width))
    kernel = kernel.astype(kept)
    found = few_rows_product(x, kernel)
    assert_product(found, x, kernel.astype(np.float32))
    for row in {0, rows // 2, rows - 1} & {*range(rows)}:
        chex.assert_trees_all_equal(few_rows_product(x[row][None], kernel)[0], found[row])


@needs_compiler
def test_rows_of_zeros_give_zeros_without_a_look_at_the_kernel() -> None:
    assert few_rows.ready()
    x, kernel = random(4, (70, 40), (30, 40))
    wanted = np.array(few_rows_product(x, kernel))
    gone = [*range(3, 20), 41, *range(50, 70)]
    x[gone], wanted[gone] = 0, 0
    chex.assert_trees_all_equal(np.asarray(few_rows_product(x, kernel)), wanted)
    assert not np.any(few_rows_product(np.zeros_like(x), np.full_like(kernel, np.nan)))


@needs_compiler
def test_what_lies_beyond_a_prompt_is_not_computed() -> None:
    config = dataclasses.replace(LLAMA, num_layers=3, head_dim=16, qkv_bias=True)
    model = random_transformer(config, 0)
    memory = cache.allocate(config, 2, 64, 0, jnp.dtype(jnp.float32))
    tokens, start = np.random.default_rng(0).integers(config.vocab_size, size=(2, 24)), jnp.asarray([0, 5])
    lengths = np.array([7, 5 + 19])
    (*_, whole), _ = extend(model, memory, tokens, start)
    (*_, found), _ = extend(model, memory, tokens, start, jnp.asarray(lengths))
    for row, end in enumerate(lengths - np.asarray(start)):
        chex.assert_trees_all_equal(found[row, :end], whole[row, :end])
        assert not np.any(found[row, end:])


@needs_compiler
def test_under_vmap_of_rows_kernels_and_both() -> None:
    x, kernels = random(1, (3, 4, 5, 20), (3, 7, 20))
    for each in (x, x.transpose(1, 0, 2, 3)):
        first = 0 if each is x else 1
        nested = jax.jit(jax.vmap(jax.vmap(few_rows_product, (0, None)), (first, 0)))
        wanted = np.stack([[rows @ kernel.T for rows in sets] for sets, kernel in zip(x, kernels, strict=True)])
        chex.assert_trees_all_close(nested(each, kernels), wanted, atol=1e-5)
    one_set = jax.vmap(few_rows_product, (None, 0))(x[0, 0], kernels)
    chex.assert_trees_all_close(one_set, np.stack([x[0, 0] @ kernel.T for kernel in kernels]), atol=1e-5)
    pairs = jax.vmap(jax.vmap(few_rows_product, (None, 0)), (0, None))(x[0], kernels)
    chex.assert_trees_all_close(pairs, np.stack([[r @ k.T for k in kernels] for r in x[0]]), atol=1e-5)


@needs_compiler
def test_in_bfloat16_and_against_a_kernel_kept_in_it() -> None:
    x, kernel, weights = random(3, (4, 24), (6, 24), (4, 6))
    kept = kernel.astype(few_rows.DTYPES[1])
    narrow = x.astype(few_rows.DTYPES[1])
    found = linear(narrow, kept)
    assert found.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found, few_rows_product(narrow, kept).astype(jnp.bfloat16))
    wide = linear(x, kept)
    assert wide.dtype == jnp.float32
    many = linear(np.tile(x, (200, 1)), kept)
    chex.assert_trees_all_equal(many[-4:], wide)

    def loss(product, kernel):
        return jax.grad(lambda x, kernel: jnp.sum(weights * product(x, kernel)), argnums=(0, 1))(x, kernel)

    by_kernel = loss(linear, jnp.asarray(kept))
    assert [each.dtype for each in by_kernel] == [jnp.float32, jnp.bfloat16]
    wanted = loss(lambda x, kernel: x @ kernel.T, jnp.asarray(kept, jnp.float32))
    chex.assert_trees_all_close(by_kernel[0], wanted[0], atol=1e-5)
    chex.assert_trees_all_close(by_kernel[1].astype(jnp.float32), wanted[1], rtol=0.01)


@needs_compiler
@few_examples
@given(st.integers(1, 20), st.integers(1, 60), st.sampled_from(few_rows.DTYPES), st.integers(0, 100))
@example(rows=16, width=576, kept=few_rows.DTYPES[0], seed=0)
def test_the_norm_and_each_row_alone(rows: int, width: int, kept: np.dtype, seed: int) -> None:
    narrow, kept_scale = (each.astype(kept) for each in random(seed, (rows, width), (width,)))
    x, scale = narrow.astype(np.float32), kept_scale.astype(np.float32)
    found = few_rows_norm(x, scale, 1e-5)
    wanted = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5) * scale
    chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-6)
    alone = np.concatenate([few_rows_norm(row[None], scale, 1e-5) for row in x])
    chex.assert_trees_all_equal(alone, np.asarray(found))
    chex.assert_trees_all_equal(np.asarray(norm_once(narrow, kept_scale, 1e-5)), np.asarray(found).astype(kept))


@needs_compiler
@few_examples
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(["silu", "gelu"]), st.integers(0, 100))
@example(rows=16, width=1536, activation="silu", seed=0)
def test_the_gate_and_each_row_alone(rows: int, width: int, activation: str, seed: int) -> None:
    (x,) = random(seed, (rows, 2 * width))
    x *= np.float32(10) ** np.random.default_rng(seed).integers(-3, 3, x.shape)
    found = np.asarray(gated_once(x, activation))
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):
        tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
        wanted = (gate / (1 + np.exp(-gate)) if activation == "silu" else gate * (1 + tanh) / 2) * up
    magnitude = np.abs(gate * up) if activation == "gelu" else np.abs(wanted)
    assert np.all(np.abs(found - wanted) <= 1e-6 * magnitude + 1e-30)
    alone = np.concatenate([gated_once(row[None], activation) for row in x])
    chex.assert_trees_all_equal(alone, found)
    narrow = x.astype(few_rows.DTYPES[1])
    exact = np.asarray(gated_once(narrow.astype(np.float32), activation))
    chex.assert_trees_all_equal(np.asarray(gated_once(narrow, activation)), exact.astype(narrow.dtype))


@needs_compiler
@few_examples
@given(st.sampled_from([(4, 2, 16, 8), (3, 3, 10, 3), (9, 3, 64, 32)]), st.integers(1, 20), st.integers(0, 100))
def test_turned_heads_and_each_row_alone(sizes: tuple[int, ...], rows: int, seed: int) -> None:
    heads, groups, width, half = sizes
    x, angles = random(seed, (2, rows, (heads + 2 * groups) * width), (2, rows, half))
    rotation = Rotation(np.cos(angles), np.sin(angles))
    found = jax.tree.map(np.asarray, turned_once(x, rotation, groups, width))
    each = x.reshape(2, rows, -1, width)
    tables = (table[..., None, :] for table in rotation[:2])
    both = np.asarray(jax.jit(_rotated)(each[:, :, : heads + groups], *tables))
    wanted = [both[:, :, :heads], both[:, :, heads:].swapaxes(1, 2), each[:, :, heads + groups :].swapaxes(1, 2)]
    chex.assert_trees_all_close(found, tuple(wanted), atol=1e-6)
    for row in {0, rows - 1}:
        cut = Rotation(*(part[:, row : row + 1] for part in rotation[:2]))
        alone = jax.tree.map(np.asarray, turned_once(x[:, row : row + 1], cut, groups, width))
        chex.assert_trees_all_equal(alone[0], found[0][:, row : row + 1])
        chex.assert_trees_all_equal(alone[1:], tuple(part[:, :, row : row + 1] for part in found[1:]))
    narrow = x.astype(few_rows.DTYPES[1])
    half_precision = turned_once(narrow, rotation, groups, width)
    exact = turned_once(narrow.astype(np.float32), rotation, groups, width)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, half_precision),
        jax.tree.map(lambda part: np.asarray(part).astype(narrow.dtype), exact),
    )


@needs_compiler
def test_the_norm_under_vmap_and_its_gradients() -> None:
    x, scales = random(7, (3, 2, 4, 10), (3, 10))
    for of_x, of_scale in ((0, 0), (0, None), (None, 0)):
        sets, scale = x if of_x == 0 else x[1], scales if of_scale == 0 else scales[1]
        found = jax.jit(jax.vmap(lambda x, scale: rms_norm(x, scale, 1e-5), (of_x, of_scale)))(sets, scale)
        wanted = np.stack(
            [norm_once(x[i if of_x == 0 else 1], scales[i if of_scale == 0 else 1], 1e-5) for i in range(3)]
        )
        chex.assert_trees_all_equal(np.asarray(found), wanted)
    assert few_rows.NORM in str(jax.make_jaxpr(lambda x: rms_norm(x, scales[0], 1e-5))(x))

    def loss(norm):
        return jax.jit(jax.grad(lambda x, scale: jnp.sum(jnp.sin(norm(x, scale, 1e-5))), (0, 1)))(x, scales[0])

    chex.assert_trees_all_close(loss(rms_norm), loss(_rms_norm), atol=1e-5)


@functools.cache
def steps_of(dtype: str):
    """Return an empty cache, a step of AR -> (logits [V], cache), and a function -> logits [N, V] of a tree's rows."""
    config = dataclasses.replace(LLAMA, num_layers=3, width=576, head_dim=16, mlp_width=200)
    lm = dex_jax.LanguageModel(random_transformer(config, 0, dtype), None, "random", "0")

    @jax.jit
    def one(memory, token, start):
        model = merge_model(config, lm.weights)
        states, memory = extend(model, memory, jnp.full((1, 1), token), jnp.full(1, start))
        return model.logits(states[-1])[0, 0], memory

    @jax.jit
    def tree(memory, token, position, ancestors, prefix):
        model = merge_model(config, lm.weights)
        embedded = model.embed_tokens(token[None])
        hidden, _ = run_tree(model, memory, embedded, position[None], ancestors[None], jnp.full(1, prefix))
        return model.logits(hidden)[0]

    return cache.allocate(config, 1, 64, 0, jnp.dtype(dtype)), one, tree


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
@given(st.sampled_from([2, 16, 96]), st.integers(1, 30), st.integers(0, 1000))
@few_examples
def test_rows_of_a_tree_have_ars_logits_to_the_last_bit(dtype: str, rows: int, prefix: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    memory, one, tree = steps_of(dtype)
    for position in range(prefix):
        _, memory = one(memory, generator.integers(LLAMA.vocab_size), position)
    parent = np.array([-1, *(generator.integers(i) for i in range(1, rows))])
    token = generator.integers(LLAMA.vocab_size, size=rows)
    depth, ancestors = np.zeros(rows, int), np.eye(rows, dtype=bool)
    memories, wanted = [], []
    for node in range(rows):
        before = memory
        if node:
            depth[node] = depth[parent[node]] + 1
            ancestors[node] |= ancestors[parent[node]]
            before = memories[parent[node]]
        logits, own = one(before, token[node], prefix + depth[node])
        memories.append(own)
        wanted.append(logits)
    found = tree(memory, jnp.asarray(token), jnp.asarray(prefix + depth), jnp.asarray(ancestors), prefix)
    chex.assert_trees_all_equal(found, jnp.stack(wanted))
