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
from dex_jax import AR, Dex
from dex_jax.decoding import auto, costs
from dex_jax.decoding.auto import SMALLEST_GAIN, candidates, settle
from dex_jax.decoding.costs import ROWS, StepCosts, step_costs
from dex_jax.decoding.dex.trees import LOOKUP_TREES, KnownTree, TreeShape
from dex_jax.decoding.pace import FAR_OFF, Pace
from dex_jax.decoding.plan import plan_for
from dex_jax.nn.transformer import Staged

FLOAT32 = np.dtype("float32")


def costs_of(a_row_more: float) -> StepCosts:
    """A step of one row takes a second, and each further row so much more."""
    return StepCosts(ROWS, tuple(1 + a_row_more * (rows - 1) for rows in ROWS))


def chosen(method: Dex | AR, exits="shared") -> tuple[Dex | AR, str | None]:
    return settle(method, exits, LLAMA, None, FLOAT32, "none ships", 1, 128)


def test_what_was_asked_for_is_not_settled(monkeypatch) -> None:
    monkeypatch.setattr(auto, "step_costs", lambda *about: pytest.fail("measured for nothing"))
    tree = TreeShape((1,), 0, (0.5,) * 8)
    for method in (AR(), Dex(explorers=1), Dex(depths=(2, 4)), Dex(rows=2), Dex(decs=False), Dex(draft=tree)):
        assert chosen(method) == (method, None)
    method, why = chosen(Dex(), random_exits("mlp", depths=(1, 2)))
    assert method == Dex(explorers=3), "as many as exits of one's own are for"
    assert "which the exits in random are for" in why


def test_cheap_rows_mean_drafts(monkeypatch) -> None:
    monkeypatch.setattr(auto, "step_costs", lambda *about: costs_of(0.008))
    method, why = chosen(Dex())
    assert method == Dex(explorers=1, draft=LOOKUP_TREES[0].shape)
    tokens = LOOKUP_TREES[0].tokens_a_tick
    assert why == f"one explorer with drafts (8 rows a tick); AR should take {tokens / 1.056:.2f} times as long"


@pytest.mark.parametrize(("a_row_more", "rows"), [(0.001, (15,)), (0.2, (1, 2, 4, 8, 15))])
def test_on_a_mesh_each_stage_has_an_explorer_that_chooses_its_rows(monkeypatch, a_row_more, rows) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(auto, "step_costs", lambda *about: asked.append(about) or costs_of(a_row_more))
    mesh = jax.sharding.AbstractMesh((2, 5, 1), ("data", "stage", "tensor"))
    about = (LLAMA, Staged((1, 2, 3, 4, 5)), FLOAT32, "none ships", 7, 128, mesh)
    method, why = settle(Dex(), "shared", *about)
    assert method == Dex(depths=(1, 2, 3, 4, 5), draft=method.draft)
    said = {(15,): "15", (1, 2, 4, 8, 15): "1, 2, 4, 8 or 15"}[rows]
    assert why == f"an explorer with drafts on each stage ({said} rows a tick)"
    assert (method.draft.counts if method.draft.rungs else (15,)) == rows
    assert plan_for(method, 5).rows == 15
    ((_, _, batch, *_),) = asked
    assert batch == 4, "as many sequences as a row of the data axis has"
    assert settle(Dex(rows=4), "shared", *about) == (Dex(explorers=5, rows=4), None)


def test_of_a_drafters_trees_the_fastest_is_taken(monkeypatch) -> None:
    trees = [KnownTree(TreeShape((2, 1), 2, (0.5,) * 8), 2.5), KnownTree(TreeShape((1,), 1, (0.5,) * 8), 1.7)]
    monkeypatch.setattr(auto, "known_trees", lambda drafter: trees)
    drafter = random_drafter()
    for a_row_more, tree in ((0.008, trees[0]), (0.5, trees[1])):
        plain, drafting = candidates(costs_of(a_row_more), drafter)
        assert plain.method == AR()
        gain = auto.CHOOSING if drafting.method.draft.rungs else 1
        assert drafting.seconds == pytest.approx((1 + a_row_more * (tree.shape.rows - 1)) / tree.tokens_a_tick / gain)
        # The larger one is taken where a tick can choose to run less of it.
        assert dataclasses.replace(drafting.method.draft, rungs=(), drafting=0.0) == trees[0].shape
        assert drafting.method.draft.counts == ((4,) if a_row_more == 0.008 else (1, 2, 4))
    # Not where it takes too long.
    far_dearer = StepCosts(ROWS, (1.0, 1.1, 1.1 + auto.LONGEST_STEP, 9.0, 9.0))
    _, drafting = candidates(far_dearer, drafter)
    assert dataclasses.replace(drafting.method.draft, rungs=(), drafting=0.0) == trees[1].shape


