"""What the compiler says of a tick and its rivals on TPU chips that need not be there.

libtpu compiles from abstract shapes. Each program is the decode loop itself; the compiler's analysis counts the body of
a loop once, so what it says of the loop is what it says of one tick or step. FLOPs and bytes are those of one chip, as
the compiler counts them, collectives those that stand in the optimised program. The analysis also gives a time, which
is not shown: it came out negative for some programs.

Letters: B sequences, W rows a stage, K stages.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dex_jax.config import ModelConfig
from dex_jax.decoding.footprint import session_shapes
from dex_jax.decoding.methods import AR, Dex, Schedule
from dex_jax.decoding.session import RUN
from dex_jax.decoding.spec import Spec
from dex_jax.errors import DexError
from dex_jax.evaluation.planner.cost_model import Setting, ar_step, bytes_per_device, pipelined_step, tick
from dex_jax.evaluation.planner.workload import exit_work, work_of
from dex_jax.hardware import DEVICES, hardware
from dex_jax.nn.transformer import Staged
from dex_jax.sharding import make_mesh

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "partition-id"}
"""Instructions that run nothing of their own."""

ENVIRONMENT = {
    # Without these libtpu looks for a metadata server and complains that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Several processes may compile at the same time, as none has a chip.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
ACCELERATOR_TYPES = {"v5e": "v5litepod-{}", "v5p": "v5p-{}", "v6e": "v6e-{}"}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One compiled program, on one of its chips.

    Attributes:
      program: for people.
      chip, chips: kind and number.
      argument_bytes, temporary_bytes: weights, caches and state; what the program needs beside.
      fits: whether both together fit into the chip's memory.
      flops, bytes_accessed: of one tick or step, as the compiler counts them.
      kernels: instructions of the program that run on the chip, those of all branches of a conditional; None where the
        compiler's program cannot be printed, and collectives are counted as this library has written them.
      collectives: kind -> (how many in one tick or step, bytes of their results together).
      predicted_seconds, predicted_bytes: the roofline's step, and its weights and caches.
    """

    program: str
    chip: str
    chips: int
    argument_bytes: int
    temporary_bytes: int
    fits: bool
    flops: float
    bytes_accessed: float
    kernels: int | None
    collectives: dict[str, tuple[int, int]]
    predicted_seconds: float
    predicted_bytes: float


def compiled_evidence(
    config: ModelConfig,
    topology: str,
    *,
    explorers: int,
    rows: int | None = None,
    batch: int = 1,
    context: int = 1024,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Evidence]:
    """Compiles a tick, an AR step from stage to stage and a tensor-parallel AR step, in bfloat16, greedy.

    Args:
      config: shapes of the model; its own head is every exit.
      topology: chip and arrangement, as "v5e:2x4".
      explorers: K.
      rows: W; None for the default.
      batch: B.
      context: length of the caches.
      notify: told what is going on.

    Raises:
      DexError: an unknown chip or arrangement, no libtpu, or fewer chips than stages.
    """
    chip, devices = topology_devices(topology)
    if explorers > len(devices):
        raise DexError(f"{topology} has {len(devices)} chips, too few for {explorers} stages: name a larger one")
    schedule = Dex(explorers=explorers, rows=rows).schedule_for(config.num_layers)
    tensor = _tensor_axis(config, explorers)
    plain = AR().schedule_for(config.num_layers)
    programs = [
        (f"a tick of DEX-1/{explorers}, {schedule.rows} rows", schedule, {"stage": explorers}),
        (f"an AR step through {explorers} stages", plain, {"stage": explorers}),
        (f"an AR step, every layer split over {tensor}", plain, {"tensor": tensor}),
    ]
    predicted = rooflines(config, chip, explorers, rows=rows, batch=batch, context=context)
    found = []
    for (name, method, mesh), (seconds, size) in zip(programs, predicted, strict=True):
        notify(f"compiling {name} for {chip}")
        chips = math.prod(mesh.values())
        lowered = _lower(config, method, schedule.depths, mesh, devices[:chips], batch, context)
        found.append(_evidence(name, chip, chips, lowered, seconds, size))
    return found


