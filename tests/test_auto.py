"""What runs where nothing was asked for, and the costs that it goes by."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.small_models import LLAMA, ragged_prompts, random_drafter, random_exits, small_model

import dex_jax
from dex_jax import AR, Dex, TreeShape
from dex_jax.decoding import auto, costs
from dex_jax.decoding.auto import choose, largest_tree, settle, with_rungs
from dex_jax.decoding.costs import ROWS, StepCosts, step_costs
from dex_jax.decoding.dex.trees import DRAFTED_TREES, LOOKUP_TREE
from dex_jax.nn.transformer import Staged

FLOAT32 = np.dtype("float32")


def costs_of(a_row_more: float) -> StepCosts:
    """A step of one row takes a second, and each further row so much more."""
    return StepCosts(ROWS, tuple(1 + a_row_more * (rows - 1) for rows in ROWS))


def test_what_was_asked_for_is_not_settled(monkeypatch) -> None:
    monkeypatch.setattr(auto, "step_costs", lambda *about: pytest.fail("measured for nothing"))
    about = (LLAMA, None, FLOAT32, "none ships", 1, 128)
    tree = TreeShape((1,), 0, (0.5,) * 8)
    for method in (AR(), Dex(explorers=1), Dex(depths=(2, 4)), Dex(rows=2), Dex(decs=False), Dex(draft=tree)):
        assert settle(method, "shared", *about) == (method, None)
    method, why = settle(Dex(), random_exits("mlp", depths=(1, 2)), *about)
    assert method == Dex(explorers=3), "as many as exits of one's own are for"
    assert "which the exits in random are for" in why


def test_on_a_mesh_each_stage_has_an_explorer_that_chooses_its_rows(monkeypatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(auto, "step_costs", lambda *about: asked.append(about) or costs_of(0.2))
    mesh = jax.sharding.AbstractMesh((2, 5, 1), ("data", "stage", "tensor"))
    about = (LLAMA, Staged((1, 2, 3, 4, 5)), FLOAT32, "none ships", 7, 128, mesh)
    method, why = settle(Dex(), "shared", *about)
    assert method == Dex(depths=(1, 2, 3, 4, 5), draft=method.draft)
    assert method.draft.counts == (1, 2, 4, 8, 15)
    assert "on each stage" in why
    ((_, _, batch, *_),) = asked
    assert batch == 4, "as many sequences as a row of the data axis has"
    assert settle(Dex(rows=4), "shared", *about) == (Dex(explorers=5, rows=4), None)


def test_cheap_rows_mean_drafts_and_dear_ones_a_smaller_tree_or_none() -> None:
    method, why = choose(costs_of(0.0001), None)
    assert method == Dex(explorers=1, draft=LOOKUP_TREE), "all of it in every tick"
    assert why.startswith("one explorer with drafts; AR should take 1.8")
    method, _ = choose(costs_of(0.1), random_drafter())
    assert method.draft.widths == DRAFTED_TREES[-1].shape.widths
    assert method.draft.counts == (1, 2, 4, 8, 16)
    assert largest_tree(costs_of(0.5), random_drafter()) == DRAFTED_TREES[0].shape
    method, why = choose(costs_of(1.0), None)
    assert (method, why[:3]) == (AR(), "AR;")


@given(st.floats(0, 2), st.floats(0, 1))
def test_rungs_are_counts_that_take_as_long_as_they_say(a_row_more: float, drafting: float) -> None:
    known = dataclasses.replace(costs_of(a_row_more), drafting=drafting)
    for shape, most in itertools.product((LOOKUP_TREE, DRAFTED_TREES[0].shape), (None, 12)):
        found = with_rungs(known, shape, most)
        assert (found.widths, found.drafted) == (shape.widths, shape.drafted)
        if found.rungs:
            assert found.counts[-1] == (most or shape.rows)
            assert [cost for _, cost in found.rungs] == pytest.approx([*map(known.step, found.counts)], abs=1 / 32)
            assert found.drafting == (0 if shape.drafted == 0 else pytest.approx(drafting, abs=1 / 16))
        else:
            assert known.step(most or shape.rows) < 1 + 1 / 16


@given(st.lists(st.floats(1e-4, 1), min_size=len(ROWS), max_size=len(ROWS)), st.floats(1, 40), st.floats(1, 40))
def test_more_rows_never_cost_less(seconds: list[float], a: float, b: float) -> None:
    found = StepCosts(ROWS, tuple(np.maximum.accumulate(seconds).tolist()))
    assert found.step(min(a, b)) <= found.step(max(a, b)) + 1e-12
    assert [found.step(rows) for rows in ROWS] == list(found.seconds)


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """A file of its own, a process that knows nothing, and what was measured: a second for each row."""
    monkeypatch.setenv("DEX_JAX_STEP_COSTS", str(tmp_path / "step_costs.json"))
    monkeypatch.setattr(costs, "_KNOWN", {})
    asked = []

    def measure(config, dtype, packing, totals):
        asked.append(totals)
        return [float(total) for total in totals]

    monkeypatch.setattr(costs, "_measure", measure)
    return asked


def test_costs_are_measured_once_for_all_lengths_and_kept(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DEX_JAX_STEP_COSTS", str(tmp_path / "step_costs.json"))
    monkeypatch.setattr(costs, "_KNOWN", {})
    first = step_costs(LLAMA, jnp.float32, 1, 100, random_drafter())
    assert first.rows == ROWS
    assert 0 < first.seconds[0] <= first.seconds[-1] < 10
    assert 0 < first.drafting < 1
    monkeypatch.setattr(costs, "_measure", lambda *about: pytest.fail("measured again"))
    for known in (costs._KNOWN, {}):
        monkeypatch.setattr(costs, "_KNOWN", known)
        longer, without = (step_costs(LLAMA, jnp.float32, 1, length) for length in (9000, 100))
        assert without.seconds == first.seconds
        assert without.drafting == 0
        assert all(a > b for a, b in zip(longer.seconds, without.seconds, strict=True))


def test_a_batch_has_the_costs_of_all_its_rows(figures) -> None:
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1, 2, 4, 8, 16)
    assert step_costs(LLAMA, FLOAT32, 2, 1).seconds == (2, 4, 8, 16, 32)
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1, 2, 4, 8, 16)
    assert step_costs(LLAMA, FLOAT32, 16, 1).seconds == (16, 32, 64, 128, 256)
    assert [totals[-1] for totals in figures] == [16, 32, 128]


def test_fewer_rows_take_no_longer(figures, monkeypatch) -> None:
    monkeypatch.setattr(costs, "_measure", lambda *about: [9.0, 2.0, 3.0, 2.5, 4.0])
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (2.0, 2.0, 2.5, 2.5, 4.0)


DAMAGED = ["", "[" * 10**5, "{", "null", "3", "[]", "\udcff"]
DAMAGED += [f'{{"KEY": {entry}}}' for entry in ("null", "3", '"x"', "{}", "[1.0]")]
DAMAGED += [f'{{"KEY": [1.0, 1.0, 1.0, 1.0, {wrong}]}}' for wrong in ("null", "0.0", "-1.0", "NaN", "Infinity", "[1]")]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: ascii(content[:40]))
def test_a_damaged_file_is_measured_again(figures, content) -> None:
    key = costs._key(LLAMA, FLOAT32, ())
    costs.costs_file().write_text(content.replace('"KEY"', json.dumps(key)), encoding="utf-8", errors="surrogateescape")
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1, 2, 4, 8, 16)
    assert json.loads(costs.costs_file().read_text())[key] == [1, 2, 4, 8, 16]


def test_without_a_place_to_write_costs_are_those_of_the_process(figures, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEX_JAX_STEP_COSTS", str(tmp_path / "file" / "step_costs.json"))
    for _ in range(2):
        step_costs(LLAMA, FLOAT32, 1, 1)
    assert len(figures) == 1


def test_what_is_chosen_gives_the_tokens_of_ar(monkeypatch) -> None:
    lm, prompts = small_model(dataclasses.replace(LLAMA, num_layers=1)), ragged_prompts(2)
    plain = dex_jax.generate(lm, prompts, method=AR(), max_new_tokens=20)
    assert plain.stats.plan.choice is None
    for a_row_more, chosen in ((0.008, "one explorer"), (1.0, "AR")):
        monkeypatch.setattr(auto, "step_costs", lambda *about, more=a_row_more: costs_of(more))
        out = dex_jax.generate(lm, prompts, max_new_tokens=20)
        assert np.array_equal(out.tokens, plain.tokens)
        assert out.stats.plan.has_lattice == (chosen != "AR")
        assert out.stats.plan.choice.startswith(chosen)
