"""`python -m dex_jax.evaluation.calibrate`: measures the device at hand for the planner, with this library's programs.

    python -m dex_jax.evaluation.calibrate --model smollm2-135m --output cpu.json

Random weights of the model's shapes, as many layers as no cache of a processor holds, decode rows in the layouts that
there are. What is written are seconds per byte by rows (products of a layer, attention, heads), the fixed cost of a
layer and of a tick, and plain bandwidth and arithmetic. Nothing else should run meanwhile. With several devices the
link between them is measured too. --together N starts N processes that measure at the same time, each on its share of
the cores, as N processes of a mesh would run: cores that share memory are slower together than alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax import cache
from dex_jax.config import ModelConfig
from dex_jax.decoding import loop
from dex_jax.decoding.heads import HEAD_BLOCK, Proposers, propose
from dex_jax.decoding.interface import Exits, Network, StageView
from dex_jax.decoding.methods import even_depths
from dex_jax.decoding.network import extend, transformer_network
from dex_jax.decoding.record import Limits
from dex_jax.errors import DexError
from dex_jax.evaluation.cost_model import KERNELS_A_LAYER
from dex_jax.evaluation.footprint import device_memory
from dex_jax.evaluation.hardware import LINKS, Curve, Device, Hardware, Link, Measured, read_hardware, write_hardware
from dex_jax.evaluation.workload import config_of, work_of
from dex_jax.language_model import DTYPES, merge_model, resolve_dtype
from dex_jax.lattice import NO_NODE, NO_TOKEN
from dex_jax.nn.layers import linear
from dex_jax.nn.transformer import Layout, Stacked, Transformer, Unrolled
from dex_jax.sampling import choose

ROWS = (1, 2, 4, 8, 16, 32)
STAGES = 5
"""Of the stacked layout that is measured, and of the lattice."""

UNCACHED = 160e6
"""Bytes of layers that are measured together: more than a processor's caches hold."""

SHORT, LONG = 64, 2048
"""Cache lengths whose difference is what attention costs."""

DRAFT = 8192
"""Columns that exits are asked with."""

SMALL: dict[str, Any] = {
    "width": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "mlp_width": 32,
    "vocab_size": 64,
}
"""A model whose layers cost nothing but their kernels."""


class Timer(NamedTuple):
    """How long each figure is measured.

    Attributes:
      repeats: measurements, of which the median counts.
      least: seconds that each of them takes at least.
    """

    repeats: int = 7
    least: float = 0.05

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


