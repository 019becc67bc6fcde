"""The decoding programs compile for a TPU, on a machine that has none: libtpu compiles from abstract shapes.

Run with `pytest -m tpu` where libtpu is installed. What is asserted is read off the compiled program: weights are
arguments, donated caches are reused, no cache is copied in the loop, float32 means float32.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from reference.small_models import LLAMA

from dex_jax.config import ModelConfig
from dex_jax.decoding.dex.drafts import TreeShape
from dex_jax.decoding.footprint import nbytes, session_shapes
from dex_jax.decoding.methods import AR, Dex, Schedule
from dex_jax.decoding.session import PREFILL, RUN, START, Spec
from dex_jax.io import open_checkpoint
from dex_jax.nn.transformer import Layout, Stacked, Staged, Unrolled
from dex_jax.sharding import make_mesh

pytestmark = pytest.mark.tpu

# An uneven grid, so that the stacked layout has a padded layer. The caches are much larger than a v5e's 128 MiB of
# on-chip memory, into which the compiler would otherwise move them whole.
SMALL = dataclasses.replace(
    LLAMA, vocab_size=1024, width=256, head_dim=128, mlp_width=512, context=32768, eos_ids=(2, 7)
)
DEX = Dex(explorers=3, draft=False).schedule_for(SMALL.num_layers)
LAYOUTS = {"unrolled": Unrolled(), "stacked": Stacked(DEX.depths)}
TREE = TreeShape((2, 2, 1), drafted=0, lookup=(0.5,) * 8, rungs=((1, 1.0), (6, 1.5)))
ONE = Dex(explorers=1, draft=TREE).schedule_for(SMALL.num_layers)
METHODS = {"ar": AR().schedule_for(SMALL.num_layers), "dex": DEX, "one": ONE}
BATCH, CACHE_LENGTH, PROMPT, CAPACITY = 4, 16384, 64, 64
ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, compiled: what went in, StableHLO, optimised HLO and the compiler's memory figures."""

    shapes: tuple
    stablehlo: str
    hlo: str
    memory: object


@pytest.fixture(scope="module")
def topology():
    """A v5e slice of four chips that need not be there."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        # Without these libtpu looks for a metadata server and complains that there is none.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        # Workers compile side by side.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


@pytest.fixture(scope="module")
def tpu(topology):
    """A sharding on one of its chips."""
    return SingleDeviceSharding(topology.devices[0])


def compile_program(
    tpu,
    name: str,
    schedule: Schedule,
    layout: Layout,
    dtype: str,
    *,
    sampled: bool = False,
    config: ModelConfig = SMALL,
    batch: int = BATCH,
    cache_length: int = CACHE_LENGTH,
) -> Compiled:
    """Compiles "run", "start" or "prefill" for the TPU from shapes alone."""
    shapes = session_shapes(
        config, jnp.dtype(dtype), schedule, layout, batch, cache_length, capacity=CAPACITY, sampled=sampled
    )
    program, args = {
        "run": (RUN, shapes.of_run),
        "start": (START, shapes.of_start),
        "prefill": (PREFILL, shapes.of_prefill(PROMPT)),
    }[name]
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=tpu), args)
    static = {"spec": Spec(config, layout, schedule)} | ({"capacity": CAPACITY} if name == "start" else {})
    lowered = program.jitted.lower(*placed, **static)
    compiled = lowered.compile()
    return Compiled((shapes, args), lowered.as_text(), compiled.as_text(), compiled.memory_analysis())


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """(name -> instruction lines of every computation, name of the entry)."""
    found: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{\s*$", line)
        if header:
            current = header.group(2)
            found[current] = []
            entry = current if header.group(1) else entry
        elif line.startswith(" ") and current:
            found[current].append(line)
    return found, entry


def callees(line: str) -> list[str]:
    """Computations that an instruction runs; those of a fusion are part of it and left out."""
    if " fusion(" in line:
        return []
    names = re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)", line)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in group.split(",")]
    return names


def copies_in_loop(hlo: str, at_least: int) -> list[str]:
    """Instructions under the program's loops that copy or transpose `at_least` bytes within the main memory."""
    found, entry = computations(hlo)
    todo = [body for line in found[entry] if " while(" in line for body in re.findall(r"body=%?([\w.\-]+)", line)]
    assert todo, "the program has no loop"
    seen: set[str] = set()
    offenders = []
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in found[name]:
            todo += callees(line)
            head = re.match(r"\s+(?:ROOT )?%?\S+ = (\w+)\[([\d,]*)\](\S*) ([\w\-]+)\(", line)
            if not head:
                continue
            kind, dims, layout, operation = head.groups()
            if operation == "fusion":
                (fused,) = re.findall(r"calls=%?([\w.\-]+)", line)
                root = next(inner for inner in found[fused] if "ROOT" in inner)
                operation = re.match(r"\s+ROOT %?\S+ = .*? ([\w\-]+)\(", root).group(1)
            size = math.prod(map(int, filter(None, dims.split(",")))) * ITEM_BYTES.get(kind, 8)
            # S(1) is on-chip memory: what is brought there is about to be read.
            if operation in ("copy", "transpose") and size >= at_least and "S(1)" not in layout:
                offenders.append(line.strip()[:200])
    return offenders


