"""The lattice's pure functions, one rule at a time; test_loop.py has whole runs."""

from __future__ import annotations

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dex_jax import lattice as lat
from dex_jax.lattice import NO_NODE, NO_TOKEN, Lattice, Proposals

STAGES, ROWS = 4, 3

plant, collapse, spawn, proposers, root_finished, quantized, stage_rows = (
    jax.jit(getattr(lat, name), static_argnames=("stages",) if name == "stage_rows" else ())
    for name in ("plant", "collapse", "spawn", "proposers", "root_finished", "quantized", "stage_rows")
)
empty = functools.cache(lambda: jax.tree.map(np.asarray, lat.empty(STAGES, ROWS)))


def rooted(tick: int = 0, token: int = 7, position: int = 5) -> Lattice:
    return plant(empty(), jnp.int32(tick), jnp.int32(token), jnp.int32(position), True)


def proposals(*offers: tuple[int, int, int, float]) -> Proposals:
    """Offers of (exit 1..K-1, row, token, log-probability)."""
    token = np.full((STAGES - 1, ROWS), 99, np.int32)
    log_probability = np.zeros((STAGES - 1, ROWS), np.float32)
    valid = np.zeros((STAGES - 1, ROWS), bool)
    for exit_, row, what, value in offers:
        token[exit_ - 1, row], log_probability[exit_ - 1, row], valid[exit_ - 1, row] = what, value, True
    return Proposals(token, log_probability, valid)


def grown(*ticks: Proposals, start: Lattice | None = None) -> Lattice:
    """A root of tick 0, and what one spawn a tick adds."""
    lattice = rooted() if start is None else start
    for tick, offers in enumerate(ticks, 1):
        lattice = spawn(lattice, jnp.int32(tick), offers)
    return lattice


def slot(tick: int, row: int) -> int:
    return tick % STAGES * ROWS + row


def visible(lattice: Lattice, at: int) -> set[int]:
    return set(np.flatnonzero(np.asarray(lattice.ancestors).reshape(STAGES * ROWS, -1)[at]).tolist())


def live_slots(lattice: Lattice) -> set[int]:
    return set(np.flatnonzero(np.asarray(lattice.live)).tolist())


def flat(field: jax.Array) -> np.ndarray:
    return np.asarray(field).reshape(STAGES * ROWS, *field.shape[2:])


def test_row_numbers() -> None:
    assert [lat.full_rows(k) for k in range(1, 9)] == [1, 1, 2, 4, 8, 16, 32, 64]
    assert [lat.default_rows(k) for k in (1, 2, 3, 4, 5, 6, 30)] == [1, 1, 2, 4, 8, 16, 32]


def test_stage_k_runs_the_cohort_of_tick_t_minus_k() -> None:
    for tick in range(1, 12):
        expected = [(tick - k) % STAGES for k in range(1, STAGES + 1)]
        assert stage_rows(jnp.int32(tick), stages=STAGES).tolist() == expected


def test_a_fresh_root_stands_alone_in_its_cohort() -> None:
    lattice = rooted(tick=6, token=7, position=5)
    at = slot(6, 0)
    assert int(lattice.root) == at
    assert live_slots(lattice) == {at}
    assert visible(lattice, at) == {at}
    assert (flat(lattice.token)[at], flat(lattice.position)[at]) == (7, 5)
    assert (flat(lattice.parent)[at], flat(lattice.born_at)[at]) == (NO_NODE, STAGES)


def test_plant_elsewhere_changes_nothing() -> None:
    lattice = rooted()
    again = plant(lattice, jnp.int32(2), jnp.int32(1), jnp.int32(9), False)
    chex.assert_trees_all_equal(again, lattice)


def test_the_root_finishes_after_k_ticks() -> None:
    lattice = rooted(tick=2)
    assert [bool(root_finished(lattice, jnp.int32(tick))) for tick in (3, 4, 5, 6)] == [False, False, False, True]
    assert not bool(root_finished(empty(), jnp.int32(STAGES)))


def test_a_child_knows_its_place() -> None:
    lattice = grown(proposals((1, 0, 11, -1.0)), proposals((1, 0, 21, -0.5), (2, 0, 12, -2.0)))
    root, child, deep, other = slot(0, 0), slot(1, 0), slot(2, 0), slot(2, 1)
    assert live_slots(lattice) == {root, child, deep, other}
    assert flat(lattice.token)[[child, deep, other]].tolist() == [11, 21, 12]
    assert flat(lattice.position)[[child, deep, other]].tolist() == [6, 7, 6]
    assert flat(lattice.parent)[[child, deep, other]].tolist() == [root, child, root]
    assert flat(lattice.born_at)[[child, deep, other]].tolist() == [1, 1, 2]
    assert flat(lattice.score)[[child, deep, other]].tolist() == [-1.0, -1.5, -2.0]
    assert visible(lattice, deep) == {root, child, deep}
    assert visible(lattice, other) == {root, other}
    assert flat(lattice.offered)[root].tolist() == [11, 12, NO_TOKEN]
    assert flat(lattice.offered)[child].tolist() == [21, NO_TOKEN, NO_TOKEN]


def test_who_may_propose() -> None:
    lattice = grown(proposals((1, 0, 11, -1.0)), proposals((1, 0, 21, -0.5), (2, 0, 12, -2.0)))
    # In tick 3 the root finishes stage 3, its first child stage 2, and the two nodes of tick 2 stage 1.
    expected = [[True, True, False], [True, False, False], [True, False, False]]
    assert proposers(lattice, jnp.int32(3)).tolist() == expected


