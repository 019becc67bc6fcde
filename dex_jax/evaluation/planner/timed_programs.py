"""The programs that `calibrate` times: the library's own layers, heads and lattice, and what a device does at best."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax import cache
from dex_jax.config import ModelConfig
from dex_jax.decoding.dex import loop
from dex_jax.decoding.dex.interface import Exits, Network, StageView
from dex_jax.decoding.dex.proposals import HEAD_BLOCK, Proposers, propose
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.record import Limits
from dex_jax.hardware import Link
from dex_jax.lattice import NO_NODE
from dex_jax.nn.forward import extend
from dex_jax.nn.layers import linear
from dex_jax.nn.transformer import Transformer, Unrolled
from dex_jax.nn.weights import abstract_weights, merge_model
from dex_jax.sampling import choose

TEXT = 512
"""Tokens that drafts are looked up in."""


class Timer(NamedTuple):
    """How long each figure is measured."""

    repeats: int  # measurements, of which the median counts
    least: float  # seconds that each of them takes at least

    def __call__(self, run: Callable[[int], Any]) -> float:
        """Seconds of one round of run(n), which makes n rounds one after the other on the device."""
        jax.block_until_ready(run(1))
        begin = time.perf_counter()
        jax.block_until_ready(run(2))
        rounds = max(1, round(2 * self.least / max(time.perf_counter() - begin, 1e-9)))
        found = []
        for _ in range(self.repeats):
            begin = time.perf_counter()
            jax.block_until_ready(run(rounds))
            found.append((time.perf_counter() - begin) / rounds)
        return statistics.median(found)


def _weights(config: ModelConfig, dtype: jnp.dtype) -> Any:
    """Small numbers of the right shapes; their values do not matter, but zeros and subnormals would."""
    shapes = abstract_weights(config, Unrolled(), dtype)
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)


def _repeated(step: Callable[[Any, Any], Any], weights: Any, state: Any) -> Callable[[int], Any]:
    """n -> state after n times more step(weights, state), under jit.

    The state is given away to the program, as decoding does: caches that it had to keep would be copied in every call.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def run(weights: Any, state: Any, rounds: Any) -> Any:
        return jax.lax.fori_loop(0, rounds, lambda i, state: step(weights, state), state)

    held = jax.tree.map(jnp.copy, state)

    def again(rounds: int) -> Any:
        nonlocal held
        held = run(weights, held, rounds)
        return held

    return again


def rows_seconds(config: ModelConfig, dtype: jnp.dtype, rows: int, length: int, timer: Timer) -> float:
    """Seconds of all layers over `rows` consecutive tokens of one sequence beside a cache of `length` positions."""
    weights = _weights(config, dtype)

    def step(weights: Any, state: Any) -> Any:
        tokens, memory = state
        model = merge_model(config, Unrolled(), weights)
        hidden, memory = extend(model, memory, tokens, jnp.asarray([length - rows], jnp.int32))
        # Other tokens, known only when `hidden` is.
        return jnp.where(hidden.reshape(-1)[0] > 1e30, tokens, tokens ^ 1), memory

    state = (jnp.zeros((1, rows), jnp.int32), cache.allocate(config, Unrolled(), 1, length, 0, dtype))
    return timer(_repeated(step, weights, state))


def head_seconds(config: ModelConfig, dtype: jnp.dtype, rows: int, timer: Timer) -> float:
    """Seconds of final norm, unembedding and choice of `rows` rows."""
    bare = config.with_layers(1)
    weights = _weights(bare, dtype)

    def step(weights: Any, hidden: jax.Array) -> jax.Array:
        model: Transformer = merge_model(bare, Unrolled(), weights)
        token = choose(model.logits(hidden), None, None)[0]
        return hidden + (token[:, None] % 2).astype(hidden.dtype)

    return timer(_repeated(step, weights, jnp.full((rows, config.width), 0.1, dtype)))