def calibrate(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    rows: Sequence[int] = ROWS,
    long: int = LONG,
    timer: Timer | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Hardware:
    """Measures the default device.

    Args:
      config: shapes to measure with: those of the model to plan for.
      dtype: of weights and caches.
      rows: ascending row counts to measure.
      long: the longer of two cache lengths.
      timer: how long; None for the usual.
      notify: told what is going on.
    """
    timer = timer or Timer()
    work, size = work_of(config), jnp.dtype(dtype).itemsize
    stages = min(STAGES, config.num_layers)
    count = max(2, round(UNCACHED / (work.layer * size)))
    count = -(-min(config.num_layers, count) // stages) * stages
    part = dataclasses.replace(config, num_layers=count)
    small = dataclasses.replace(config, num_layers=count, **SMALL)
    layouts: dict[str, Layout] = {
        "unrolled": Unrolled(),
        "scan": Stacked(even_depths(stages, count)),
        "stacked": Stacked(even_depths(stages, count)),
    }
    layer: dict[str, Curve] = {}
    fixed: dict[str, float] = {}
    attention: Curve = ()
    for number, (name, layout) in enumerate(layouts.items(), 1):
        notify(f"{number} of 5: layers, {name}")
        measure = _stages_seconds if name == "stacked" else _rows_seconds
        # A scan over the stacked layout runs all stages' layers of one index at once.
        at_once = stages if name == "stacked" else 1
        fixed[name] = measure(small, layout, dtype, 1, SHORT, timer) / count * at_once
        full = {n: measure(part, layout, dtype, n, SHORT, timer) / count for n in rows}
        if name == "unrolled":
            cached = size * work.cached * (long - SHORT)
            ends = sorted({rows[0], rows[min(3, len(rows) - 1)]})
            attention = tuple(
                (n, max(0.0, measure(part, layout, dtype, n, long, timer) / count - full[n]) / cached) for n in ends
            )
        per_byte = {n: max(0.0, seconds - fixed[name] / at_once) / (size * work.layer) for n, seconds in full.items()}
        layer[name] = tuple(sorted(per_byte.items()))
    notify("4 of 5: heads")
    unembed = size * work.vocabulary * work.width
    head = tuple((n, _head_seconds(config, dtype, n, timer) / unembed) for n in rows)
    columns = min(DRAFT, config.vocab_size)
    asked = tuple((n, _exits_seconds(config, dtype, columns, n, timer) / (size * columns * work.width)) for n in rows)
    notify("5 of 5: a tick alone, bandwidth, arithmetic")
    device = jax.devices()[0]
    measured = Measured(layer, attention, head, asked, fixed, _lattice_seconds(stages, timer))
    link = _link(timer) if jax.device_count() > 1 else LINKS["loopback"]
    found = Device(
        name=f"{device.platform}:{device.device_kind}",
        flops=_flops(dtype, timer),
        bandwidth=_bandwidth(timer),
        memory=float(device_memory(device) or 0),
        kernel_seconds=fixed["unrolled"] / KERNELS_A_LAYER,
        itemsize=size,
        reached_bandwidth=1.0,
        reached_flops=1.0,
        measured=measured,
    )
    return Hardware(found, jax.device_count(), 1, link, link)


def _weights(config: ModelConfig, layout: Layout, dtype: jnp.dtype) -> Any:
    """Small numbers of the right shapes; their values do not matter, but zeros and subnormals would."""
    from dex_jax.language_model import abstract_weights

    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), abstract_weights(config, layout, dtype))


def _repeated(step: Callable[[Any], Any]) -> Callable[[Any, Any, int], Any]:
    """jitted (weights, state, n) -> state after n times step(weights)(state)."""

    @jax.jit
    def run(weights: Any, state: Any, rounds: Any) -> Any:
        return jax.lax.fori_loop(0, rounds, lambda i, state: step(weights)(state), state)

    return run


def _moved(tokens: jax.Array, hidden: jax.Array) -> jax.Array:
    """Other tokens, known only when `hidden` is."""
    return jnp.where(hidden.reshape(-1)[0] > 1e30, tokens, tokens ^ 1)


def _rows_seconds(config: ModelConfig, layout: Layout, dtype: jnp.dtype, rows: int, length: int, timer: Timer) -> float:
    """All layers over `rows` consecutive tokens of one sequence beside a cache of `length` positions."""
    weights = _weights(config, layout, dtype)

    def step(weights: Any) -> Callable[[Any], Any]:
        model = merge_model(config, layout, weights)

        def once(state: Any) -> Any:
            tokens, memory = state
            hidden, memory = extend(model, memory, tokens, jnp.asarray([length - rows], jnp.int32))
            return _moved(tokens, hidden), memory

        return once

    run = _repeated(step)
    state = (jnp.zeros((1, rows), jnp.int32), cache.allocate(config, layout, 1, length, 0, dtype))
    return timer(lambda rounds: run(weights, state, rounds))


