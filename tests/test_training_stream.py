"""The training stream against its plain-Python twin, and what a checkpoint relies on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import stream_twin
from reference.small_models import LLAMA, small_model

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel
from dex_jax.nn import cache
from dex_jax.nn.forward import depth_states
from dex_jax.nn.weights import abstract_weights, merge_model
from dex_jax.training.items import Item, Turn, no_script, stack_scripts
from dex_jax.training.stream import PRODUCE, Activations, Stream, StreamSpec, start_rows

ROWS, STEPS, HISTORY, LENGTH, DEPTHS = 4, 9, 5, 24, (1, 3, 4)
SEED = 11


@functools.cache
def model() -> LanguageModel:
    # A quarter of the vocabulary ends a free part, so that many do before their limit.
    return small_model(dataclasses.replace(LLAMA, eos_ids=tuple(range(0, 48, 4))))


@functools.cache
def item(number: int) -> Item:
    """Items of every kind in turn: self-written prompt, sampled, greedy and cut short, given text, one free token."""
    rng = np.random.default_rng(number)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, LLAMA.vocab_size, count).tolist())

    kinds = (
        (Turn(tokens(3), 6, 1.0, 0.8), Turn(tokens(2), 7, forced_weight=0.25)),
        (Turn(tokens(int(rng.integers(1, 6))), 12, 1.5),),
        (Turn(tokens(4), 9, forced_weight=0.5),),
        (Turn(tokens(int(rng.integers(1, 20))), forced_weight=1.0),),
        (Turn(tokens(1), 1, 0.7, 0.5), Turn(tokens(1), 0), Turn(tokens(2), 2, 1.0)),
    )
    return Item(kinds[number % len(kinds)])


@functools.cache
def told(number: int) -> stream_twin.Told:
    return stream_twin.run_item(model(), item(number), number, SEED, LENGTH)


def stream(items=item, lm: LanguageModel | None = None, **changes) -> Stream:
    options = {"batch": ROWS, "steps": STEPS, "history": HISTORY, "length": LENGTH, "depths": DEPTHS, "seed": SEED}
    return Stream(lm or model(), items, **(options | changes))


def chunks(source: Stream, count: int) -> list[Activations]:
    return [jax.device_get(source.next()[0]) for _ in range(count)]


def joined(run: list[Activations], field: str) -> np.ndarray:
    """One field of consecutive chunks without the history, along the axis of steps."""
    axis = 2 if field == "states" else 1
    parts = [getattr(chunk, field) for chunk in run]
    skip = 0 if field in ("states", "weight") else HISTORY
    return np.concatenate([np.take(part, range(skip, part.shape[axis]), axis) for part in parts], axis)


def test_rows_do_what_the_twin_does() -> None:
    source = stream()
    pairs = [source.next() for _ in range(6)]
    run = [jax.device_get(chunk) for chunk, _ in pairs]
    twin = stream_twin.run_rows(told, ROWS, STEPS, 6, waiting=2 * ROWS)
    np.testing.assert_array_equal(joined(run, "position"), twin.position)
    np.testing.assert_array_equal(joined(run, "token"), twin.token)
    np.testing.assert_array_equal(joined(run, "weight"), twin.weight)
    assert [learnt for _, learnt in pairs] == [int((chunk.weight > 0).sum()) for chunk in run]
    assert source.cursor == {"item": twin.number.max() + 1, "seed": SEED}
    # The twin's own items are as varied as they should be: ends by choice and by limit, and several a row.
    ended_early = [n for n in range(20) if len(told(n).tokens) < item(n).longest]
    assert 2 <= len(ended_early) <= 18
    assert twin.number.max() > 3 * ROWS


def test_states_are_those_of_the_item_run_alone() -> None:
    run = chunks(stream(), 4)
    twin = stream_twin.run_rows(told, ROWS, STEPS, 4, waiting=2 * ROWS)
    states, final = joined(run, "states"), joined(run, "final")
    module = merge_model(model().config, model().weights)
    alone = jax.jit(lambda tokens: depth_states(module, tokens, DEPTHS))
    for number in range(8):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(told(number).tokens)] = told(number).tokens
        expected = np.asarray(alone(padded))[:, 0]
        row, at = (index[0] for index in np.nonzero(twin.number == number))
        positions = twin.position[twin.number == number]
        here = states[:, row, at : at + len(positions)]
        np.testing.assert_allclose(here, expected[:, positions], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(final[row, at : at + len(positions)], expected[-1, positions], rtol=2e-4, atol=2e-5)


def test_history_is_the_end_of_the_chunk_before_and_seeds_differ() -> None:
    run = chunks(stream(), 3)
    assert np.any(joined(chunks(stream(seed=SEED + 1), 2), "token") != joined(run[:2], "token"))
    for field in ("final", "token", "position"):
        assert not np.any(getattr(run[0], field)[:, :HISTORY] != (0 if field == "final" else -1))
        for before, after in itertools.pairwise(run):
            np.testing.assert_array_equal(getattr(before, field)[:, -HISTORY:], getattr(after, field)[:, :HISTORY])


def test_when_more_items_end_in_a_chunk_than_wait_rows_idle_without_weight() -> None:
    def tiny(number: int) -> Item:
        return Item((Turn((number % 48, 5)[: 1 + number % 2], forced_weight=1.0),))

    run = chunks(stream(tiny), 3)
    tell = functools.cache(lambda number: stream_twin.run_item(model(), tiny(number), number, SEED, LENGTH))
    twin = stream_twin.run_rows(tell, ROWS, STEPS, 3, waiting=2 * ROWS)
    np.testing.assert_array_equal(joined(run, "token"), twin.token)
    assert np.mean(twin.number == stream_twin.IDLE) > 0.1
    assert not np.any(joined(run, "weight")[twin.number == stream_twin.IDLE])


def test_a_stream_reads_other_items_and_is_where_it_was() -> None:
    source, never_asked = stream(seed=SEED + 1), stream(seed=SEED + 1)
    for each in (source, never_asked):
        chunks(each, 2)
        each.restart()
    assert source.read([], SEED) == []
    assert source.read([item(number) for number in range(3)], SEED) == [told(number).tokens for number in range(3)]
    assert source.cursor == never_asked.cursor
    jax.tree.map(np.testing.assert_array_equal, chunks(source, 1)[0], chunks(never_asked, 1)[0])


def test_going_on_from_a_cursor_is_bitwise_the_uninterrupted_run() -> None:
    never_killed = stream()
    chunks(never_killed, 4)
    cursor = json.loads(json.dumps(never_killed.cursor))
    never_killed.restart()
    again = stream()
    again.restart(cursor)
    for one, other in zip(chunks(never_killed, 3), chunks(again, 3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert never_killed.cursor == again.cursor
    # Half-done items were dropped: the first token is that of the item the cursor names.
    fresh = stream()
    fresh.restart(cursor)
    first = chunks(fresh, 1)[0]
    assert first.position[:, HISTORY].tolist() == [0] * ROWS
    assert first.token[0, HISTORY] == item(cursor["item"]).turns[0].forced[0]
    assert not np.any(first.token[:, :HISTORY] != -1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": (5,)}, "from 0 to 4"),
        ({"length": 4096}, "2048"),
        ({"steps": 0}, "at least 1 step"),
        ({"mesh": types.SimpleNamespace(shape={"data": 3})}, "4 rows do not divide among 3"),
    ],
)
def test_wrong_sizes_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(DexError, match=says):
        stream(**changes)


def test_no_step_copies_a_cache() -> None:
    # Every size differs from every other, so that a shape names one array.
    config = ModelConfig("llama", 101, 4, 48, 6, 3, 8, 40, 512)
    spec = StreamSpec(config, (1, 4), 13, 7, 197, (0,))
    batch = 5
    memory = cache.shapes(config, batch, spec.length, 0, jnp.dtype(jnp.float32))
    state = jax.eval_shape(lambda memory: start_rows(memory, spec), memory)
    scripts = stack_scripts([no_script(spec.length)] * (3 * batch))
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    arguments = (abstract_weights(config, jnp.dtype(jnp.float32)), state, scripts, jnp.int32(0), key)
    program = PRODUCE.jitted.lower(*arguments, spec=spec).compile()
    dimensions = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.memory.keys)}
    copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not dimensions & set(copies)
    assert f"f32[{dimensions.pop()}]" in program.as_text()
    caches = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.memory))
    assert program.memory_analysis().alias_size_in_bytes >= caches
