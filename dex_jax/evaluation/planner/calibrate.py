"""Measures the device at hand for the planner, with this library's programs.

Random weights of the model's shapes, as many layers as no cache of a processor holds, decode rows. What comes out are
seconds per byte by rows (products of a layer, attention, heads), the fixed cost of a layer and of a tick, and plain
bandwidth and arithmetic; with several devices the link between them too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dex_jax.config import ModelConfig
from dex_jax.decoding.dex.trees import LOOKUP_TREE
from dex_jax.decoding.footprint import device_memory
from dex_jax.errors import DexError
from dex_jax.evaluation.planner.cost_model import KERNELS_A_LAYER
from dex_jax.evaluation.planner.timed_programs import (
    Timer,
    bandwidth,
    exits_seconds,
    flops,
    head_seconds,
    lattice_seconds,
    link,
    rows_seconds,
)
from dex_jax.evaluation.planner.workload import DRAFT, work_of
from dex_jax.hardware import LINKS, Device, Hardware, Measured
from dex_jax.sharding import device_name

STAGES = 5
"""Of the lattice that is measured."""

UNCACHED = 400e6
"""Bytes of layers that are measured together: more than a processor's caches hold (300 MB on some servers)."""

SHORT = 64
"""The shorter of two cache lengths, whose difference is what attention costs."""


def calibrate(
    config: ModelConfig,
    dtype: jnp.dtype,
    *,
    rows: Sequence[int],
    long: int,
    memory: float | None,
    timer: Timer,
    notify: Callable[[str], None],
) -> Hardware:
    """Measures the default device for a model in `dtype`, with `rows`, ascending, and caches up to `long` positions.

    `memory` is the device's, in bytes; None asks it, and a DexError says that it does not tell.
    """
    device = jax.devices()[0]
    memory = device_memory(device) if memory is None else memory
    if memory is None:
        raise DexError(f"{device_name(device)} does not say how much memory it has: give --memory GB")
    work, size = work_of(config), jnp.dtype(dtype).itemsize
    count = min(config.num_layers, max(2, round(UNCACHED / (work.layer * size))))
    part = config.with_layers(count)
    # A model whose layers cost nothing but their kernels.
    small = dataclasses.replace(part, width=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32, vocab_size=64)
    notify("1 of 3: layers")
    fixed = rows_seconds(small, dtype, 1, SHORT, timer) / count
    full = {n: rows_seconds(part, dtype, n, SHORT, timer) / count for n in rows}
    layer = tuple((n, max(0.0, seconds - fixed) / (size * work.layer)) for n, seconds in full.items())
    cached = size * work.cached * (long - SHORT)
    ends = sorted({rows[0], rows[min(3, len(rows) - 1)]})
    attention = tuple((n, max(0.0, rows_seconds(part, dtype, n, long, timer) / count - full[n]) / cached) for n in ends)
    notify("2 of 3: heads")
    unembed = size * work.vocabulary * work.width
    head = tuple((n, head_seconds(config, dtype, n, timer) / unembed) for n in rows)
    columns = min(DRAFT, config.vocab_size)
    asked = tuple((n, exits_seconds(config, dtype, columns, n, timer) / (size * columns * work.width)) for n in rows)
    notify("3 of 3: a tick alone, bandwidth, arithmetic")
    stages = min(STAGES, config.num_layers)
    tick, drafting = (lattice_seconds(stages, timer, drafts) for drafts in (None, LOOKUP_TREE))
    more = max(0.0, drafting - tick)
    measured = Measured({"unrolled": layer}, attention, head, asked, {"unrolled": fixed}, tick, more)
    between = link(timer) if jax.device_count() > 1 else LINKS["loopback"]
    found = Device(
        name=device_name(device),
        flops=flops(dtype, timer),
        bandwidth=bandwidth(round(UNCACHED), timer),
        memory=float(memory),
        kernel_seconds=fixed / KERNELS_A_LAYER,
        itemsize=size,
        reached_bandwidth=1.0,
        reached_flops=1.0,
        measured=measured,
    )
    return Hardware(found, jax.device_count(), 1, between, between)


def summary(found: Hardware) -> str:
    """What was measured, for people."""
    device, measured = found.device, found.device.measured
    assert measured is not None
    lines = [
        f"{device.name}: {device.bandwidth / 1e9:.1f} GB/s, {device.flops / 1e9:.0f} Gflop/s, "
        f"{device.kernel_seconds * 1e6:.2f} us a kernel, {measured.tick_seconds * 1e6:.0f} us a tick alone, "
        f"{measured.drafts_seconds * 1e6:.0f} more with drafts"
    ]
    curves = {"layer": measured.layer["unrolled"], "head": measured.head, "exits": measured.exits}
    for name, curve in (curves | {"attention": measured.cache}).items():
        rates = ", ".join(
            f"{1e-9 / seconds:.1f} at {rows:g}" if seconds else f"- at {rows:g}" for rows, seconds in curve
        )
        lines.append(f"{name}: GB/s by rows {rates}")
    return "\n".join(lines)
