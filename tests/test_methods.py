"""Methods as users name them: grids, rows, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from dex_jax import AR, Dex, DexError
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.plan import plan_for, with_stages
from dex_jax.decoding.sizes import batch_bucket, cache_length_for, chunk_sizes, prompt_bucket
from dex_jax.grid import even_depths


@pytest.mark.parametrize("num_layers", [1, 4, 30, 80])
def test_even_grids(num_layers: int) -> None:
    for stages in range(1, num_layers + 1):
        depths = even_depths(stages, num_layers)
        assert depths == tuple(int(np.ceil(k * num_layers / stages)) for k in range(1, stages + 1))
        assert plan_for(Dex(explorers=stages, rows=1), num_layers).depths == depths
        assert len(set(depths)) == stages
        assert depths[-1] == num_layers


def test_defaults() -> None:
    paper = plan_for(Dex(draft=False), 30)
    assert paper == dataclasses.replace(plan_for(Dex(explorers=5, draft=False), 30), decs=True)
    assert (paper.depths, paper.rows, paper.drafts) == ((6, 12, 18, 24, 30), 8, None)
    # This model has fewer layers than the default has explorers.
    assert plan_for(Dex(draft=False), 2).depths == (1, 2)
    rows = [plan_for(Dex(explorers=k, draft=False), 30).rows for k in (1, 2, 3, 4, 5, 6, 30)]
    assert rows == [1, 1, 2, 4, 8, 16, 32]
    alone = plan_for(Dex(), 30)
    assert (alone.depths, alone.rows) == ((30,), 8)
    assert plan_for(Dex(explorers=2), 30).rows == 8
    plan = plan_for(AR(), 30)
    assert (plan.method, plan.stages, plan.depths, plan.has_lattice) == ("ar", 1, (30,), False)


def test_rows_and_drafts_as_given() -> None:
    assert [plan_for(Dex(explorers=k, rows="full", draft=False), 30).rows for k in (1, 2, 6, 8)] == [1, 1, 16, 64]
    assert plan_for(Dex(explorers=3, rows=7), 30).rows == 7
    assert plan_for(Dex(explorers=1, rows=1), 30).drafts is None, "one row has no room for a draft"
    assert plan_for(Dex(explorers=1, rows=2), 30).drafts is not None
    assert plan_for(Dex(depths=(1, 2, 30), rows=1, decs=False), 30).decs is False
    tree = TreeShape((2, 1), 1, (0.5,) * 8)
    assert plan_for(Dex(draft=tree), 30).drafts == tree
    assert plan_for(Dex(draft=tree), 30).rows == tree.rows
    assert plan_for(Dex(explorers=5, draft=tree), 30).rows == 8 + tree.rows - 1


def test_on_a_mesh_each_explorer_has_a_stage() -> None:
    assert with_stages(Dex(), 3) == Dex(explorers=3)
    assert with_stages(Dex(draft=False), 3) == Dex(explorers=3, draft=False)
    assert with_stages(Dex(depths=(2, 4)), 3) == Dex(depths=(2, 4))
    assert with_stages(AR(), 3) == AR()
    assert with_stages(Dex(), None) == Dex()


def test_whole_numbers_of_numpy_become_pythons() -> None:
    plan = plan_for(Dex(explorers=np.int64(5), rows=np.int64(4)), 30)
    assert plan == plan_for(Dex(explorers=5, rows=4), 30)
    assert {type(x) for x in (*plan.depths, plan.rows)} == {int}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Dex(explorers=5, depths=(6, 30)), "not both"),
        (Dex(explorers=0), "explorers must be from 1 to the model's 30 layers, not 0"),
        (Dex(explorers=-1), "not -1"),
        (Dex(explorers=31), "not 31"),
        (Dex(explorers=True), "not True"),
        (Dex(depths=()), "depths"),
        (Dex(depths=(0, 30)), "between 1 and"),
        (Dex(depths=(6, 31)), "between 1 and"),
        (Dex(depths=(12, 6, 30)), "ascend"),
        (Dex(depths=(6, 6, 30)), "ascend"),
        (Dex(depths=(6, 12)), "end at the model's final layer, 30"),
        (Dex(rows=0), "rows"),
        (Dex(rows=-3), "rows"),
        (Dex(rows="many"), "rows"),
        (Dex(explorers=9, rows="full", draft=False), "K = 8"),
        (Dex(explorers=3, rows="full"), "draft=False"),
        (Dex(draft="text"), "draft must be True, False or a TreeShape"),
    ],
)
def test_what_is_refused(method: Dex, words: str) -> None:
    with pytest.raises(DexError, match=re.escape(words)) as error:
        plan_for(method, 30)
    assert "\n" not in str(error.value)


def test_buckets_hold_what_they_are_for() -> None:
    buckets = [prompt_bucket(length) for length in range(1, 3000)]
    assert all(bucket >= length for length, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert len({size for length in range(1, 3000) for size in chunk_sizes(length)}) == 3
    # Each piece reads all weights, so there are as few as can be.
    assert [chunk_sizes(length) for length in (41, 131, 300, 754)] == [(48,), (192,), (512,), (512, 512)]
    lengths = [[cache_length_for(prompt, new, 32, 2) for prompt in range(1, 3000, 7)] for new in (1, 100, 900)]
    for new, found in zip((1, 100, 900), lengths, strict=True):
        assert all(
            size >= max(p + new + 32, prompt_bucket(p)) for size, p in zip(found, range(1, 3000, 7), strict=True)
        )
        assert found == sorted(found)
    assert len({size for found in lengths for size in found}) <= 6
    assert len({cache_length_for(prompt, 100, 32, 1) for prompt in range(1, 890)}) == 1
    batches = [batch_bucket(n) for n in range(1, 65)]
    assert all(n <= bucket <= n + 3 for n, bucket in enumerate(batches, 1))
    assert len(set(batches)) == 18
