"""Costs follow what chunks take."""

from __future__ import annotations

import numpy as np
import pytest

from dex_jax.decoding.pace import FAR_OFF, Pace


def chunks(true: np.ndarray, count: int, step: float = 0.03, noise: float = 0.02):
    """Chunks of 4 rounds of mixed kinds and what they take."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        kinds = rng.multinomial(4, np.full(len(true) - 1, 1 / (len(true) - 1)))
        pieces = np.array([*kinds, rng.integers(0, 8)])
        yield pieces, step * float(pieces @ true) * (1 + noise * rng.standard_normal())


def test_a_second_row_that_was_measured_beside_other_load_is_put_right() -> None:
    true, given = np.array([1.02, 1.1, 1.3, 0.04]), np.array([1.02, 1.91, 2.0, 0.04])
    pace = Pace(given)
    for pieces, seconds in chunks(true, 60):
        pace.saw(pieces, seconds)
    assert pace.costs[0] == given[0]
    assert pace.costs[1] == pytest.approx(true[1], rel=0.15)
    assert pace.costs[2] == pytest.approx(true[2], rel=0.15)


def test_costs_that_are_right_stay() -> None:
    true = np.array([1.05, 1.3, 2.2, 0.05])
    for step in (1e-4, 0.03, 5.0):
        pace = Pace(true)
        for pieces, seconds in chunks(true, 40, step):
            pace.saw(pieces, seconds)
        np.testing.assert_allclose(pace.costs[:-1], true[:-1], rtol=0.1)
        assert pace.fastest == pytest.approx(step, rel=0.15)


def test_one_kind_of_work_and_none_say_nothing_of_others() -> None:
    pace = Pace(np.array([1.0, 1.2]))
    pace.saw(np.array([0, 0]), 5.0)
    assert pace.fastest == np.inf
    pace.saw(np.array([4, 0]), 4.0)
    np.testing.assert_allclose(pace.costs, [1.0, 1.2], rtol=1e-6)


def test_far_off_is_faster_than_measured() -> None:
    pace = Pace(np.array([1.0]))
    assert not pace.far_off(1e9)
    for seconds in (9.0, 4.0, 5.0):
        pace.saw(np.array([4.0]), seconds)
    assert pace.fastest == 1.0
    assert pace.far_off(FAR_OFF + 0.1)
    assert not pace.far_off(FAR_OFF - 0.1)
    assert not pace.far_off(0.1)