def exits_seconds(config: ModelConfig, dtype: jnp.dtype, columns: int, rows: int, timer: Timer) -> float:
    """Seconds of asking one exit about `rows` nodes through `columns` of the unembedding: mask, choice, probability."""
    kernel = jnp.full((columns, config.width), 0.01, dtype)
    # More nodes than a call of the heads asks of one sequence are those of several.
    width = min(rows, HEAD_BLOCK)
    batch = -(-rows // width)
    shape = (1, batch, width)
    view = StageView(
        ring=jnp.arange(2, dtype=jnp.int32),
        token=jnp.zeros((2, batch, width), jnp.int32),
        position=jnp.zeros((2, batch, width), jnp.int32),
        live=jnp.ones((2, batch, width), bool),
        ancestors=jnp.zeros((2, batch, width, 2 * width), bool),
        parent=jnp.full((2, batch, width), NO_NODE, jnp.int32),
        prefix=jnp.zeros(batch, jnp.int32),
        slots=jnp.zeros((batch, 2 * width), jnp.int32),
    )
    none = jnp.full((batch, 2 * width), NO_NODE, jnp.int32)
    nodes = Proposers(jnp.ones(shape, bool), jnp.zeros(shape), none, none)

    def step(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
        exits = Exits(
            features=lambda memory, hidden, view: hidden[:-1],
            logits=lambda features: linear(features, kernel, out_dtype=jnp.float32),
            vocabulary=jnp.arange(columns, dtype=jnp.int32),
            columns=jnp.minimum(jnp.arange(config.vocab_size, dtype=jnp.int32), columns),
        )
        found = propose(exits, (), hidden, view, nodes, None, None, decs=True)
        return hidden + (found.token.sum() % 2).astype(hidden.dtype)

    return timer(_repeated(step, kernel, jnp.full((2, batch, width, config.width), 0.1, dtype)))


def lattice_seconds(stages: int, timer: Timer, drafts: TreeShape | None = None) -> float:
    """Seconds of a tick around a network that computes nothing but a spread of cheap logits; `drafts` of the text."""
    width, rows = 64, 8
    table = jnp.arange(width, dtype=jnp.float32)

    def network(table: jax.Array) -> Network:
        def logits(hidden: jax.Array) -> jax.Array:
            return jnp.sin(hidden[:, :1] * table[None, :])

        return Network(
            vocab_size=width,
            embed=lambda tokens, positions: (tokens[..., None] % 7 + positions[..., None] % 5).astype(jnp.float32),
            advance=lambda memory, hidden, view: (hidden + 1, memory),
            commit=lambda memory, done: memory,
            final=logits,
            exits=Exits(lambda memory, hidden, view: hidden[:-1], logits),
        )

    limits = Limits(jnp.asarray([10**9], jnp.int32), jnp.asarray([-1], jnp.int32))
    prompt = None if drafts is None else jnp.zeros((1, TEXT), jnp.int32)

    @jax.jit
    def begin(table: jax.Array) -> loop.DexState:
        at: dict[str, Any] = {"stages": stages, "rows": rows, "capacity": 16, "limits": limits}
        first, position = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
        return loop.init(network(table), (), first, position, drafts=drafts, prompt=prompt, length=TEXT, **at)

    state = begin(table)
    run = jax.jit(lambda table, state, until: loop.run(network(table), state, limits, until_tick=until, drafts=drafts))
    return timer(lambda rounds: run(table, state, jnp.int32(rounds)))


def bandwidth(size: int, timer: Timer) -> float:
    """Bytes a second of reading about `size` bytes once: more than caches hold."""
    large = jnp.ones((size // 4 // 1024, 1024), jnp.float32)
    # A maximum, the fastest of the reads tried.
    read = _repeated(lambda large, least: jnp.minimum(jnp.max(large + least), least), large, jnp.float32(0))
    return large.nbytes / timer(read)


def flops(dtype: jnp.dtype, timer: Timer) -> float:
    """Operations a second of a large square product."""
    side = 1024 if jax.devices()[0].platform == "cpu" else 8192
    left = jnp.full((side, side), 1.0 / side, dtype)
    return 2 * side**3 / timer(_repeated(lambda kernel, x: x @ kernel, left, left))


def link(timer: Timer) -> Link:
    """Between neighbouring devices: a small and a large permutation."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("all")
    ring = [(i, (i + 1) % count) for i in range(count)]

    def seconds(numbers: int) -> float:
        @jax.jit
        def run(x: jax.Array, rounds: Any) -> jax.Array:
            def once(x: jax.Array, rounds: jax.Array) -> jax.Array:
                return jax.lax.fori_loop(0, rounds[0], lambda i, x: jax.lax.ppermute(x, "all", ring), x)

            rounds = jnp.full((1,), rounds, jnp.int32)
            held = jax.sharding.PartitionSpec()
            return jax.shard_map(once, mesh=mesh, in_specs=(spec, held), out_specs=spec, check_vma=False)(x, rounds)

        x = jax.device_put(jnp.zeros((count, numbers), jnp.float32), jax.sharding.NamedSharding(mesh, spec))
        return timer(lambda rounds: run(x, rounds))

    small, large = seconds(16), seconds(2**20)
    return Link(f"measured between {count} devices", small, 4 * 2**20 / max(large - small, 1e-9))