def test_rows_that_cost_alike_share_a_rung() -> None:
    shape = TreeShape((1,) * 7, 0, (0.5,) * 8)
    for a_row_more, rows in ((0.001, []), (0.02, [4, 8]), (0.11, [1, 2, 4, 8])):
        found = auto.with_rungs(costs_of(a_row_more), shape).rungs
        assert [each for each, _ in found] == rows
        assert all(b - a >= 3 / 32 for (_, a), (_, b) in itertools.pairwise(found))


def test_drafting_costs_what_was_measured() -> None:
    shape, slow = TreeShape((1, 1), 2, (0.5,) * 8), dataclasses.replace(costs_of(0.1), drafting=0.25)
    assert auto.tick_seconds(slow, shape) == pytest.approx(1.3 + 2 * 0.25)
    assert auto.tick_seconds(slow, dataclasses.replace(shape, drafted=0)) == pytest.approx(1.3)
    assert auto.with_rungs(slow, shape).drafting == pytest.approx(auto.CAUTION * 0.25, abs=1 / auto.COST_PARTS)
    assert auto.with_rungs(slow, dataclasses.replace(shape, drafted=0)).drafting == 0


def test_what_a_tick_takes_beside_its_step_counts() -> None:
    shape = TreeShape((1,) * 7, 0, (0.5,) * 8)
    costs, slow = costs_of(0.11), dataclasses.replace(costs_of(0.11), overhead=0.5)
    assert auto.tick_seconds(slow, shape) == pytest.approx(1.77 + 0.5)
    # Whatever a tick runs, it takes that much longer; AR does not.
    rungs, slower = (auto.with_rungs(each, shape).rungs for each in (costs, slow))
    longer = [b - a for (_, a), (_, b) in zip(rungs, slower, strict=True)]
    assert longer == pytest.approx([auto.CAUTION * 0.5] * 4, abs=0.05)
    plain, drafting = candidates(slow, None)
    assert plain.seconds == 1.0
    before = candidates(costs, None)[1]
    assert drafting.seconds - before.seconds > 0.5 / LOOKUP_TREES[0].tokens_a_tick / auto.CHOOSING - 1e-9


@given(st.floats(0, 2))
def test_the_choice_is_the_fastest_that_is_worth_it(a_row_more: float) -> None:
    found = candidates(costs_of(a_row_more), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "step_costs", lambda *about: costs_of(a_row_more))
        method, _ = chosen(Dex())
    seconds = {str(each.method): each.seconds for each in found}
    assert seconds[str(method)] <= SMALLEST_GAIN * min(seconds.values())
    plan_for(method, LLAMA.num_layers)  # rungs that mean nothing would be refused


@given(st.lists(st.floats(1e-4, 1), min_size=len(ROWS), max_size=len(ROWS)), st.floats(1, 40), st.floats(1, 40))
def test_more_rows_never_cost_less(seconds: list[float], a: float, b: float) -> None:
    found = StepCosts(ROWS, tuple(np.maximum.accumulate(seconds).tolist()))
    assert found.step(min(a, b)) <= found.step(max(a, b)) + 1e-12
    assert [found.step(rows) for rows in ROWS] == list(found.seconds)


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """A file of its own, a process that knows nothing, and a count of measurements, which all say one second."""
    monkeypatch.setenv("DEX_JAX_STEP_COSTS", str(tmp_path / "step_costs.json"))
    monkeypatch.setattr(costs, "_KNOWN", {})
    asked = []

    def measure(config, dtype, packing, totals):
        asked.append(totals)
        return [1.0] * len(totals)

    monkeypatch.setattr(costs, "_measure", measure)
    return asked