def rooflines(
    config: ModelConfig, chip: str, explorers: int, *, rows: int | None = None, batch: int = 1, context: int = 1024
) -> list[tuple[float, float]]:
    """(seconds, bytes of the fullest chip) of the three programs by the cost model; arguments as of the evidence."""
    schedule = Dex(explorers=explorers, rows=rows).schedule_for(config.num_layers)
    s = Setting(work_of(config), exit_work(None, config), hardware(f"{chip}x{explorers}"), batch, context)
    tensor = _tensor_axis(config, explorers)
    return [
        (
            tick(s, schedule.depths, schedule.rows, explorers).total,
            bytes_per_device(s, explorers, rows=schedule.rows, depths=schedule.depths),
        ),
        (pipelined_step(s, explorers).total, bytes_per_device(s, explorers)),
        (ar_step(s, tensor).total, bytes_per_device(s, 1, tensor)),
    ]


def _tensor_axis(config: ModelConfig, most: int) -> int:
    """The largest tensor axis up to `most` that can split the model."""
    work = work_of(config)
    return max(t for t in range(1, most + 1) if work.divisible(t) and config.mlp_width % t == 0)


def topology_devices(topology: str) -> tuple[str, list[Any]]:
    """(chip, devices of the topology).

    Raises:
      DexError: an unknown chip or arrangement, or no libtpu.
    """
    chip, _, arrangement = topology.partition(":")
    if chip not in ACCELERATOR_TYPES or not re.fullmatch(r"\d+(x\d+)*", arrangement):
        raise DexError(
            f"{topology!r} is no TPU topology: write {', '.join(ACCELERATOR_TYPES)} and an arrangement, such as v5e:2x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise DexError("compiling for TPUs needs libtpu: pip install libtpu (no TPU is needed)")
    from jax.experimental import topologies

    count = math.prod(map(int, arrangement.split("x")))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", ACCELERATOR_TYPES[chip].format(count * (2 if chip == "v5p" else 1)))
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    # Of what libtpu raises nothing is documented.
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise DexError(f"libtpu does not know the topology {topology!r} ({why}): choose another arrangement") from error
    return chip, list(description.devices)


def _lower(
    config: ModelConfig,
    schedule: Schedule,
    depths: tuple[int, ...],
    mesh: dict[str, int],
    devices: Sequence[Any],
    batch: int,
    context: int,
) -> Any:
    """The decode loop of one method on a mesh, lowered from shapes."""
    grid = make_mesh(mesh, devices)
    layout = Staged(depths if mesh.get("stage", 1) > 1 else (config.num_layers,))
    shapes = session_shapes(config, jnp.dtype(jnp.bfloat16), schedule, layout, batch, context, capacity=64, mesh=grid)
    return RUN.jitted.lower(*shapes.of_run, spec=Spec(config, layout, schedule, mesh=grid))


def _evidence(name: str, chip: str, chips: int, lowered: Any, seconds: float, size: float) -> Evidence:
    compiled = lowered.compile()
    try:
        hlo = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        # Some programs of a newer libtpu hold instructions that jaxlib cannot print.
        hlo = None
    collectives = collectives_as_written(lowered.as_text()) if hlo is None else collectives_of(hlo)
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    arguments, temporary = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes)
    return Evidence(
        program=name,
        chip=chip,
        chips=chips,
        argument_bytes=arguments,
        temporary_bytes=temporary,
        fits=arguments + temporary <= DEVICES[chip][0].memory,
        flops=float(analysis.get("flops", 0.0)),
        bytes_accessed=float(analysis.get("bytes accessed", 0.0)),
        kernels=None if hlo is None else kernels_of(hlo),
        collectives=collectives,
        predicted_seconds=seconds,
        predicted_bytes=size,
    )