def _stages_seconds(
    config: ModelConfig, layout: Layout, dtype: jnp.dtype, rows: int, length: int, timer: Timer
) -> float:
    """One tick's layers of all stages side by side in the stacked layout, every row live."""
    assert isinstance(layout, Stacked)
    stages = len(layout.depths)
    weights = _weights(config, layout, dtype)
    slots = stages * rows
    ring = jnp.arange(stages, dtype=jnp.int32)
    shape = (stages, 1, rows)
    itself = jnp.eye(slots, dtype=bool).reshape(stages, 1, rows, slots)
    view = StageView(
        ring=ring,
        token=jnp.zeros(shape, jnp.int32),
        position=jnp.full(shape, length - 1, jnp.int32),
        live=jnp.ones(shape, bool),
        ancestors=itself,
        parent=jnp.full(shape, NO_NODE, jnp.int32),
        prefix=jnp.asarray([length - 1], jnp.int32),
    )

    def step(weights: Any) -> Callable[[Any], Any]:
        network = transformer_network(merge_model(config, layout, weights), layout.depths, None)

        def once(state: Any) -> Any:
            hidden, memory = state
            return network.advance(memory, hidden, view)

        return once

    run = _repeated(step)
    hidden = jnp.full((*shape, config.width), 0.1, dtype)
    memory = cache.allocate(config, layout, 1, length, slots, dtype)
    return timer(lambda rounds: run(weights, (hidden, memory), rounds))


def _only_head(config: ModelConfig, dtype: jnp.dtype) -> tuple[ModelConfig, Any]:
    bare = dataclasses.replace(config, num_layers=1)
    return bare, _weights(bare, Unrolled(), dtype)


def _head_seconds(config: ModelConfig, dtype: jnp.dtype, rows: int, timer: Timer) -> float:
    """Final norm, unembedding and choice of `rows` rows."""
    bare, weights = _only_head(config, dtype)

    def step(weights: Any) -> Callable[[Any], Any]:
        model: Transformer = merge_model(bare, Unrolled(), weights)

        def once(hidden: jax.Array) -> jax.Array:
            token = choose(model.logits(hidden), None, None)[0]
            return hidden + (token[:, None] % 2).astype(hidden.dtype)

        return once

    run = _repeated(step)
    hidden = jnp.full((rows, config.width), 0.1, dtype)
    return timer(lambda rounds: run(weights, hidden, rounds))


def _exits_seconds(config: ModelConfig, dtype: jnp.dtype, columns: int, rows: int, timer: Timer) -> float:
    """Asking one exit about `rows` nodes through `columns` of the unembedding: mask, choice and probability."""
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
    )
    nodes = Proposers(jnp.ones(shape, bool), jnp.zeros(shape), jnp.full((*shape, 1), NO_TOKEN, jnp.int32))

    def step(kernel: jax.Array) -> Callable[[Any], Any]:
        exits = Exits(
            features=lambda memory, hidden, view: hidden[:-1],
            logits=lambda features: linear(features, kernel, out_dtype=jnp.float32),
            vocabulary=jnp.arange(columns, dtype=jnp.int32),
            columns=jnp.minimum(jnp.arange(config.vocab_size, dtype=jnp.int32), columns),
        )

        def once(hidden: jax.Array) -> jax.Array:
            found = propose(exits, (), hidden, view, nodes, None, None, decs=True)
            return hidden + (found.token.sum() % 2).astype(hidden.dtype)

        return once

    run = _repeated(step)
    hidden = jnp.full((2, batch, width, config.width), 0.1, dtype)
    return timer(lambda rounds: run(kernel, hidden, rounds))


def _lattice_seconds(stages: int, timer: Timer) -> float:
    """A tick around a network that computes nothing but a spread of cheap logits."""
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
    start = functools.partial(loop.init, stages=stages, rows=rows, capacity=16, limits=limits)
    state = jax.jit(lambda table: start(network(table), (), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)))(table)
    run = jax.jit(lambda table, state, until: loop.run(network(table), state, limits, until_tick=until))
    return timer(lambda rounds: run(table, state, jnp.int32(rounds)))