def test_the_best_proposals_get_the_rows() -> None:
    lattice = grown(
        proposals((1, 0, 11, -1.0)),
        proposals((1, 0, 21, -0.5), (2, 0, 12, -2.0)),
        proposals((1, 0, 31, -0.25), (1, 1, 32, -0.125), (2, 0, 22, -3.0), (3, 0, 13, -1.0)),
    )
    third = flat(lattice.token)[slot(3, 0) : slot(3, 0) + ROWS]
    assert third.tolist() == [13, 31, 32]  # scores -1, -1.75, -2.125; -4 is pruned
    # What was pruned was never offered: a later exit may have it again.
    assert flat(lattice.offered)[slot(1, 0)].tolist() == [21, NO_TOKEN, NO_TOKEN]


def test_equal_scores_go_to_the_earlier_exit_then_to_the_earlier_row() -> None:
    start = grown(proposals((1, 0, 11, -1.0)), proposals((1, 0, 21, -1.0), (2, 0, 12, -2.0)))
    offers = proposals((1, 0, 31, 0.0), (1, 1, 32, 0.0), (2, 0, 22, -1.0), (3, 0, 13, -2.0))
    lattice = spawn(start, jnp.int32(3), offers)
    assert flat(lattice.token)[slot(3, 0) : slot(3, 0) + ROWS].tolist() == [31, 32, 22]


def test_an_invalid_proposal_spawns_nothing() -> None:
    lattice = grown(proposals())
    assert live_slots(lattice) == {slot(0, 0)}
    assert flat(lattice.offered)[slot(0, 0)].tolist() == [NO_TOKEN] * 3


def test_collapse_keeps_the_subtree_of_the_committed_token() -> None:
    lattice = grown(
        proposals((1, 0, 11, -1.0)),
        proposals((1, 0, 21, -0.5), (2, 0, 12, -0.25)),
        proposals((1, 0, 31, -0.25), (1, 1, 32, -0.125)),
    )
    outcome = collapse(lattice, jnp.int32(12))
    kept = outcome.lattice
    root, child = slot(2, 0), slot(3, 0)  # token 12 was the better proposal of tick 2, 31 hangs under it
    assert bool(outcome.matched)
    assert int(outcome.born_at) == 2
    assert int(kept.root) == root
    assert live_slots(kept) == {root, child}
    assert flat(kept.parent)[[root, child]].tolist() == [NO_NODE, root]
    # The old root's position is in the prefix now: seen there, and once only.
    assert visible(kept, root) == {root}
    assert visible(kept, child) == {root, child}
    assert flat(kept.score)[[root, child]].tolist() == [0.0, -0.25]


def test_collapse_without_a_match_leaves_nothing() -> None:
    lattice = grown(proposals((1, 0, 11, -1.0)), proposals((1, 0, 21, -0.5), (2, 0, 12, -2.0)))
    # 21 is in the lattice, but as a grandchild.
    outcome = collapse(lattice, jnp.int32(21))
    assert not bool(outcome.matched)
    assert int(outcome.born_at) == STAGES
    assert int(outcome.lattice.root) == NO_NODE
    assert live_slots(outcome.lattice) == set()


def test_a_dead_twin_of_the_committed_token_is_not_taken() -> None:
    """A slot that held the token before, under a root in the same place, is not a child."""
    stale = grown(proposals((1, 0, 11, -1.0)))
    fresh = plant(collapse(stale, jnp.int32(50)).lattice, jnp.int32(STAGES), jnp.int32(50), jnp.int32(6), True)
    assert int(fresh.root) == int(stale.root)
    assert not bool(collapse(fresh, jnp.int32(11)).matched)


def test_a_reused_ring_row_forgets_what_it_offered() -> None:
    lattice = grown(proposals((1, 0, 11, -1.0)))
    lattice = collapse(lattice, jnp.int32(11)).lattice
    for tick in (2, 3):
        lattice = spawn(lattice, jnp.int32(tick), proposals())
    # Tick 4 reuses the row of the old root: its children's tokens must not be masked for the newcomer.
    lattice = spawn(lattice, jnp.int32(4), proposals((3, 0, 12, -1.0)))
    assert flat(lattice.token)[slot(4, 0)] == 12
    assert flat(lattice.offered)[slot(4, 0)].tolist() == [NO_TOKEN] * 3


def test_one_stage_never_spawns() -> None:
    lone = lat.plant(lat.empty(1, 1), jnp.int32(0), jnp.int32(3), jnp.int32(2), jnp.bool_(True))
    none = Proposals(jnp.zeros((0, 1), jnp.int32), jnp.zeros((0, 1)), jnp.zeros((0, 1), bool))
    chex.assert_trees_all_equal(lat.spawn(lone, jnp.int32(1), none), lone)


@hypothesis.given(st.floats(-100, 5, width=32))
def test_scores_are_multiples_of_the_step_within_its_bounds(log_probability: float) -> None:
    step = float(quantized(jnp.float32(log_probability)))
    assert step / lat.SCORE_STEP == int(step / lat.SCORE_STEP)
    assert lat.MIN_LOG_PROBABILITY <= step <= 0
    assert abs(step - min(max(log_probability, -64.0), 0.0)) <= lat.SCORE_STEP / 2


@pytest.mark.parametrize("value", [-np.inf, -64.0])
def test_the_worst_score_is_finite(value: float) -> None:
    """An impossible token must stay apart from no proposal at all, which is -inf."""
    assert float(quantized(jnp.float32(value))) == lat.MIN_LOG_PROBABILITY


def test_sums_of_scores_do_not_depend_on_their_order() -> None:
    rng = np.random.default_rng(0)
    steps = np.asarray(quantized(jnp.asarray(rng.uniform(-64, 0, 64), jnp.float32)))
    sums = {float(functools.reduce(lambda a, b: np.float32(a + b), rng.permutation(steps))) for _ in range(20)}
    assert len(sums) == 1
