"""Runs of the library's loop on toy models, tick by tick, and their comparison with the twin."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reference import twin
from reference.toy_models import Tables, ToyModel, toy_network, toy_prefill

from dex_jax import DexState, Limits, Record, Sampling, TreeShape, init, run, step
from dex_jax.lattice import Lattice
from dex_jax.sampling import position_noise, sampling_keys

PROMPT_WIDTH = 6
CAPACITY = 12


class Ticks(NamedTuple):
    """Parts of the state after each tick, with a leading axis of ticks."""

    lattice: Lattice
    prefix: np.ndarray
    record: Record


class Case(NamedTuple):
    """A batch: ragged prompts, one limit and one seed a sequence, EOS ids, and the filters shared by all."""

    prompts: list[list[int]]
    max_new_tokens: list[int]
    seeds: list[int]
    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def random_case(seed: int, batch: int, vocab_size: int, *, sampled: bool) -> Case:
    """Return prompts of 1 to PROMPT_WIDTH tokens and limits up to CAPACITY, with EOS ids and filters in some cases."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, PROMPT_WIDTH + 1, batch)
    limits = np.where(rng.random(batch) < 0.7, CAPACITY, rng.integers(1, CAPACITY + 1, batch))
    case = Case(
        prompts=[rng.integers(0, vocab_size, n).tolist() for n in lengths],
        max_new_tokens=limits.tolist(),
        seeds=rng.integers(0, 1000, batch).tolist(),
        eos_ids=tuple(rng.integers(0, vocab_size, seed % 3).tolist()),
    )
    if not sampled:
        return case
    return case._replace(
        temperature=(0.5, 1.0, 2.0)[seed % 3],
        top_k=int(rng.integers(2, vocab_size + 1)) if seed % 4 != 1 else vocab_size,
        top_p=(0.55, 0.83, 0.97)[seed % 3] if seed % 2 else 1.0,
    )


def twin_draws(case: Case, row: int, vocab_size: int) -> twin.Draws | None:
    """Return the same draws for the twin, with noise as a table by position."""
    if case.temperature is None:
        return None
    noise = noise_table(case.seeds[row], vocab_size).__getitem__
    return twin.Draws(noise, case.temperature, case.top_k, case.top_p)


def twin_runs(
    model: ToyModel, case: Case, *, vocab_size: int, drafts: TreeShape | None = None, **options
) -> list[twin.Run]:
    """Return the batch as independent runs of the twin; `options` are those of `twin.decode`."""
    options |= {"shape": drafts, "eos_ids": case.eos_ids}
    return [
        twin.decode(model, prompt, max_new_tokens=limit, draws=twin_draws(case, row, vocab_size), **options)
        for row, (prompt, limit) in enumerate(zip(case.prompts, case.max_new_tokens, strict=True))
    ]


def watched(tables: Tables, case: Case, first: list[int], **shape) -> Ticks:
    """Return every tick of the library's loop, until even the slowest sequence must have ended."""
    return jax.tree.map(np.asarray, _watched(tables, *arrays(case, first), **shape))


def finished(tables: Tables, case: Case, first: list[int], **shape) -> DexState:
    """Return the state after the library's own while_loop."""
    return jax.tree.map(np.asarray, _finished(tables, *arrays(case, first), **shape))


def emitted(record: Record, row: int) -> tuple[list[int], list[int]]:
    """Return (tokens, exits) of one sequence."""
    length = int(record.lengths[row])
    return record.tokens[row, :length].tolist(), record.exits[row, :length].tolist()


