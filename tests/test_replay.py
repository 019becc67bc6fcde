"""The replayed lattice against the decode loop on models in exact arithmetic."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from reference import toy_runs, twin
from reference.toy_models import ToyModel, random_tables

from dex_jax.evaluation.planner.replay import Table, replay
from dex_jax.lattice import full_rows

VOCAB, BATCH = 12, 6


@functools.cache
def _explored(stages: int, rows: int, draft: int | None = None):
    """(model, case, the twin's runs, every tick of the library's loop)."""
    tables = random_tables(stages, stages, VOCAB, openness=0.3, draft_size=draft)
    model = ToyModel(tables)
    case = toy_runs.random_case(stages, BATCH, VOCAB, sampled=False)
    shape = {"stages": stages, "rows": rows, "decs": True}
    runs = toy_runs.twin_runs(model, case, vocab_size=VOCAB, **shape)
    return model, case, runs, toy_runs.watched(tables, case, [run.tokens[0] for run in runs], **shape)


def _table(model: ToyModel, case: toy_runs.Case, runs: list[twin.Run], stages: int) -> Table:
    """What teacher forcing says of the emitted texts, by the twin: one position and one exit at a time."""
    right, score = [], []
    for prompt, run in zip(case.prompts, runs, strict=True):
        for i, token in enumerate(run.tokens):
            before = (*prompt, *run.tokens[:i])
            node = twin.Node(before[-1], None, before, stages, progress=0)
            found = []
            for stage in range(1, stages):
                node.progress = stage
                child = twin.proposal(model, node, True, None)
                node.children += [] if child is None else [child]
                found.append((child is not None and child.token == token, -np.inf if child is None else child.score))
            right.append([r for r, _ in found])
            score.append([s for _, s in found])

    def for_every_birth(values: list, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, dtype), (stages, len(values), stages - 1))

    lengths = tuple(len(run.tokens) for run in runs)
    return Table(stages, for_every_birth(right, bool), for_every_birth(score, float), lengths)


@pytest.mark.parametrize(("stages", "draft"), [(2, None), (3, None), (4, None), (5, 3)])
def test_without_a_cap_it_is_the_loop(stages: int, draft: int | None) -> None:
    rows = full_rows(stages)
    model, case, runs, ticks = _explored(stages, rows, draft)
    found = replay(_table(model, case, runs, stages), rows)
    assert found.ticks == sum(run.ticks for run in runs)
    assert found.tokens == sum(len(run.tokens) - 1 for run in runs)
    exits = [exit_ for run in runs for exit_ in run.exits[1:]]
    np.testing.assert_allclose(found.exits, [exits.count(k) / len(exits) for k in range(1, stages + 1)])
    # The lattice that a tick finds is what the one before has left; before the first there is the root alone.
    live, widest = np.zeros(stages), np.zeros(rows + 1)
    for row, run in enumerate(runs):
        for tick in range(1, run.ticks + 1):
            by_ring = np.zeros(stages) if tick > 1 else np.eye(stages)[0]
            if tick > 1:
                by_ring = ticks.lattice.live[tick - 2, row].sum(axis=1)
            by_stage = by_ring[(tick - 1 - np.arange(stages)) % stages]
            live += by_stage
            widest[int(by_stage.max())] += 1
    np.testing.assert_allclose(found.live, live / found.ticks)
    # Survivors stand at or behind the row that their number says.
    assert (np.cumsum(found.widest) <= np.cumsum(widest / found.ticks) + 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_cap_costs_ticks_only(seed: int) -> None:
    model, case, runs, _ = _explored(5, 8)
    table = _table(model, case, runs, 5)
    counts = [replay(table, rows, seed) for rows in (1, 2, 4, 8, 16)]
    ticks = [found.ticks for found in counts]
    assert ticks[0] > ticks[-2] == ticks[-1]
    assert min(ticks) == ticks[-1]
    for rows, found in zip((1, 2, 4, 8, 16), counts, strict=True):
        assert found.tokens == counts[0].tokens
        assert found.used.shape == (5, rows + 1)
        np.testing.assert_allclose([*found.used.sum(axis=1), found.widest.sum(), found.exits.sum()], 1)
        # Each stage's last row in use is at most the widest.
        assert (np.cumsum(found.used, axis=1) >= np.cumsum(found.widest) - 1e-9).all()
        # A call of the heads asks at most as many nodes as a block holds.
        assert found.asked[min(rows, 8) + 1 :].sum() == 0
        assert found.asked.sum() > 0


def test_one_row_by_hand() -> None:
    """K = 2, one row: four tokens after the first, given by exits 1, 2, 1 and 2."""
    right = np.asarray([[[False], [True], [False], [True], [False]]] * 2)
    table = Table(2, right, np.zeros((2, 5, 1)), (5,))
    found = replay(table, 1)
    # Ticks are K + sum(exits[1 : n - 1]) = 2 + 1 + 2 + 1.
    assert (found.ticks, found.tokens) == (6, 4)
    assert found.exits.tolist() == [0.5, 0.5]
    assert found.ticks_per_token == 1.5
    # Stage 1 always has a node; stage 2 has none in the first tick and in the one after the miss.
    assert found.live.tolist() == [1.0, 4 / 6]
    assert found.widest.tolist() == [0.0, 1.0]
    # The exit is asked in every tick but the last and the one that starts afresh.
    assert found.asked[1] * 6 == pytest.approx(4)


def test_texts_of_one_token_take_no_tick() -> None:
    table = Table(3, np.zeros((3, 2, 2), bool), np.zeros((3, 2, 2)), (1, 1))
    found = replay(table, 2)
    assert (found.ticks, found.tokens) == (0, 0)
