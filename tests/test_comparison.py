"""What a benchmark says of its runs: losslessness, speedups, and where tokens become available."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from studies.bench import comparison as c
from studies.bench.runs import Run

PLAIN = Run("depth", "ar", "a", "0", "m", [1] * 11, 3, layer_steps=300, dtype="float32")


def runs(method: str, steps: list[int], task: str = "a", **fields) -> list[Run]:
    """One run a prompt, with so many layer steps."""
    return [
        dataclasses.replace(PLAIN, method=method, task=task, prompt_id=str(i), layer_steps=each, **fields)
        for i, each in enumerate(steps)
    ]


def test_a_speedup_is_the_median_of_ratios_on_one_prompt() -> None:
    table = c.costs([*runs("ar", [300, 300, 300]), *runs("del", [100, 200, 300, 50])], "depth")
    found = c.speedup(table, "ar", "del")
    assert (found.value, found.items) == (1.5, 3)
    assert c.speedup(table, "ar", "layerskip") is None
    assert c.speedup(table, "ar", "del", "b") is None
    assert c.tasks_of(table) == ["a"]
    both = c.costs([*runs("ar", [300]), *runs("ar", [300], "b")], "depth")
    assert c.tasks_of(both) == ["a", "b", "all"]


def test_answers_of_one_token_are_left_out() -> None:
    assert c.costs(runs("ar", [0], tokens=[1]), "depth") == {}


def test_tuning_runs_are_not_reported() -> None:
    assert c.costs(runs("ar", [300], split="tune"), "depth") == {}


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        ({"match": True}, 0),
        ({"match": False, "first_divergence": 4, "margin": 0.2, "tie": False}, 4),
        ({"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True, "dtype": "bfloat16"}, 0),
        # All four prompts part by rounding alone: in float32 that is no rounding.
        ({"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True}, 1),
    ],
)
def test_what_fails_a_benchmark(fields, sentences) -> None:
    assert len(c.mismatches(runs("dex", [1, 1, 1, 1], **fields))) == sentences
    assert c.mismatches(runs("transformers", [1, 1, 1, 1], **fields)) == []


def test_one_prompt_may_part_by_rounding() -> None:
    parted = {"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True}
    made = [*runs("dex", [1], **parted), *runs("del", [1], **parted), *runs("dex", [1] * 20, "b", match=True)]
    assert c.mismatches(made) == []
    assert c.lossless(run for run in made if run.method == "dex") == (21, 20, 1, 0, 4, 1e-6)
    assert c.lossless(run for run in made if run.method == "del") == (1, 0, 1, 0, 4, 1e-6)
    assert c.lossless(runs("ar", [1])) is None


def test_availability_is_the_oracles_where_there_is_one() -> None:
    exits = {"exits": [-1, 1, 1, 2, 3], "tokens": [1] * 5, "depths": [2, 4, 6]}
    made = runs("dex", [1], **(exits | {"exits": [-1, 3, 3, 3, 3]}))
    assert c.availability(made)["a"].shares == (0, 0, 1)
    found = c.availability([*made, *runs("oracle", [1, 1], **exits)])["a"]
    assert found.shares == (0.5, 0.25, 0.25)
    assert found.tokens == 8
    assert found.mean == pytest.approx(np.mean([2, 2, 4, 6]))


def test_explorers_in_their_order() -> None:
    made = [*runs("ar", [300, 300]), *runs("dex", [100, 100], setting={"explorers": 10})]
    made += runs("dex", [150, 150], setting={"explorers": 2})
    found = c.by_explorers(c.costs(made, "depth"))
    assert {k: each.value for k, each in found.items()} == {2: 2, 10: 3}
    assert list(found) == [2, 10]
    assert c.main_methods(c.costs(made, "depth"), 2) == ["dex explorers=2"]
    assert c.main_methods(c.costs(made, "depth")) == ["dex explorers=10"]