def lattice_contents(ticks: Ticks, tick: int, row: int, stages: int) -> set[twin.Seen]:
    """Return the live nodes after `tick` (1-based) as the twin describes them.

    It also asserts what the twin cannot show: the ancestor set of a node is its path and nothing else.
    """
    lattice = jax.tree.map(lambda field: field[tick - 1, row], ticks.lattice)
    rows = lattice.token.shape[1]
    token, parent = lattice.token.reshape(-1), lattice.parent.reshape(-1)
    contents = set()
    position, score, born_at = (x.reshape(-1) for x in (lattice.position, lattice.score, lattice.born_at))
    for slot in np.flatnonzero(lattice.live.reshape(-1)).tolist():
        path = [slot]
        while parent[path[-1]] >= 0:
            path.append(int(parent[path[-1]]))
            assert len(path) <= parent.size, "a path runs in a circle"
        assert path[-1] == lattice.root, "a live node does not hang under the root"
        seen = np.flatnonzero(lattice.ancestors[slot // rows, slot % rows]).tolist()
        assert seen == sorted(path), "a node attends to something else than its path"
        tokens, progress = tuple(int(token[s]) for s in reversed(path)), (tick - slot // rows) % stages
        contents.add(twin.Seen(tokens, progress, int(born_at[slot]), int(position[slot]), float(score[slot])))
    assert len(contents) == lattice.live.sum(), "two nodes are the same candidate"
    return contents


def arrays(case: Case, first: list[int]):
    """Return padded prompts [B, R], lengths [B], first tokens [B], Limits and Sampling of a case."""
    prompts = np.zeros((len(case.prompts), PROMPT_WIDTH), np.int32)
    for padded, prompt in zip(prompts, case.prompts, strict=True):
        padded[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in case.prompts], np.int32)
    eos = np.array([*case.eos_ids, -1, -1][:2], np.int32)
    limits = Limits(np.array(case.max_new_tokens, np.int32), eos)
    sampling = None
    if case.temperature is not None:
        sampling = Sampling(
            sampling_keys(case.seeds),
            np.float32(case.temperature),
            None if case.top_k is None else np.int32(case.top_k),
            None if case.top_p is None else np.float32(case.top_p),
        )
    return prompts, lengths, np.array(first, np.int32), limits, sampling


def _watch(tables, *case, decs: bool, **shape) -> Ticks:
    """Return all ticks of the library's loop; `case` is what `arrays` returns."""
    *_, limits, sampling = case

    def tick(state: DexState, _):
        state = step(toy_network(tables), state, limits, sampling, decs=decs, drafts=shape["drafts"])
        return state, Ticks(state.lattice, state.prefix, state.record)

    ticks = jax.lax.scan(tick, initial_state(tables, *case, **shape), length=1 + shape["stages"] * (CAPACITY - 1))[1]
    return jax.tree.map(lambda field: field[1:], ticks)


def initial_state(tables, prompts, lengths, first, limits, sampling, stages: int, rows: int, drafts=None) -> DexState:
    """Return the state after the prefill of the prompts."""
    room = CAPACITY + (0 if drafts is None else drafts.levels)
    memory = toy_prefill(tables, prompts, lengths, capacity=room, slots=stages * rows)
    return init(
        toy_network(tables),
        memory,
        first,
        lengths,
        stages=stages,
        rows=rows,
        capacity=CAPACITY,
        limits=limits,
        sampling=sampling,
        drafts=drafts,
        prompt=prompts,
        length=PROMPT_WIDTH + CAPACITY + 60,
    )


def finish(tables, *case, decs: bool, **shape) -> DexState:
    """Run the library's own while_loop and return the state; jit traces this function."""
    *_, limits, sampling = case
    return run(
        toy_network(tables), initial_state(tables, *case, **shape), limits, sampling, decs=decs, drafts=shape["drafts"]
    )


_finished = jax.jit(finish, static_argnames=("stages", "rows", "decs", "drafts"))
_watched = jax.jit(_watch, static_argnames=("stages", "rows", "decs", "drafts"))


@functools.cache
def noise_table(seed: int, vocab_size: int) -> np.ndarray:
    """Return the noise [positions, V] float32 of a seed."""
    return np.asarray(_noise(sampling_keys([seed])[0], vocab_size))


@functools.partial(jax.jit, static_argnums=1)
def _noise(key: jax.Array, vocab_size: int) -> jax.Array:
    positions = jnp.arange(PROMPT_WIDTH + CAPACITY + 60)  # nodes look beyond the last token
    return jax.vmap(position_noise, (None, 0, None))(key, positions, vocab_size)