def test_costs_are_measured_once_for_all_lengths_and_kept(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DEX_JAX_STEP_COSTS", str(tmp_path / "step_costs.json"))
    monkeypatch.setattr(costs, "_KNOWN", {})
    first = step_costs(LLAMA, jnp.float32, 1, 100, random_drafter())
    assert first.rows == ROWS
    assert 0 < first.seconds[0] <= first.seconds[-1] < 10
    assert 0 < first.overhead < 1
    assert 0 < first.drafting < 1
    assert len(json.loads(costs.costs_file().read_text())) == 1
    monkeypatch.setattr(costs, "_measure", lambda *about: pytest.fail("measured again"))
    for known in (costs._KNOWN, {}):
        monkeypatch.setattr(costs, "_KNOWN", known)
        longer, without = (step_costs(LLAMA, jnp.float32, 1, length) for length in (9000, 100))
        assert without.seconds == first.seconds
        assert without.drafting == 0
        assert all(a > b for a, b in zip(longer.seconds, without.seconds, strict=True))


def test_a_batch_has_the_costs_of_all_its_rows(figures) -> None:
    def measure(config, dtype, packing, totals):
        figures.append(totals)
        return [float(total) for total in totals]

    costs._measure = measure
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1, 2, 4, 8, 16)
    assert step_costs(LLAMA, FLOAT32, 2, 1).seconds == (2, 4, 8, 16, 32)
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1, 2, 4, 8, 16)
    assert step_costs(LLAMA, FLOAT32, 16, 1).seconds == (16, 32, 64, 128, 256)
    assert [totals[-1] for totals in figures] == [16, 32, 128]


def test_fewer_rows_take_no_longer(figures) -> None:
    costs._measure = lambda *about: [9.0, 2.0, 3.0, 2.5, 4.0]
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (2.0, 2.0, 2.5, 2.5, 4.0)


def test_costs_that_are_far_off_are_forgotten(figures) -> None:
    model = (LLAMA, FLOAT32, 1, 1)
    pace = Pace(np.ones(1))
    for fastest, measured in ((np.inf, 1), (0.9, 1), (0.4, 2), (0.4, 3)):
        pace.fastest = fastest
        auto.reconsider(pace, *model)
        step_costs(*model)
        costs._KNOWN.clear()
        step_costs(*model)
        assert len(figures) == measured


WRONG = ["null", "true", '"x"', "0", "-1", "NaN", "Infinity", "1" + "0" * 400, "[1]", "1e9"]
DAMAGED = ["", "[" * 10**5, "{", "null", "3", "[]", "\udcff"]
DAMAGED += [f'{{"KEY": {entry}}}' for entry in ("null", "true", "3", '"x"', "{}", "[]", "[1, 1]")]
DAMAGED += [f'{{"KEY": [1, 1, 1, 1, {wrong}]}}' for wrong in WRONG]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: ascii(content[:40]))
def test_a_damaged_file_is_measured_again(figures, content) -> None:
    key = costs._key(LLAMA, FLOAT32, ())
    costs.costs_file().write_text(content.replace('"KEY"', json.dumps(key)), encoding="utf-8", errors="surrogateescape")
    assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1.0,) * len(ROWS)
    assert len(figures) == 1
    assert json.loads(costs.costs_file().read_text())[key] == [1.0] * len(ROWS)


def test_without_a_place_to_write_costs_are_those_of_the_process(figures, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEX_JAX_STEP_COSTS", str(tmp_path / "file" / "step_costs.json"))
    for _ in range(2):
        assert step_costs(LLAMA, FLOAT32, 1, 1).seconds == (1.0,) * len(ROWS)
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


def test_far_off_is_faster_than_measured() -> None:
    pace = Pace(np.array([1.0]))
    assert not pace.far_off(1e9)
    for seconds in (9.0, 4.0, 5.0):
        pace.saw(np.array([4.0]), seconds)
    assert pace.fastest == 1.0
    assert pace.far_off(FAR_OFF + 0.1)
    assert not pace.far_off(FAR_OFF - 0.1)
    assert not pace.far_off(0.1)