def assert_sound(compiled: Compiled, temporaries: float = 0.1) -> None:
    """What every program must show; `temporaries` stay below that share of weights and caches."""
    shapes, args = compiled.shapes
    weights, caches = nbytes(shapes.weights), nbytes(shapes.memory)
    # An array that had become a constant would be missing here.
    assert compiled.memory.argument_size_in_bytes >= nbytes(args[0]) + nbytes(args[1])
    assert compiled.memory.alias_size_in_bytes >= caches
    assert compiled.memory.temp_size_in_bytes < temporaries * (weights + caches)
    constants = [
        math.prod(map(int, filter(None, dims.split(","))))
        for dims in re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", compiled.hlo)
    ]
    assert max(constants, default=0) <= 1024
    assert "f64" not in compiled.hlo
    # The CPU's orientation of a product, [out, in] @ [in, rows], must not have been chosen.
    plain = [line for line in compiled.stablehlo.splitlines() if "dot_general" in line and "batching" not in line]
    assert plain
    assert all("contracting_dims = [1] x [1]" in line for line in plain)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("method", list(METHODS))
def test_loop_in_bfloat16(tpu, method, layout, sampled) -> None:
    compiled = compile_program(tpu, "run", METHODS[method], LAYOUTS[layout], "bfloat16", sampled=sampled)
    assert_sound(compiled)
    shapes, _ = compiled.shapes
    one_layer = nbytes(shapes.memory.keys) // SMALL.num_layers
    assert copies_in_loop(compiled.hlo, one_layer // 2) == []
    # Those of the loop itself: a stage's rows, the final head's, the exits'. None chooses a platform.
    allowed = {"ar": 0, "dex": DEX.stages + 2, "one": 2}[method]
    # Two filters wherever a token is chosen: for each row count that the final layer and the exits are compiled for.
    chosen = {"ar": 1, "dex": 1 + 4, "one": 2}[method]
    assert compiled.hlo.count(" conditional(") <= allowed + 2 * chosen * sampled


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("method", list(METHODS))
def test_prefill_and_start_in_bfloat16(tpu, method, layout) -> None:
    compiled = compile_program(tpu, "prefill", METHODS["ar"], LAYOUTS[layout], "bfloat16")
    assert_sound(compiled)
    assert compiled.hlo.count(" conditional(") == 0
    started = compile_program(tpu, "start", METHODS[method], LAYOUTS[layout], "bfloat16", sampled=True)
    assert started.memory.alias_size_in_bytes >= nbytes(started.shapes[0].memory)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("name", "method"), [("run", "ar"), ("run", "dex"), ("run", "one"), ("prefill", "ar")])
def test_float32_runs_at_the_highest_precision(tpu, name, method, layout) -> None:
    compiled = compile_program(tpu, name, METHODS[method], LAYOUTS[layout], "float32", cache_length=2048)
    products = re.findall(r" (?:convolution|dot)\(.*", compiled.hlo)
    assert products
    assert [line[:200] for line in products if "operand_precision={highest,highest}" not in line] == []
    lowered = re.findall(r"dot_general.*", compiled.stablehlo)
    assert lowered
    assert [line[:200] for line in lowered if "precision = [HIGHEST, HIGHEST]" not in line] == []


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_smollm2_depth_exploration_compiles(tpu, layout) -> None:
    config = open_checkpoint("smollm2-135m").config
    schedule = Dex(explorers=5, draft=False).schedule_for(config.num_layers)
    chosen = Unrolled() if layout == "unrolled" else Stacked(schedule.depths)
    compiled = compile_program(tpu, "run", schedule, chosen, "bfloat16", config=config, batch=1, cache_length=2048)
    # Widths that are no multiple of 128 (576, 960) make libtpu before 0.0.52 lay weights out anew once a call; in the
    # loop no weight is moved.
    assert_sound(compiled, temporaries=1.0)
    assert copies_in_loop(compiled.hlo, nbytes(compiled.shapes[0].weights) // 200) == []


@pytest.mark.parametrize(("wanted", "method"), [("stage=4", "dex"), ("stage=2,tensor=2", "dex"), ("stage=4", "ar")])
def test_stages_on_four_chips(topology, wanted, method) -> None:
    """A tick reads one stage on each chip, sends one cohort to the next and gathers proposals once."""
    mesh = make_mesh(wanted, topology.devices)
    stages, pieces = mesh.shape["stage"], mesh.shape["tensor"]
    grid = Dex(explorers=stages, draft=False).schedule_for(SMALL.num_layers)
    schedule, layout = grid if method == "dex" else METHODS["ar"], Staged(grid.depths)
    dtype = jnp.dtype(jnp.bfloat16)
    shapes = session_shapes(SMALL, dtype, schedule, layout, BATCH, CACHE_LENGTH, capacity=CAPACITY, mesh=mesh)
    spec = Spec(SMALL, layout, schedule, mesh=mesh)
    args = shapes.of_run
    compiled = RUN.jitted.lower(*args, spec=spec).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()

    one_layer = nbytes(shapes.memory.keys[0])
    assert copies_in_loop(hlo, one_layer // 2) == []
    assert memory.argument_size_in_bytes >= nbytes(args)
    assert memory.alias_size_in_bytes >= nbytes(shapes.memory)
    assert memory.temp_size_in_bytes < 0.1 * nbytes((shapes.weights, shapes.memory))
    permutes, gathers, sums = (
        len(re.findall(rf" {name}(?:-start)?\(", hlo)) for name in ("collective-permute", "all-gather", "all-reduce")
    )
    assert permutes == (1 if method == "dex" else stages - 1)
    if pieces == 1:
        assert (gathers, sums) == ((1, 0) if method == "dex" else (0, 1))
    assert " all-to-all(" not in hlo
