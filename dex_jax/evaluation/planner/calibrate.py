"""Measures the device at hand for the planner, with this library's programs.

    python -m dex_jax.evaluation.planner.calibrate --model smollm2-135m --output cpu.json

Random weights of the model's shapes, as many layers as no cache of a processor holds, decode rows in the layouts that
there are. What is written are seconds per byte by rows (products of a layer, attention, heads), the fixed cost of a
layer and of a tick, and plain bandwidth and arithmetic. Nothing else should run meanwhile. With several devices the
link between them is measured too. --together N starts N processes that measure at the same time, each on its share of
the cores, as N processes of a mesh would run: cores that share memory are slower together than alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dex_jax.config import ModelConfig
from dex_jax.decoding.methods import even_depths
from dex_jax.errors import DexError, exit_code
from dex_jax.evaluation.planner.cost_model import KERNELS_A_LAYER
from dex_jax.evaluation.planner.footprint import device_memory
from dex_jax.evaluation.planner.hardware import LINKS, Curve, Device, Hardware, Measured, read_hardware, write_hardware
from dex_jax.evaluation.planner.timed_programs import (
    Timer,
    bandwidth,
    exits_seconds,
    flops,
    head_seconds,
    lattice_seconds,
    link,
    rows_seconds,
    stages_seconds,
)
from dex_jax.evaluation.planner.workload import config_of, work_of
from dex_jax.language_model import DTYPES, resolve_dtype
from dex_jax.nn.transformer import Layout, Stacked, Unrolled
from dex_jax.sharding import device_name

ROWS = (1, 2, 4, 8, 16, 32)
STAGES = 5
"""Of the stacked layout that is measured, and of the lattice."""

UNCACHED = 400e6
"""Bytes of layers that are measured together: more than a processor's caches hold (300 MB on some servers)."""

PATIENCE = 600.0
"""Seconds that processes wait for one another."""

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


def calibrate(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    rows: Sequence[int] = ROWS,
    long: int = LONG,
    memory: float | None = None,
    timer: Timer | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Hardware:
    """Measures the default device.

    Args:
      config: shapes to measure with: those of the model to plan for.
      dtype: of weights and caches.
      rows: ascending row counts to measure.
      long: the longer of two cache lengths.
      memory: bytes of the device; None asks it.
      timer: how long; None for the usual.
      notify: told what is going on.

    Raises:
      DexError: a device that does not say how much memory it has.
    """
    device = jax.devices()[0]
    memory = device_memory(device) if memory is None else memory
    if memory is None:
        raise DexError(f"{device_name(device)} does not say how much memory it has: give --memory GB")
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
        measure = stages_seconds if name == "stacked" else rows_seconds
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
    head = tuple((n, head_seconds(config, dtype, n, timer) / unembed) for n in rows)
    columns = min(DRAFT, config.vocab_size)
    asked = tuple((n, exits_seconds(config, dtype, columns, n, timer) / (size * columns * work.width)) for n in rows)
    notify("5 of 5: a tick alone, bandwidth, arithmetic")
    measured = Measured(layer, attention, head, asked, fixed, lattice_seconds(stages, timer))
    between = link(timer) if jax.device_count() > 1 else LINKS["loopback"]
    found = Device(
        name=device_name(device),
        flops=flops(dtype, timer),
        bandwidth=bandwidth(round(UNCACHED), timer),
        memory=float(memory),
        kernel_seconds=fixed["unrolled"] / KERNELS_A_LAYER,
        itemsize=size,
        reached_bandwidth=1.0,
        reached_flops=1.0,
        measured=measured,
    )
    return Hardware(found, jax.device_count(), 1, between, between)


class Meeting:
    """Processes that wait for one another before each measurement: none may compile while another measures.

    Args:
      folder: that all of them see.
      number: of this one, from 0.
      count: how many there are.
    """

    def __init__(self, folder: str, number: int, count: int):
        self.folder, self.number, self.count = Path(folder), number, count
        self.times = 0

    def __call__(self) -> None:
        """Returns when all have come as often.

        Raises:
          DexError: one of them does not come any more.
        """
        self.times += 1
        (self.folder / f"{self.times}.{self.number}").touch()
        begin = time.monotonic()
        while not all((self.folder / f"{self.times}.{other}").exists() for other in range(self.count)):
            if time.monotonic() - begin > PATIENCE:
                raise DexError("another of the processes has stopped: measure without --together to see why")
            time.sleep(0.001)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    p = argparse.ArgumentParser(
        prog="python -m dex_jax.evaluation.planner.calibrate", description=__doc__.splitlines()[0]
    )
    p.add_argument("--model", default="smollm2-135m", help="whose shapes are measured (%(default)s)")
    p.add_argument("--dtype", choices=list(DTYPES), help="float32 on CPUs, bfloat16 on GPUs and TPUs unless given")
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="R", help="row counts (%(default)s)")
    p.add_argument("--long", type=int, default=LONG, metavar="S", help="longer cache that is measured (%(default)s)")
    p.add_argument("--memory", type=float, metavar="GB", help="of the device, which is asked unless it is given")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements of each figure (%(default)s)")
    p.add_argument("--least", type=float, default=0.05, metavar="SECONDS", help="of each measurement (%(default)s)")
    p.add_argument("--together", type=int, default=1, metavar="N", help="processes that measure at once (%(default)s)")
    p.add_argument("--meet", nargs=3, help=argparse.SUPPRESS)
    p.add_argument("--output", required=True, metavar="FILE.json", help="for plan --hardware")
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    return exit_code(lambda: _run(args, argv), "Stopped; nothing is written.")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    if args.together > 1:
        return _together(argv, args.together, args.output)
    rows = sorted(set(args.rows))
    if rows[0] < 1 or rows[-1] > SHORT or args.repeats < 1 or args.least <= 0 or args.long <= SHORT:
        raise DexError(f"--rows must be 1 to {SHORT}, --repeats at least 1, --least above 0, --long above {SHORT}")
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise DexError(f"--memory must be above 0, not {args.memory:g}")
    timer = Timer(args.repeats, args.least)
    if args.meet:
        timer = timer._replace(meet=Meeting(args.meet[0], int(args.meet[1]), int(args.meet[2])))
    found = calibrate(
        config_of(args.model),
        resolve_dtype(args.dtype),
        rows=rows,
        long=args.long,
        memory=None if args.memory is None else args.memory * 1e9,
        timer=timer,
        notify=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_hardware(args.output, found)
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
            command = [
                sys.executable,
                "-m",
                "dex_jax.evaluation.planner.calibrate",
                *argv,
                "--together",
                "1",
                "--output",
                file,
            ]
            command += ["--meet", folder, str(i), str(count)]
            # Children inherit the affinity of the moment they are started in.
            os.sched_setaffinity(0, share)
            quiet: dict[str, Any] = {} if i == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, **quiet))
        os.sched_setaffinity(0, set(cores))
        ended = [process.wait() for process in started]  # all of them, before their folder goes
        if any(ended):
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
