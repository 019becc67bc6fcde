"""Chains in exact arithmetic against the slow twin: what is drafted where, what is kept, and what it costs."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from conftest import slow
from reference import chain_twin
from reference.toy_chain import chain_toy
from reference.toy_models import ToyModel, cached_tables, toy_prefill
from reference.toy_runs import CAPACITY, arrays, emitted, random_case, twin_draws
from reference.twin import autoregressive

from dex_jax.decoding.chain import loop as chain
from dex_jax.decoding.chain.dynamic_exit import Dynamic
from dex_jax.decoding.counting import bound_of, rounds_of
from dex_jax.decoding.record import until_done
from dex_jax.decoding.rivals import Hindsight, Sure

VOCABULARY, BATCH = 11, 3
DEPTHS, UNSURE = (2, 3, 5, 9), (2, 5, 9)
METHODS = {
    "layerskip": (chain.Policy(3), (4, 9), chain_twin.Fixed),
    "adadecode": (Sure(4, 0.37), DEPTHS, lambda: chain_twin.Sure(0.37)),
    "del": (Dynamic(4, DEPTHS, 0.9, True), DEPTHS, lambda: chain_twin.Dynamic(DEPTHS, 4, 0.9, True)),
    "del, not so sure": (Dynamic(3, UNSURE, 0.95, False), UNSURE, lambda: chain_twin.Dynamic(UNSURE, 3, 0.95, False)),
    "oracle": (Hindsight(), DEPTHS, chain_twin.Fixed),
}


@functools.partial(jax.jit, static_argnames=("policy", "depths"))
def decode(tables, prompts, lengths, first, limits, sampling, *, policy, depths):
    """The record after the library's own while_loop."""
    memory = toy_prefill(tables, prompts, lengths, capacity=CAPACITY + 2 * policy.rows, slots=0)
    network = chain_toy(tables, depths)
    options = {"policy": policy, "limits": limits, "sampling": sampling}
    state = chain.init(network, memory, first, lengths, capacity=CAPACITY, **options)
    return until_done(lambda state: chain.step(network, state, **options), state, None).record


@pytest.mark.parametrize(
    ("name", "sampled"),
    [("layerskip", False), ("adadecode", True), ("del", True), slow("del, not so sure", True), ("oracle", True)],
)
def test_rounds_are_those_of_the_twin_and_tokens_those_of_ar(name, sampled) -> None:
    policy, depths, make = METHODS[name]
    stages = len(depths)
    drafted = accepted = rejected = 0
    for seed in range(6):
        tables = cached_tables(seed, stages, VOCABULARY, openness=0.2, draft_size=9 if sampled else None)
        model, case = ToyModel(tables), random_case(seed, BATCH, VOCABULARY, sampled=sampled)
        draws = [twin_draws(case, row, VOCABULARY) for row in range(BATCH)]
        limits, shape = case.max_new_tokens, {"eos_ids": case.eos_ids, "stages": stages}
        plain = [
            autoregressive(model, prompt, **shape, max_new_tokens=limits[row], draws=draws[row])
            for row, prompt in enumerate(case.prompts)
        ]
        record = decode(tables, *arrays(case, [tokens[0] for tokens in plain]), policy=policy, depths=depths)
        record = jax.tree.map(np.asarray, record)
        for row, prompt in enumerate(case.prompts):
            given = {"depths": depths, "policy": make(), "draft_length": policy.draft_length, "eos": case.eos_ids}
            options = {**given, "limit": limits[row], "draws": draws[row]}
            twin = chain_twin.chain_run(model, prompt, plain[row][0], **options)
            assert twin.closest > 1e-6, "rounding decides here: choose another threshold"
            tokens, exits = emitted(record, row)
            assert tokens == twin.tokens == plain[row]
            if name == "oracle":
                expected = chain_twin.earliest(model, prompt, tokens, stages=stages, draws=draws[row])
                assert exits == expected
                assert twin.layer_steps == depths[-1] * (len(tokens) - 1)
                continue
            assert exits == twin.exits
            assert record.ticks[row] == twin.rounds == rounds_of(record.exits[row], len(tokens), stages)
            assert record.spent[row, len(tokens) - 1].tolist() == [twin.layer_steps, twin.drafted]
            drafted += twin.drafted
            accepted += sum(0 < exit_number < stages for exit_number in exits)
            rejected += twin.drafted > sum(0 < exit_number < stages for exit_number in exits)
    if name != "oracle":
        assert drafted > accepted > 10, "nothing was right, or nothing wrong: this would test nothing"
        assert rejected > 0


def test_the_bound_by_hand() -> None:
    assert bound_of(np.array([-1, 1, 4, 2, -1]), 4, DEPTHS) == 2 + 9 + 9
    assert bound_of(np.array([-1, 1]), 2, DEPTHS) == 9
    assert bound_of(np.array([-1]), 1, DEPTHS) == 0
