"""The lattice's pure functions, one rule at a time; test_loop.py has whole runs."""

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

STATIC = {"stage_rows": ("stages",), "follow": ("levels",), "seeds": ("size",), "fresh_root": ("stages", "size")}
proposers, root_finished, quantized, stage_rows, follow, collapsed, enter, seeds, fresh_root = (
    jax.jit(getattr(lat, name), static_argnames=STATIC.get(name, ()))
    for name in (
        *("proposers", "root_finished", "quantized", "stage_rows"),
        *("follow", "collapse", "spawn", "seeds", "fresh_root"),
    )
)
empty = functools.cache(lambda: jax.tree.map(np.asarray, lat.empty(STAGES, ROWS)))


def plant(lattice: Lattice, tick: int, token: int, position: int) -> Lattice:
    return enter(lattice, tick, fresh_root(token, position, stages=STAGES, size=ROWS), True)


def spawn(lattice: Lattice, tick: int, offers: Proposals) -> Lattice:
    return enter(lattice, tick, seeds(lattice, tick, offers, size=ROWS), False)


def commit(lattice: Lattice, *tokens: int, levels: int = 1) -> tuple[lat.Path, Lattice]:
    """What is committed and left when the root has finished and the final layer says tokens[i] after row i."""
    tick = 10 * STAGES + int(lattice.root) // ROWS
    final = np.array([*tokens, *[-5] * ROWS][:ROWS], np.int32)
    path = follow(lattice, final, tick, levels=levels)
    return path, collapsed(lattice, path)


def rooted(tick: int = 0, token: int = 7, position: int = 5) -> Lattice:
    return plant(empty(), tick, token, position)


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
        lattice = spawn(lattice, tick, offers)
    return lattice


def slot(tick: int, row: int) -> int:
    return tick % STAGES * ROWS + row


def visible(lattice: Lattice, at: int) -> set[int]:
    return set(np.flatnonzero(np.asarray(lattice.ancestors).reshape(STAGES * ROWS, -1)[at]).tolist())


def live_slots(lattice: Lattice) -> set[int]:
    return set(np.flatnonzero(np.asarray(lattice.live)).tolist())


def flat(field: jax.Array) -> np.ndarray:
    return np.asarray(field).reshape(STAGES * ROWS, *field.shape[2:])


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


def test_the_best_proposals_get_the_rows() -> None:
    lattice = grown(
        proposals((1, 0, 11, -1.0)),
        proposals((1, 0, 21, -0.5), (2, 0, 12, -2.0)),
        proposals((1, 0, 31, -0.25), (1, 1, 32, -0.125), (2, 0, 22, -3.0), (3, 0, 13, -1.0)),
    )
    third = flat(lattice.token)[slot(3, 0) : slot(3, 0) + ROWS]
    assert third.tolist() == [13, 31, 32]  # scores -1, -1.75, -2.125; -4 is pruned
    assert live_slots(grown(proposals())) == {slot(0, 0)}


def test_equal_scores_go_to_the_earlier_exit_then_to_the_earlier_row() -> None:
    start = grown(proposals((1, 0, 11, -1.0)), proposals((1, 0, 21, -1.0), (2, 0, 12, -2.0)))
    offers = proposals((1, 0, 31, 0.0), (1, 1, 32, 0.0), (2, 0, 22, -1.0), (3, 0, 13, -2.0))
    lattice = spawn(start, 3, offers)
    assert flat(lattice.token)[slot(3, 0) : slot(3, 0) + ROWS].tolist() == [31, 32, 22]


def test_collapse_keeps_the_subtree_of_the_committed_token() -> None:
    lattice = grown(
        proposals((1, 0, 11, -1.0)),
        proposals((1, 0, 21, -0.5), (2, 0, 12, -0.25)),
        proposals((1, 0, 31, -0.25), (1, 1, 32, -0.125)),
    )
    path, kept = commit(lattice, 12)
    root, child = slot(2, 0), slot(3, 0)  # token 12 was the better proposal of tick 2, 31 hangs under it
    assert (int(path.length), int(path.heir), int(path.born_at[0])) == (1, root, 2)
    assert int(kept.root) == root
    assert live_slots(kept) == {root, child}
    assert flat(kept.parent)[[root, child]].tolist() == [NO_NODE, root]
    # The old root's position is in the prefix now: seen there, and once only.
    assert visible(kept, root) == {root}
    assert visible(kept, child) == {root, child}
    assert flat(kept.score)[[root, child]].tolist() == [0.0, -0.25]


def drafted(*below: tuple[int, int]) -> lat.Cohort:
    """A fresh root with token 7 at position 5, and drafts (row above, token) with one more row each."""
    cohort = fresh_root(7, 5, stages=STAGES, size=ROWS)
    for first, (above, token) in enumerate(below, 1):
        candidate = lat.Candidates(jnp.array([token]), jnp.array([above]), jnp.array([-0.5 * first]))
        cohort = lat.grow(cohort, candidate, first, 1, 1)
    return cohort


def test_a_path_is_committed_as_far_as_its_cohort_drafted_rightly() -> None:
    lattice = enter(empty(), 0, drafted((0, 8), (1, 9)), True)
    assert visible(lattice, 2) == {0, 1, 2}
    assert (flat(lattice.position)[:ROWS].tolist(), flat(lattice.born_at)[:ROWS].tolist()) == ([5, 6, 7], [4, 0, 0])
    lattice = grown(proposals((1, 2, 11, -1.0)), start=lattice)  # exit 1 goes on from the second draft
    path, kept = commit(lattice, 8, 9, 11, levels=3)
    assert path.slot.tolist() == [0, 1, 2]
    assert path.token.tolist() == [8, 9, 11]
    assert path.born_at.tolist() == [0, 0, 1]
    assert (int(path.length), int(path.heir), int(kept.root)) == (3, slot(1, 0), slot(1, 0))
    assert live_slots(kept) == {slot(1, 0)}
    assert visible(kept, slot(1, 0)) == {slot(1, 0)}
    for said, length, heir in (((8, 5), 2, NO_NODE), ((5,), 1, NO_NODE), ((9,), 1, NO_NODE)):
        path, kept = commit(lattice, *said, levels=3)
        assert (int(path.length), int(path.heir), live_slots(kept)) == (length, heir, set())


def test_a_dead_twin_of_the_committed_token_is_not_taken() -> None:
    """A slot that held the token before, under a root in the same place, is not a child."""
    stale = grown(proposals((1, 0, 11, -1.0)))
    fresh = plant(commit(stale, 50)[1], STAGES, 50, 6)
    assert int(fresh.root) == int(stale.root)
    assert int(commit(fresh, 11)[0].heir) == NO_NODE


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