def collectives_of(hlo: str) -> dict[str, tuple[int, int]]:
    """Kind -> (how many, bytes of their results) of the collectives in an optimised HLO program.

    Of an asynchronous pair the start counts; the tuple that it gives holds operands and results, of which the results
    are the second half.
    """
    found: dict[str, tuple[int, int]] = {}
    for line in hlo.splitlines():
        match = re.match(rf"\s+(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if match is None:
            continue
        shapes, kind, start = match.groups()
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) * ITEM_BYTES.get(item, 8) for item, dims in arrays]
        if start and kind != "all-reduce":
            # A permute's start also carries two numbers of its own, which come last.
            arrays_only = [size for size, (_, dims) in zip(sizes, arrays, strict=True) if dims] or sizes
            sizes = arrays_only[len(arrays_only) // 2 :]
        count, size = found.get(kind, (0, 0))
        found[kind] = (count + 1, size + sum(sizes))
    return found


def collectives_as_written(stablehlo: str) -> dict[str, tuple[int, int]]:
    """The same of a lowered program, before the compiler has merged or split anything; functions as often as called."""
    bodies: dict[str, str] = {}
    for part in stablehlo.split("func.func ")[1:]:
        name = re.match(r"(?:public |private )?@([\w.$\-]+)", part)
        assert name is not None
        bodies[name.group(1)] = part

    def count(name: str) -> dict[str, tuple[int, int]]:
        body = bodies[name]
        found: dict[str, tuple[int, int]] = {}
        for kind in COLLECTIVES:
            written = f'"stablehlo.{kind.replace("-", "_")}"'
            for match in re.finditer(re.escape(written), body):
                # The first signature after the operation is its own: what its region holds has none.
                result = re.search(r": \((?:tensor<[^)]*)\) -> (.*)", body[match.end() :])
                assert result is not None
                arrays = re.findall(r"tensor<((?:\d+x)*)(\w+)>", result.group(1))
                size = sum(
                    math.prod(map(int, filter(None, dims.split("x")))) * ITEM_BYTES.get(_hlo_name(item), 8)
                    for dims, item in arrays
                )
                before = found.get(kind, (0, 0))
                found[kind] = (before[0] + 1, before[1] + size)
        for callee in re.findall(r"\bcall @([\w.$\-]+)\(", body):
            for kind, (times, size) in called(callee).items():
                before = found.get(kind, (0, 0))
                found[kind] = (before[0] + times, before[1] + size)
        return found

    called = functools.cache(count)
    return called("main")


def _hlo_name(item: str) -> str:
    """The name in HLO of an element type in StableHLO, as "s32" for "i32"."""
    return "pred" if item == "i1" else re.sub(r"^u?i", lambda match: "u" if match.group() == "ui" else "s", item)


def kernels_of(hlo: str) -> int:
    """Instructions of an optimised HLO program that run: those of fusions and of reducers are part of another one."""
    count, inside = 0, False
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?(\S+) \(.*\) -> .* \{\s*$", line)
        if header is not None:
            inside = (
                not re.match(r"(fused|region|add|max|min|and|or|compare|sum)", header.group(1)) or " while(" in line
            )
            inside = inside or line.startswith("ENTRY")
            continue
        operation = re.match(r"\s+(?:ROOT )?%?\S+ = .*? ([\w\-]+)\(", line)
        if inside and operation is not None and operation.group(1) not in FREE and "-done" not in operation.group(1):
            count += 1
    return count


def evidence_rows(evidence: Sequence[Evidence]) -> list[list[str]]:
    """Cells of one line a program."""
    return [
        [
            each.program,
            f"{each.chips} {each.chip}",
            f"{each.argument_bytes / 1e9:.2f}",
            f"{each.temporary_bytes / 1e9:.3f}",
            "yes" if each.fits else "no",
            f"{each.flops / 1e9:.1f}",
            f"{each.bytes_accessed / 1e9:.2f}",
            "-" if each.kernels is None else str(each.kernels),
            f"{each.predicted_seconds * 1e3:.2f}",
            "; ".join(f"{n} {kind}, {size:,} bytes" for kind, (n, size) in each.collectives.items()) or "none",
        ]
        for each in evidence
    ]
