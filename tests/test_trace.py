"""A recorded lattice against the slow twin, on models with exact arithmetic."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import toy_runs
from reference.small_models import LLAMA, small_model
from reference.toy_models import ToyModel, random_tables, toy_network

import dex_jax
from dex_jax import DexError, Trace

VOCAB = 12


def record(tables, case, first: list[int], stages: int, rows: int, sequence: int) -> Trace:
    tables, arrays = jax.tree.map(jnp.asarray, (tables, toy_runs.arrays(case, first)))
    *_, limits, sampling = arrays
    state = jax.jit(toy_runs.initial_state, static_argnames=("stages", "rows"))(
        tables, *arrays, stages=stages, rows=rows
    )
    # A step takes the memory of its state, so a trace must have copied what it keeps.
    tick = jax.jit(lambda state: dex_jax.step(toy_network(tables), state, limits, sampling), donate_argnums=0)
    return dex_jax.watch(tick, state, text=lambda token: f"<{token}>", sequence=sequence)


def seen_after(trace: Trace, tick: int) -> set[tuple]:
    """Return (path of tokens from the root, stages done, born_at, position) of every live node."""
    found = set()
    for index in trace.alive(tick):
        node = trace.nodes[index]
        path = [node]
        while path[-1].rooted is None or path[-1].rooted > tick:
            assert path[-1].parent is not None
            path.append(trace.nodes[path[-1].parent])
        tokens = tuple(each.token for each in reversed(path))
        found.add((tokens, tick - node.born, node.born_at, node.position))
    return found


def test_every_tick_is_the_twin_s() -> None:
    stages, rows = 3, 2
    tables = random_tables(1, stages, VOCAB, openness=0.4)
    case = toy_runs.random_case(1, 2, VOCAB, sampled=True)
    runs = toy_runs.twin_runs(ToyModel(tables), case, stages=stages, rows=rows, vocab_size=VOCAB)
    first = [run.tokens[0] for run in runs]
    trace, run = record(tables, case, first, stages, rows, sequence=1), runs[1]
    assert (list(trace.tokens), list(trace.exits), trace.ticks) == (run.tokens, run.exits, run.ticks)
    assert [node.token for node in trace.roots] == run.tokens[:-1]
    assert trace.depths == tuple(range(1, stages + 1))
    for tick, lattice in enumerate(run.lattices, 1):
        wanted = {(node.path, node.progress, node.born_at, node.position) for node in lattice}
        assert seen_after(trace, tick) == wanted, f"tick {tick}"
    assert [node.born_at for node in trace.roots[1:]] == run.exits[1:-1]
    for node in trace.nodes:
        # A child is born k ticks after its parent if exit k proposed it.
        assert node.parent is None or node.born - trace.nodes[node.parent].born == node.born_at
    assert all(trace.labels[node.token] == f"<{node.token}>" for node in trace.nodes)


@pytest.mark.slow
def test_a_model_s_trace_says_what_generate_says() -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2))
    tree = dex_jax.TreeShape((1, 1), 0, (0.7,) * 8)
    options = {"method": dex_jax.Dex(explorers=2, draft=tree), "max_new_tokens": 24, "exits": "shared"}
    out = dex_jax.generate(lm, [[1, 2, 3]], **options)
    trace = dex_jax.trace(lm, [1, 2, 3], **options)
    assert np.array_equal(out.tokens[0], trace.tokens)
    assert np.array_equal(out.stats.exits[0], trace.exits)
    assert trace.ticks == out.stats.ticks[0]
    assert trace.depths == (1, 2)
    assert trace.labels[trace.tokens[0]] == str(trace.tokens[0])
    assert [node.token for node in trace.roots] == list(trace.tokens[:-1])
    assert any(node.born_at == 0 for node in trace.roots), "paths of drafts are committed"
    assert dataclasses.is_dataclass(trace.nodes[0])


def test_a_method_without_a_lattice_is_refused() -> None:
    with pytest.raises(DexError, match="has a lattice to trace"):
        dex_jax.trace(small_model(), [1, 2], method=dex_jax.AR(), exits="shared", max_new_tokens=4)


def test_a_model_on_a_mesh_is_refused() -> None:
    with pytest.raises(DexError, match="on one device"):
        dex_jax.trace(SimpleNamespace(mesh="stage=2"), [1, 2])
