"""Serial rounds in exact arithmetic against the slow twin, and the pieces they are made of."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import serial_twin

from dex_jax.decoding import record, serial
from dex_jax.decoding.record import Limits
from dex_jax.decoding.suffix import LONGEST, continuation
from dex_jax.errors import DexError
from dex_jax.lattice import NO_NODE
from dex_jax.sampling import Sampling, position_noise, sampling_keys

P, VOCABULARY, CAPACITY = 31, 13, 48
LOOKUP = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9)
NO_LOOKUP = (0.0,) * LONGEST


class Toy:
    """A state below P is the weighted sum of all tokens; logits are tables. The drafter knows states, not the table."""

    vocab_size = VOCABULARY

    def __init__(self, seed: int, disagreement: int, draft_size: int | None):
        rng = np.random.default_rng(seed)
        self.table = rng.integers(0, 7, (P, VOCABULARY)).astype(np.float32)
        self.columns = None if draft_size is None else np.sort(rng.permutation(VOCABULARY)[:draft_size])
        stray = rng.integers(-disagreement, disagreement + 1, self.table.shape)
        self.draft_table = (self.table + stray).astype(np.float32)

    @staticmethod
    def key(token, position):
        return (token + 1) * (position % 7 + 1)

    def state(self, tokens) -> int:
        return int(sum(self.key(token, position) for position, token in enumerate(tokens)) % P)

    def final(self, tokens) -> np.ndarray:
        return self.table[self.state(tokens)]

    def draft(self, tokens, committed) -> np.ndarray:
        return self.draft_table[self.state(tokens)][self.columns]

    def network(self) -> serial.TreeNetwork:
        """Memory: (keys of committed positions [B, S], the state at the last of them [B])."""
        table, draft_table = jnp.asarray(self.table), jnp.asarray(self.draft_table)

        def run(memory, token, position, ancestors, prefix):
            keys, _ = memory
            own = self.key(token, position).astype(jnp.float32)
            before = jnp.sum(jnp.where(jnp.arange(keys.shape[1])[None] < prefix[:, None], keys, 0), axis=1)
            among = jnp.einsum("bnm,bm->bn", ancestors.astype(jnp.float32), own)
            return ((before[:, None] + among) % P)[:, :, None], own

        def commit(memory, fresh, path):
            keys, state = memory
            at = path.prefix[:, None] + jnp.arange(path.row.shape[1])[None]
            keys = keys.at[jnp.arange(at.shape[0])[:, None], at].set(jnp.take_along_axis(fresh, path.row, axis=1))
            last = jnp.take_along_axis(path.hidden[:, :, 0], jnp.maximum(path.length - 1, 0)[:, None], axis=1)[:, 0]
            return keys, jnp.where(path.length > 0, last, state)

        def draft(memory, of_parent, token, position, parent):
            previous = jnp.where(parent == NO_NODE, memory[1][:, None], of_parent[:, :, 0])
            state = ((previous + self.key(token, position)) % P)[:, :, None]
            return state, state

        drafter = None
        if self.columns is not None:
            columns = jnp.asarray(self.columns, jnp.int32)
            drafter = serial.Drafter(
                begin=lambda batch, rows: jnp.zeros((batch, rows, 1)),
                run=draft,
                logits=lambda features: draft_table[features[:, 0].astype(jnp.int32)][:, columns],
                rest=None,
                vocabulary=columns,
            )
        return serial.TreeNetwork(
            VOCABULARY, run, commit, lambda hidden: table[hidden[:, 0].astype(jnp.int32)], drafter
        )


def decode(toy: Toy, prompts, firsts, shape, limits: Limits, sampling=None):
    """The library's rounds: the last state."""
    longest = max(map(len, prompts))
    length = longest + CAPACITY + shape.levels
    padded = np.zeros((len(prompts), longest), np.int32)
    keys = np.full((len(prompts), length), 7.0, np.float32)
    state = np.zeros(len(prompts), np.float32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
        keys[row, : len(prompt)] = [toy.key(token, position) for position, token in enumerate(prompt)]
        state[row] = toy.state(prompt)

    @jax.jit
    def all_rounds(memory, limits, sampling):
        network = toy.network()
        begun = serial.init(
            network,
            memory,
            jnp.asarray(padded),
            jnp.asarray(firsts, jnp.int32),
            jnp.asarray([len(prompt) for prompt in prompts], jnp.int32),
            shape=shape,
            length=length,
            capacity=CAPACITY,
            limits=limits,
            sampling=sampling,
        )
        return serial.run(network, begun, limits, sampling, shape=shape)

    return all_rounds((jnp.asarray(keys), jnp.asarray(state)), limits, sampling)


SHAPES = {
    "chain": ((1, 1, 1), 3, LOOKUP),
    "tree": ((3, 2, 2, 1), 4, NO_LOOKUP),
    "tree and lookup": ((3, 2, 1, 1, 1), 3, LOOKUP),
    "lookup alone": ((1, 1, 1, 1), 0, LOOKUP),
    "nothing": ((1,), 0, NO_LOOKUP),
}


QUICK = (("tree and lookup", 0.7), ("lookup alone", None))
CASES = itertools.product(SHAPES, (None, 0.7))


@pytest.mark.parametrize(("name", "temperature"), [each if each in QUICK else slow(*each) for each in CASES])
def test_rounds_are_those_of_the_twin_and_tokens_those_of_ar(name, temperature) -> None:
    widths, drafted, lookup = SHAPES[name]
    shape = serial.TreeShape(widths, drafted, lookup)
    held = rounds = 0
    for seed in range(4):
        rng = np.random.default_rng([seed, 7])
        toy = Toy(seed, int(rng.integers(0, 4)), None if name == "lookup alone" else int(rng.integers(5, 14)))
        prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (3, 9, 5)]
        firsts = rng.integers(0, VOCABULARY, 3).tolist()
        limits = Limits(jnp.asarray([40, 17, 1], jnp.int32), jnp.asarray([12], jnp.int32))
        keys = sampling_keys([seed, seed + 1, seed + 2])
        sampling = None if temperature is None else Sampling(keys, jnp.float32(temperature), None, None)
        state = decode(toy, prompts, firsts, shape, limits, sampling)
        for row, (prompt, first) in enumerate(zip(prompts, firsts, strict=True)):
            draws = None
            if temperature is not None:
                noise = functools.partial(lambda key, n: np.array(position_noise(key, n, VOCABULARY)), keys[row])
                draws = serial_twin.Draws(noise, temperature)
            limit = int(limits.max_new_tokens[row])
            options = {"limit": limit, "eos": (12,), "draws": draws}
            twin = serial_twin.serial_run(toy, prompt, first, widths=widths, drafted=drafted, lookup=lookup, **options)
            plain = serial_twin.serial_run(toy, prompt, first, widths=(), drafted=0, lookup=lookup, **options)
            size = len(twin.tokens)
            assert int(state.record.lengths[row]) == size
            assert state.record.tokens[row, :size].tolist() == twin.tokens == plain.tokens
            assert state.record.exits[row, :size].tolist() == twin.exits
            assert int(state.record.ticks[row]) == twin.rounds
            assert bool(state.record.done[row])
            held += twin.exits.count(0)
            rounds += twin.rounds
    assert (held == 0) == (name == "nothing")
    assert rounds > 20


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_a_round_drafts_and_runs_what_is_worth_its_time(temperature) -> None:
    """Alone, as a batch chooses for all its sequences together; the twin says what each round drafts and runs."""
    rows_chosen: set[int] = set()
    levels_chosen: set[int] = set()
    for seed in range(6):
        rng = np.random.default_rng([seed, 11])
        a_row_more = (1, 2, 4, 8, 16, 28)[seed] / 32
        drafting = (0, 1, 3, 6, 2, 1)[seed] / 32
        rungs = tuple((rows, 1 + a_row_more * (rows - 1)) for rows in (1, 3, 6, 10))
        widths, drafted, lookup = (3, 2, 2, 1, 1), 4, LOOKUP
        toy = Toy(seed, int(rng.integers(0, 4)), 11)
        shape = serial.TreeShape(widths, drafted, lookup, rungs, drafting)
        prompt, first = rng.integers(0, VOCABULARY, 8).tolist(), int(rng.integers(0, VOCABULARY))
        limits = Limits(jnp.asarray([40], jnp.int32), jnp.asarray([12], jnp.int32))
        keys, draws, sampling = sampling_keys([seed]), None, None
        if temperature is not None:
            sampling = Sampling(keys, jnp.float32(temperature), None, None)
            noise = functools.partial(lambda key, n: np.array(position_noise(key, n, VOCABULARY)), keys[0])
            draws = serial_twin.Draws(noise, temperature)
        options = {"widths": widths, "drafted": drafted, "lookup": lookup, "limit": 40, "eos": (12,), "draws": draws}
        twin = serial_twin.serial_run(toy, prompt, first, rungs=rungs, drafting=drafting, **options)
        whole = serial_twin.serial_run(toy, prompt, first, **options)
        state = decode(toy, [prompt], [first], shape, limits, sampling)
        size = len(twin.tokens)
        assert state.record.tokens[0, :size].tolist() == twin.tokens == whole.tokens
        assert state.record.exits[0, :size].tolist() == twin.exits
        assert int(state.record.ticks[0]) == twin.rounds >= whole.rounds
        assert float(state.spent) == twin.spent
        assert float(state.promised) == pytest.approx(twin.promised, rel=1e-5)
        rows_chosen |= set(twin.rows)
        levels_chosen |= set(twin.levels)
    assert len(rows_chosen) > 2
    assert len(levels_chosen) > 2


