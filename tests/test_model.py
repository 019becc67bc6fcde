"""The layers against plain NumPy."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.compiled import assumed
from reference.small_models import LLAMA, random_transformer, small_model

from dex_jax import RopeScaling
from dex_jax.language_model import default_dtype, resolve_dtype
from dex_jax.nn import cache, rotary
from dex_jax.nn.forward import extend, run_tree
from dex_jax.nn.layers import rms_norm
from dex_jax.nn.rotary import rope_frequencies, rope_table
from dex_jax.nn.weights import merge_model


def test_the_norm_of_large_activations_in_half_precision() -> None:
    """The squares of such activations overflow unless float32 adds them up."""
    large = jnp.full((1, 8), 300.0, jnp.float16)
    assert np.isfinite(rms_norm(large, jnp.ones(8, jnp.float16), 1e-5)).all()


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 7], [100, 5, 2]])
    x = rng.standard_normal((2, 3, 4, 8)).astype(np.float32)
    angles = positions[:, :, None] * LLAMA.rope_theta ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None, :]
    expected = np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)
    tables = (table[..., None, :] for table in rope_table(jnp.asarray(positions), LLAMA)[:2])
    chex.assert_trees_all_close(rotary._rotated(x, *tables), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("half", [4, 3])
def test_rotation_by_a_product_as_on_tpus_is_exact(dtype: str, half: int) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 8)), dtype)
    cos, sin = jnp.asarray(rng.uniform(-1, 1, (2, 2, 1, 5, half)), jnp.float32)
    halves, product = rotary._by_halves(x, cos, sin), rotary._by_product(x, cos, sin)
    assert product.dtype == halves.dtype == dtype
    # XLA may add products without rounding them first.
    chex.assert_trees_all_close(product, halves, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


@pytest.mark.slow
def test_steps_of_few_rows_on_a_tpu_run_eight_and_give_the_same_bits() -> None:
    """XLA multiplies here, on this CPU; a token runs alone, and as the root of trees of eight and of three."""
    model = random_transformer(LLAMA, 0, jnp.dtype(jnp.bfloat16))
    tokens = jnp.asarray(np.random.default_rng(0).integers(LLAMA.vocab_size, size=(1, 17)))
    empty = cache.allocate(LLAMA, 1, 64, 0, model.dtype)
    with assumed("v5e"):
        _, memory = jax.jit(lambda memory: extend(model, memory, tokens[:, :9], jnp.zeros(1, jnp.int32)))(empty)
        step = jax.jit(lambda memory, token: extend(model, memory, token, jnp.full(1, 9)))
        assert f"[1,8,{LLAMA.width}]" in str(jax.make_jaxpr(step)(memory, tokens[:, 9:10]))
        (*_, alone), after = step(memory, tokens[:, 9:10])
        among, position = jnp.tril(jnp.ones((1, 8, 8), bool)), jnp.arange(9, 17)[None]

        @jax.jit
        def tree(memory: cache.Memory, token: jax.Array) -> object:
            size, embedded = token.shape[1], model.embed_tokens(token)
            return run_tree(model, memory, embedded, position[:, :size], among[:, :size, :size], jnp.full(1, 9))

        rows, (keys, values) = tree(memory, tokens[:, 9:])
        few, fresh = tree(memory, tokens[:, 9:12])
    chex.assert_trees_all_equal(alone[:, 0], rows[:, 0])
    chex.assert_trees_all_equal((few, *fresh), (rows[:, :3], keys[:, :, :, :3], values[:, :, :, :3]))
    for i in range(LLAMA.num_layers):
        chex.assert_trees_all_equal(
            (after.keys[i][:, :, 9], after.values[i][:, :, 9]), (keys[i, :, :, 0], values[i, :, :, 0])
        )
        chex.assert_trees_all_equal(after.keys[i][:, :, 10:], memory.keys[i][:, :, 10:])


def test_linear_scaling_divides_every_frequency_and_llama3s_the_low_ones() -> None:
    stretched = dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(rope_frequencies(stretched) * 4, rope_frequencies(LLAMA), rtol=1e-6)
    config = dataclasses.replace(LLAMA, head_dim=64, rope_theta=500000.0)
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    before = rope_frequencies(config)
    after = rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    wavelength = 2 * np.pi / before
    high, low = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert high.any() and low.any() and (~high & ~low).any()  # noqa: PT018
    np.testing.assert_array_equal(after[high], before[high])
    np.testing.assert_allclose(after[low], before[low] / 8, rtol=1e-6)
    between = ~high & ~low
    assert ((after < before) & (after > before / 8))[between].all()


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "7.5", jnp.float16),
        ("gpu", "9.0", jnp.bfloat16),
        ("gpu", "gfx942", jnp.bfloat16),
        ("tpu", None, jnp.bfloat16),
    ],
)
def test_the_default_dtype_of_a_device(platform, capability, expected, monkeypatch) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert default_dtype() == expected


def test_float16_on_a_cpu_is_float32(monkeypatch, capsys) -> None:
    for platform, expected in (("cpu", jnp.float32), ("gpu", jnp.float16)):
        monkeypatch.setattr(jax, "devices", lambda platform=platform: [SimpleNamespace(platform=platform)])
        assert resolve_dtype("float16") == expected
        assert ["float32" in line for line in capsys.readouterr().err.splitlines()] == [True] * (platform == "cpu")


def test_sines_are_computed_once_and_not_in_every_layer() -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=3))
    tokens = jnp.zeros((1, 4), jnp.int32)
    memory = cache.allocate(lm.config, 1, 8, 0, jnp.dtype(jnp.float32))

    def one_step(weights, tokens, start):
        return extend(merge_model(lm.config, weights), memory, tokens, start)[0]

    compiled = jax.jit(one_step).lower(lm.weights, tokens, jnp.zeros(1, jnp.int32)).compile().as_text()
    assert [len(re.findall(rf" {name}\(", compiled)) for name in ("cosine", "sine")] == [1, 1]
