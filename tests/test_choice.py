"""The method that runs if none was requested, and the rows that ticks choose, from promises and learnt costs."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.small_models import LLAMA, ragged_prompts, random_drafter, random_exits, small_model

import dex_jax
from dex_jax import AR, Dex, TreeShape
from dex_jax.decoding import costs
from dex_jax.decoding.auto import choose_method
from dex_jax.decoding.costs import TickCosts, costs_of
from dex_jax.decoding.dex import row_choice
from dex_jax.decoding.dex.row_choice import usual_costs
from dex_jax.decoding.dex.trees import DRAFTED_TREES, LOOKUP_TREES
from dex_jax.decoding.plan import plan_for, resolve

COUNTS = (1, 2, 4, 8, 16)


def mesh_of(stages: int, platform: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        shape={"data": 1, "stage": stages, "tensor": 1},
        devices=np.array([types.SimpleNamespace(platform=platform)] * stages),
    )


def test_what_was_asked_for_is_not_settled() -> None:
    tree = TreeShape((1,), 0, (0.5,) * 8)
    for method in (AR(), Dex(explorers=1), Dex(depths=(2, 4)), Dex(rows=2), Dex(decs=False), Dex(draft=tree)):
        assert choose_method(method, "shared", "none ships") == (method, "shared", None)


def test_one_explorer_is_the_default_and_exits_at_depths_are_told_how_to_be_used() -> None:
    assert choose_method(Dex(), "shared", "none ships") == (Dex(explorers=1), "shared", "one explorer with drafts")
    own = random_exits("mlp", depths=(1, 2))
    method, exits, why = choose_method(Dex(), own, "none ships")
    assert (method, exits) == (Dex(explorers=1), "default")
    assert "random is for several explorers, which take turns here: --explorers asks for them" in why


@pytest.mark.parametrize(("stages", "platform"), [(2, "tpu"), (5, "tpu"), (5, "cpu")])
def test_on_a_mesh_one_explorer_runs_unless_they_are_requested(stages, platform) -> None:
    mesh, why = mesh_of(stages, platform), "one explorer with drafts over all stages"
    assert choose_method(Dex(), "shared", "none ships", mesh) == (Dex(explorers=1), "shared", why)
    assert choose_method(Dex(rows=4), "shared", "none ships", mesh).method == Dex(explorers=stages, rows=4)


def test_batches_on_a_cpu_are_decoded_plainly() -> None:
    assert choose_method(Dex(), "shared", "none ships", sequences=3).method == Dex(explorers=1)
    method, _, why = choose_method(Dex(), "shared", "none ships", sequences=4)
    assert (method, why) == (AR(), "AR, as drafts bring nothing to batches of 4 on a CPU")
    assert choose_method(Dex(explorers=1), "shared", "none ships", sequences=4).method == Dex(explorers=1)
    over_two = mesh_of(1, "cpu")
    over_two.shape["data"] = 2
    assert choose_method(Dex(), "shared", "none ships", over_two, sequences=6).method == Dex(explorers=1)
    assert choose_method(Dex(), "shared", "none ships", mesh_of(1, "tpu"), sequences=40).method == Dex(explorers=1)


def test_ticks_choose_unless_rows_or_a_tree_are_given() -> None:
    assert plan_for(Dex(explorers=1), 30).drafts == dataclasses.replace(LOOKUP_TREES[-1], rungs=(1, 2, 4, 8))
    assert plan_for(Dex(explorers=5), 30).drafts.rungs == (1, 2, 4, 8, 15)
    assert resolve(Dex(explorers=1), random_drafter(), LLAMA, "0").drafts.rungs == COUNTS
    for rows, tree in ((3, 0), (8, 1), (16, 2), (40, 2)):
        plan = resolve(Dex(explorers=1, rows=rows), random_drafter(), LLAMA, "0")
        assert (plan.rows, plan.drafts) == (rows, DRAFTED_TREES[tree])
    assert plan_for(Dex(explorers=1, draft=DRAFTED_TREES[0]), 30).drafts.rungs == ()


def choice_with(**changes) -> row_choice.RowChoice:
    """Return the choice of rows of one sequence before any tick, with some fields changed."""
    return row_choice.new_choice(1, COUNTS)._replace(**{name: jnp.asarray(value) for name, value in changes.items()})


def chosen(choice: row_choice.RowChoice, probability: list[float], levels: int = 0) -> int:
    going, rows = jnp.ones(1, bool), jnp.asarray([probability + [0.0] * (16 - len(probability))], jnp.float32)
    return COUNTS[int(row_choice.choose_rung(choice, COUNTS, going, rows, jnp.ones(1), jnp.int32(levels), 1))]


def test_the_row_count_is_the_one_that_promises_the_most_for_its_cost() -> None:
    assert chosen(choice_with(), [1.0, 0.1]) == 1
    assert chosen(choice_with(), [1.0, 0.3]) == 2
    assert chosen(choice_with(), [1.0, *[0.9**i for i in range(1, 8)]]) == 8
    dear = [1.0, 2.0, 4.0, 8.0, 16.0, 0.1]
    assert chosen(choice_with(costs=dear), [1.0] * 8) == 1, (
        "no row can be worth more than one that costs as much as the first"
    )
    flat = [1.0, 1.0, 1.0, 1.0, 1.01, 0.0]
    assert chosen(choice_with(costs=flat), [1.0, 0.2, *[0.1] * 14]) == 16


def test_promises_that_are_not_kept_end_drafts_and_are_made_again_after_a_while() -> None:
    choice, going, below = choice_with(), jnp.ones(1, bool), jnp.asarray([0.9])
    called = []
    for _ in range(400):
        worth = bool(row_choice.is_worth_a_level(choice, going, below))
        called.append(worth)
        used = jnp.asarray([0.9 * worth])
        # Each tick emits one token, as none of the drafts is right.
        choice = row_choice.updated(
            choice, choice.length + 1, jnp.ones(1), jnp.int32(0), 1 + used, jnp.int32(worth), below * worth, used
        )
    assert all(called[:5])
    assert 0 < np.mean(called[50:]) < 0.1, "sometimes, as what was long ago is forgotten"
    assert choice.ran[0].tolist() == [399, 0, 0, 0, 0, sum(called)]


def test_a_text_that_drafts_nothing_rests_and_looks_again_now_and_then() -> None:
    choice, going, one = choice_with(), jnp.ones(1, bool), jnp.ones(1)
    looked, none = [], jnp.zeros(1)
    for tick in range(39):
        looked += [] if row_choice.rests(choice, going) else [tick]
        about = (jnp.int32(0), one, jnp.int32(0), none, none)
        choice = row_choice.updated(choice, choice.length + 1, one, *about)
    assert looked == [*range(9), 16, 24, 32]
    drafted = row_choice.updated(choice, choice.length + 1, one, jnp.int32(1), one, jnp.int32(0), none, none)
    assert not row_choice.rests(drafted, going)
    two = jax.tree.map(lambda *each: jnp.concatenate(each), choice._replace(costs=()), drafted._replace(costs=()))
    two = two._replace(costs=choice.costs)
    assert not row_choice.rests(two, jnp.ones(2, bool))
    assert row_choice.rests(two, jnp.asarray([True, False])), "a sequence that is done counts for nothing"
    assert row_choice.rests(drafted._replace(costs=jnp.asarray(TickCosts(COUNTS).of_plain_ticks())), going)


@pytest.mark.parametrize("seed", range(5))
def test_what_ticks_cost_is_learnt_from_the_time_of_some_together(seed: int) -> None:
    random = np.random.default_rng(seed)
    true = np.array([1.0, *np.cumsum(random.uniform(0.05, 0.6, 4)) + 1, random.uniform(0.3, 0.6)])
    found = TickCosts(COUNTS)
    for number in range(300):
        ran = np.append(random.multinomial(4, random.dirichlet([1] * 5)), random.integers(0, 8))
        ran = np.array([6, 0, 0, 0, 0, 0]) if number % 30 == 0 else ran
        load = 3 if random.random() < 0.03 else 1
        found.learn(ran, 0.007 * load * (ran @ true) * random.normal(1, 0.05))
    assert found.relative()[0] == 1
    np.testing.assert_allclose(found.relative()[:4], true[:4], rtol=0.2)
    assert abs(found.relative()[-1] - true[-1]) < 0.15
    assert np.all(np.diff(found.relative()[:-1]) >= 0)


PLAIN, MIXED = np.array([6, 0, 0, 0, 0, 0]), np.array([10, 4, 2, 0, 0, 3])


def test_a_plain_tick_is_timed_alone() -> None:
    found = TickCosts(COUNTS)
    assert found.plain_seconds is None
    found.learn(MIXED, 0.1)
    assert found.due
    assert found.plain_seconds is None, "others do not say what a plain tick takes"
    np.testing.assert_array_equal(found.relative(), np.float32(usual_costs(COUNTS)))
    found.learn(PLAIN, 0.120)  # the first of a process takes longer
    for _ in range(2):
        assert not found.due
        found.learn(MIXED, 0.1)
        assert found.due, "soon again"
        found.learn(PLAIN, 0.030)
    assert found.plain_seconds == 0.005
    for ticks in range(0, costs.LATER, 16):
        assert not found.due, ticks
        found.learn(MIXED, 0.7)
    assert found.due
    assert found.plain_seconds == 0.005, "however long others took"
    assert found.relative()[1] > 1.5, "those are what is dear"


def test_a_plain_tick_of_a_longer_text_is_timed_anew_and_the_time_of_a_call_is_no_ticks() -> None:
    found = TickCosts(COUNTS)
    found.begin(256)
    for _ in range(3):
        found.learn(PLAIN, 0.030)
    found.call_seconds = 0.001
    found.learn(PLAIN, 0.031)
    assert found.plain_seconds == pytest.approx(0.005)
    found.begin(256)
    assert not found.due
    found.begin(1024)
    assert found.due


def test_costs_that_load_spoilt_mend_themselves() -> None:
    random, true = np.random.default_rng(0), np.array(usual_costs(COUNTS))
    found = TickCosts(COUNTS, stored=[1.0, 3.0, 6.0, 12.0, 24.0, 1.0])
    found.learn(PLAIN, 0.042)
    for _ in range(60):
        found.learn(np.array([15, 0, 0, 0, 0, 1]), 0.007 * 15.1 * random.normal(1, 0.05))
    assert found.relative()[1] < 2.4, "what does not run is forgotten"
    for _ in range(60):
        ran = np.append(random.multinomial(4, [0.4, 0.3, 0.2, 0.1, 0.0]), 4)
        found.learn(ran, 0.007 * (ran @ true))
    np.testing.assert_allclose(found.relative()[:3], true[:3], rtol=0.15)


@pytest.fixture
def file(monkeypatch, tmp_path):
    """Return the path of a file of costs, which does not exist, for a process that has learnt none."""
    monkeypatch.setenv("DEX_JAX_TICK_COSTS", str(tmp_path / "tick_costs.json"))
    monkeypatch.setattr(costs, "_LEARNT", {})
    return tmp_path / "tick_costs.json"


def test_costs_are_kept_for_later_processes(file, monkeypatch) -> None:
    first = costs_of(COUNTS, "a model")
    assert costs_of(COUNTS, "a model") is first
    for _ in range(200):
        for rows in range(5):
            first.learn(np.eye(6, dtype=int)[rows] * 4, 0.01 * (1 + rows))
    first.keep()
    monkeypatch.setattr(costs, "_LEARNT", {})
    np.testing.assert_allclose(costs_of(COUNTS, "a model").relative(), first.relative(), rtol=1e-6)
    np.testing.assert_allclose(costs_of(COUNTS, "another").relative(), usual_costs(COUNTS), rtol=1e-6)
    written = file.read_text()
    first.keep()
    assert file.read_text() == written, "nothing new"


DAMAGED = ["", "[" * 10**5, "{", "null", "3", "[]", "\udcff"]
DAMAGED += [f'{{"KEY": {entry}}}' for entry in ("null", "3", '"x"', "{}", "[1.0]")]
DAMAGED += [f'{{"KEY": [1.0, 1.0, 1.0, 1.0, 1.0, {wrong}]}}' for wrong in ("null", "0.0", "-1.0", "NaN", "Infinity")]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: ascii(content[:40]))
def test_a_damaged_file_says_nothing_and_is_replaced(file, monkeypatch, content) -> None:
    key = costs_of(COUNTS).key
    file.write_text(content.replace('"KEY"', json.dumps(key)), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(costs, "_LEARNT", {})
    found = costs_of(COUNTS)
    np.testing.assert_allclose(found.relative(), usual_costs(COUNTS), rtol=1e-6)
    found.learn(np.array([4, 0, 0, 0, 0, 0]), 0.01)
    found.learn(np.array([0, 4, 0, 0, 0, 0]), 0.03)
    found.keep()
    assert len(json.loads(file.read_text())[key]) == 6


def test_without_a_place_to_write_costs_are_those_of_the_process(file, monkeypatch) -> None:
    file.write_text("")
    monkeypatch.setenv("DEX_JAX_TICK_COSTS", str(file / "tick_costs.json"))
    found = costs_of(COUNTS)
    found.learn(np.array([4, 0, 0, 0, 0, 0]), 0.01)
    found.learn(np.array([0, 4, 0, 0, 0, 0]), 0.03)
    found.keep()
    assert costs_of(COUNTS) is found


def test_the_default_gives_the_tokens_of_ar_and_learns(file) -> None:
    lm, prompts = small_model(dataclasses.replace(LLAMA, num_layers=1)), ragged_prompts(2)
    plain = dex_jax.generate(lm, prompts, method=AR(), max_new_tokens=20)
    assert plain.stats.plan.choice is None
    out = dex_jax.generate(lm, prompts, max_new_tokens=20, ticks_per_update=3)
    assert np.array_equal(out.tokens, plain.tokens)
    assert out.stats.plan.choice == "one explorer with drafts"
    (learnt,) = costs._LEARNT.values()
    assert learnt.plain_seconds is not None
    assert out.stats.row_seconds == learnt.plain_seconds + learnt.call_seconds / 3
    given_rows = [dex_jax.generate(lm, prompts, method=Dex(rows=4), max_new_tokens=20) for _ in range(2)]
    assert np.array_equal(given_rows[0].stats.ticks, given_rows[1].stats.ticks)
    assert np.array_equal(given_rows[0].tokens, plain.tokens)