def test_a_batch_spends_time_for_all_of_it() -> None:
    """What a round takes is counted once for every sequence that is still going."""
    toy, rungs = Toy(3, 2, 11), ((1, 1.0), (4, 1.5), (10, 2.0))
    shape = serial.TreeShape((3, 2, 2, 1, 1), 4, LOOKUP, rungs, 1 / 16)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (3, 9, 5)]
    limits = Limits(jnp.asarray([40, 17, 1], jnp.int32), jnp.asarray([12], jnp.int32))
    state = decode(toy, prompts, [1, 2, 3], shape, limits)
    rounds = np.asarray(state.record.ticks)
    assert rounds[2] == 0
    assert rounds.sum() <= float(state.spent) <= rounds.sum() * (2.0 + 4 / 16)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_path_is_emitted_as_its_tokens_would_be_one_by_one(seed: int) -> None:
    batch, size, capacity = 3, 5, 9
    rng = np.random.default_rng(seed)
    limits = Limits(jnp.asarray(rng.integers(1, capacity + 1, batch), jnp.int32), jnp.asarray([3], jnp.int32))
    at_once = record.begin(jnp.asarray(rng.integers(0, 6, batch), jnp.int32), capacity, limits)
    singly = at_once
    for _ in range(3):
        tokens = jnp.asarray(rng.integers(0, 6, (batch, size)), jnp.int32)
        born_at = jnp.asarray(rng.integers(0, 2, (batch, size)), jnp.int32)
        count = jnp.asarray(rng.integers(1, size + 1, batch), jnp.int32)
        ticks = singly.ticks + ~singly.done
        for i in range(size):
            singly = record.emit(singly, tokens[:, i], born_at[:, i], (i < count) & ~singly.done, limits)
        singly = singly._replace(ticks=ticks)
        at_once, _ = record.emit_path(at_once, tokens, born_at, count, limits)
        chex.assert_trees_all_equal(at_once, singly)


def test_rungs_that_mean_nothing_are_refused() -> None:
    for rungs in (((1, 1.0),), ((2, 1.0), (2, 1.5)), ((1, 2.0), (2, 1.0)), ((1, 0.0), (2, 1.0))):
        with pytest.raises(DexError, match="rungs ascend to its 2 rows"):
            serial.TreeShape((1,), 0, LOOKUP, rungs)
    with pytest.raises(DexError, match="cannot take -1 AR steps"):
        serial.TreeShape((1,), 0, LOOKUP, ((1, 1.0), (2, 2.0)), -1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_the_continuation_is_that_of_the_longest_latest_match(text) -> None:
    padded = jnp.asarray([*text, *[1] * (30 - len(text))], jnp.int32)
    tokens, matched = jax.jit(continuation, static_argnums=2)(padded, len(text), 5)
    wanted, length = serial_twin.continuation(text, 5)
    assert int(matched) == length
    if length:
        assert tokens.tolist() == wanted
