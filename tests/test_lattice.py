"""Test the lattice's pure functions apart from whole runs, which tests/test_loop.py compares tick by tick."""

from __future__ import annotations

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from dex_jax import lattice as lat
from dex_jax.lattice import NO_NODE, Lattice, Proposals

STAGES, ROWS = 4, 3
quantized = jax.jit(lat.quantized)


@jax.jit
def ended(lattice: Lattice, final: jax.Array, tick: jax.Array) -> tuple[lat.Path, Lattice]:
    """Return the path of one level that a tick commits, and the lattice that it leaves."""
    path = lat.follow(lattice, final, tick, levels=1)
    return path, lat.collapse(lattice, path)


@jax.jit
def plant(lattice: Lattice, tick: int, token: int, position: int) -> Lattice:
    """Return the lattice with a fresh root."""
    return lat.spawn(lattice, tick, lat.widen(lat.fresh_root(token, position, STAGES), ROWS))


def followed(lattice: Lattice, token: int) -> tuple[lat.Path, Lattice]:
    """Return the path and the lattice that remains, if the root has finished and the final layer gives this token."""
    return ended(lattice, jnp.array([token, -5, -5]), 10 * STAGES + int(lattice.root) // ROWS)


def test_a_dead_twin_of_the_committed_token_is_not_taken() -> None:
    """A slot that held the token before, under a root in the same slot, is not a child."""
    offered = jnp.zeros((STAGES - 1, ROWS), bool).at[0, 0].set(True)
    offers = Proposals(jnp.full(offered.shape, 11), jnp.where(offered, -1.0, 0.0), offered)
    lattice = plant(lat.empty(STAGES, ROWS), 0, 7, 5)
    stale = jax.jit(lambda lattice: lat.spawn(lattice, 1, lat.seeds(lattice, 1, offers)))(lattice)
    assert int(followed(stale, 11)[0].heir) == ROWS
    fresh = plant(followed(stale, 50)[1], STAGES, 50, 6)
    assert int(fresh.root) == int(stale.root)
    assert int(followed(fresh, 11)[0].heir) == NO_NODE


@hypothesis.given(st.floats(-100, 5, width=32) | st.just(-np.inf))
def test_scores_are_multiples_of_the_step_within_its_bounds(log_probability: float) -> None:
    step = float(quantized(jnp.float32(log_probability)))
    assert step / lat.SCORE_STEP == int(step / lat.SCORE_STEP)
    assert lat.MIN_LOG_PROBABILITY <= step <= 0
    assert abs(step - min(max(log_probability, -64.0), 0.0)) <= lat.SCORE_STEP / 2


def test_sums_of_scores_do_not_depend_on_their_order() -> None:
    rng = np.random.default_rng(0)
    steps = np.asarray(quantized(jnp.asarray(rng.uniform(-64, 0, 64), jnp.float32)))
    sums = {float(functools.reduce(lambda a, b: np.float32(a + b), rng.permutation(steps))) for _ in range(20)}
    assert len(sums) == 1
