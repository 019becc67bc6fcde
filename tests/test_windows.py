"""Layers with a sliding window: what their rings hold, and that no method loses a token by them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax.config import LayerKind
from dex_jax.nn import cache, kinds
from dex_jax.nn.kinds import KindTable, masks_and_rotations, ring_length, ring_of, ring_size
from dex_jax.nn.transformer import Staged

WINDOW = 6
MIXED = (LayerKind(WINDOW, "local"), LayerKind(), LayerKind(WINDOW, "local"), LayerKind(WINDOW, "local"))
CONFIG = dataclasses.replace(LLAMA, context=8192, layer_kinds=MIXED, local_rope_theta=500.0, eos_ids=())


@settings(max_examples=12)
@given(
    window=st.integers(1, 9),
    writes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=12),
    above=st.integers(0, 3),
)
def test_a_ring_shows_the_last_positions_and_nothing_else(
    window: int, writes: list[tuple[int, int]], above: int
) -> None:
    """Each call writes some rows and commits a part of them; what lies beyond is overwritten or never seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "MOST_WRITTEN", 8)
        patch.setattr(cache, "MOST_WRITTEN", 8)
        kind, length = LayerKind(window), ring_length(window)
        assert ring_of([kind], length) == ring_size(window) >= window + 8
        held, prefix, truth = jnp.full((1, 1, length, 1), -1.0), 0, []
        for rows, kept in writes:
            # Negative numbers stand for wrong guesses.
            new = [float(prefix + i) if i < kept else -2.0 for i in range(rows)]
            block = jnp.asarray(new)[None, None, :, None]
            held = cache.write_rows(held, block, jnp.array([prefix]), kinds=[kind])
            held = cache.write_rows(held, block * 0 - 7, jnp.array([cache.NOWHERE]), kinds=[kind])
            truth += new[:kept]
            prefix = len(truth)
        position = jnp.array([[prefix + above]])
        among = jnp.ones((1, 1, 1), bool)
        ((masks,),) = masks_and_rotations(CONFIG, KindTable(((kind,),)), position, jnp.array([prefix]), [length], among)
        seen = np.asarray(held)[0, 0, np.asarray(masks.committed)[0, 0], 0]
        assert sorted(seen) == [p for p in truth if prefix + above - p < window]


def test_only_layers_that_share_a_window_share_a_ring() -> None:
    def lengths(length=4096, layout=None) -> list[int]:
        keys = cache.shapes(CONFIG, 2, length, 3, jnp.dtype(jnp.float32), True, layout).keys
        return [leaf.shape[-2] for leaf in keys]

    short = ring_length(WINDOW)
    assert lengths() == [short, 4096, short, short]
    assert lengths(1024) == [1024] * 4
    assert lengths(layout=Staged((2, 4))) == [short, 4096]


@pytest.fixture(scope="module")
def plain():
    """Return prompts, the two long ones ending shortly before a ring does, and the tokens of AR without any ring."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, LLAMA.vocab_size, size).tolist() for size in (2040, 7, 1010)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ring_length", lambda window: 10**9)
        out = dex_jax.generate(small_model(CONFIG), prompts, method=dex_jax.AR(), max_new_tokens=24, exits="shared")
    return prompts, out.tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [dex_jax.Dex(explorers=1), dex_jax.AR(), dex_jax.Dex(explorers=3, rows=8)],
    ids=lambda method: type(method).__name__,
)
def test_rings_lose_no_token(plain, method) -> None:
    prompts, tokens = plain
    # Its cache has another size than that of `plain`, so that no program is shared with it.
    out = dex_jax.generate(small_model(CONFIG), prompts, method=method, max_new_tokens=24, exits="shared")
    assert out.tokens.tolist() == tokens