def _bandwidth(timer: Timer) -> float:
    """Bytes a second of reading memory once."""
    large = jnp.ones((int(UNCACHED) // 4 // 1024, 1024), jnp.float32)
    read = _repeated(lambda large: lambda least: jnp.minimum(jnp.max(large + least), least))
    # A maximum, the fastest of the reads tried.
    return large.nbytes / timer(lambda rounds: read(large, jnp.float32(0), rounds))


def _flops(dtype: jnp.dtype, timer: Timer) -> float:
    """Operations a second of a large square product."""
    side = 1024 if jax.devices()[0].platform == "cpu" else 8192
    left = jnp.full((side, side), 1.0 / side, dtype)
    run = _repeated(lambda kernel: lambda x: x @ kernel)
    return 2 * side**3 / timer(lambda rounds: run(left, left, rounds))


def _link(timer: Timer) -> Link:
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


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.evaluation.calibrate", description=__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m", help="whose shapes are measured (%(default)s)")
    p.add_argument("--dtype", choices=list(DTYPES), help="float32 on CPUs, bfloat16 on GPUs and TPUs unless given")
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="R", help="row counts (%(default)s)")
    p.add_argument("--long", type=int, default=LONG, metavar="S", help="longer cache that is measured (%(default)s)")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements of each figure (%(default)s)")
    p.add_argument("--least", type=float, default=0.05, metavar="SECONDS", help="of each measurement (%(default)s)")
    p.add_argument("--together", type=int, default=1, metavar="N", help="processes that measure at once (%(default)s)")
    p.add_argument("--output", required=True, metavar="FILE.json", help="for plan --hardware")
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    try:
        if args.together > 1:
            return _together(argv, args.together, args.output)
        rows = sorted(set(args.rows))
        if rows[0] < 1 or args.repeats < 1 or args.least <= 0 or args.long <= SHORT:
            raise DexError(f"--rows and --repeats must be at least 1, --least above 0, --long above {SHORT}")
        found = calibrate(
            config_of(args.model),
            resolve_dtype(args.dtype),
            rows=rows,
            long=args.long,
            timer=Timer(args.repeats, args.least),
            notify=lambda line: print(line, file=sys.stderr, flush=True),
        )
        write_hardware(args.output, found)
    except DexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; nothing is written.", file=sys.stderr)
        return 130
    print(summary(found))
    return 0


def _together(argv: Sequence[str], count: int, output: str) -> int:
    """N processes on their shares of the cores; what the first one measures is written, with count = N.

    Raises:
      DexError: fewer cores than processes, a system that cannot pin them, or a process that fails.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise DexError("--together needs a system that pins processes to cores, such as Linux: leave it out")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise DexError(f"--together {count} needs as many cores, and there are {len(cores)}: ask for fewer")
    size = len(cores) // count
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{i}.json") for i in range(count)]
        started = []
        for i, file in enumerate(files):
            share = set(cores[i * size : (i + 1) * size])
            command = [sys.executable, "-m", "dex_jax.evaluation.calibrate", *argv, "--together", "1", "--output", file]
            # Children inherit the affinity of the moment they are started in.
            os.sched_setaffinity(0, share)
            quiet: dict[str, Any] = {} if i == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, **quiet))
        os.sched_setaffinity(0, set(cores))
        if any(process.wait() for process in started):
            raise DexError("one of the processes has failed: measure without --together to see why")
        write_hardware(output, dataclasses.replace(read_hardware(files[0]), count=count))
    return 0


def summary(found: Hardware) -> str:
    """What was measured, for people."""
    device, measured = found.device, found.device.measured
    assert measured is not None
    lines = [
        f"{device.name}: {device.bandwidth / 1e9:.1f} GB/s, {device.flops / 1e9:.0f} Gflop/s, "
        f"{device.kernel_seconds * 1e6:.2f} us a kernel, {measured.tick_seconds * 1e6:.0f} us a tick alone"
    ]
    curves = {f"layer, {name}": curve for name, curve in measured.layer.items()}
    curves |= {"head": measured.head, "exits": measured.exits, "attention": measured.cache}
    for name, curve in curves.items():
        rates = ", ".join(
            f"{1e-9 / seconds:.1f} at {rows:g}" if seconds else f"- at {rows:g}" for rows, seconds in curve
        )
        lines.append(f"{name}: GB/s by rows {rates}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
