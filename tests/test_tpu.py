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
from flax import nnx
from reference.small_models import LLAMA

from dex_jax.config import EagleConfig, ModelConfig
from dex_jax.decoding.dex.interface import ExitZero
from dex_jax.decoding.dex.own_layers import EagleDrafter, ModelDrafter, OwnArrays
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.dex.trained_exits import Heads
from dex_jax.decoding.footprint import session_shapes
from dex_jax.decoding.methods import AR, Dex, Schedule
from dex_jax.decoding.session import RUN
from dex_jax.decoding.spec import Spec
from dex_jax.evaluation.compiled import Program, read
from dex_jax.evaluation.targets import lower, target
from dex_jax.io.opening import open_checkpoint
from dex_jax.nn.eagle import Eagle
from dex_jax.nn.packed import INT8
from dex_jax.nn.planes import PLANES
from dex_jax.nn.transformer import Staged, Unrolled, parameter_shapes
from dex_jax.nn.weights import Packing, abstract_weights, packed_alike
from dex_jax.planner import SHAPES
from dex_jax.sharding import make_mesh, nbytes

pytestmark = pytest.mark.tpu

# The caches are much larger than a v5e's 128 MiB of on-chip memory, into which the compiler would otherwise move them
# whole.
SMALL = dataclasses.replace(
    LLAMA, vocab_size=1024, width=256, head_dim=128, mlp_width=512, context=32768, eos_ids=(2, 7)
)
DEX = Dex(explorers=3, draft=False).schedule_for(SMALL.num_layers)
TREE = TreeShape((2, 2, 1), drafted=0, lookup=(0.5,) * 8, rungs=((1, 1.0), (6, 1.5)))
EIGHT = TreeShape((2, 2, 1, 1, 1), drafted=0, lookup=(0.5,) * 8)
ONE = Dex(explorers=1, draft=TREE).schedule_for(SMALL.num_layers)
AT_ONCE = Dex(explorers=1, draft=EIGHT)
METHODS = {
    "ar": AR().schedule_for(SMALL.num_layers),
    "dex": DEX,
    "one": ONE,
    "one of eight rows": AT_ONCE.schedule_for(SMALL.num_layers),
}
BATCH, CACHE_LENGTH, PROMPT, CAPACITY = 4, 16384, 64, 64
# Two layers as wide as a real model's: a dense copy of any kernel would stand out among the temporaries.
WIDE = dataclasses.replace(SHAPES["llama-3-8b"], num_layers=2)
CHIP = 16e9


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, compiled: what went in, StableHLO, optimised HLO and the compiler's memory figures."""

    shapes: tuple
    stablehlo: str
    hlo: str
    memory: object

    @property
    def program(self) -> Program:
        return read(self.hlo)


@pytest.fixture(scope="module")
def topology():
    """A v5e slice of four chips that need not be there."""
    pytest.importorskip("libtpu")
    with target("v5e") as devices:
        yield devices


@pytest.fixture(scope="module")
def tpu(topology):
    """One of its chips."""
    return topology[0]


def compile_program(
    tpu,
    name: str,
    schedule: Schedule,
    dtype: str,
    *,
    sampled: bool = False,
    config: ModelConfig = SMALL,
    batch: int = BATCH,
    cache_length: int = CACHE_LENGTH,
    packing: Packing = (),
    drafter: ExitZero | None = None,
    heads: Heads | None = None,
) -> Compiled:
    """Compiles "run", "start" or "prefill" for the TPU from shapes alone."""
    about = (config, jnp.dtype(dtype), schedule, Unrolled(), batch, cache_length)
    drafts = {"drafter": drafter, "heads": heads}
    shapes = session_shapes(*about, capacity=CAPACITY, sampled=sampled, packing=packing, **drafts)
    lowered = lower(name, shapes, Spec(config, Unrolled(), schedule, drafter=drafter), tpu, PROMPT, CAPACITY)
    compiled = lowered.compile()
    args = {"run": shapes.of_run, "start": shapes.of_start, "prefill": shapes.of_prefill(PROMPT)}[name]
    return Compiled((shapes, args), lowered.as_text(), compiled.as_text(), compiled.memory_analysis())


def copies_in_loop(program: Program, at_least: int) -> list[str]:
    """Instructions under the program's loops that copy or transpose `at_least` bytes within the main memory.

    What is brought into on-chip memory is about to be read.
    """
    assert program.loops
    inside = program.within(*program.loops)
    moves = (each for each in inside if program.operation_of(each) in ("copy", "transpose"))
    return [each.line[:200] for each in moves if each.nbytes >= at_least]


def planned_bytes(config: ModelConfig) -> int:
    """Weights in int8 and the caches of one sequence of 2048 positions."""
    about = (config, jnp.dtype(jnp.bfloat16), AR().schedule_for(config.num_layers), Unrolled(), 1, 2048)
    shapes = session_shapes(*about, capacity=CAPACITY, packing=packed_alike(config, INT8))
    return nbytes((shapes.weights, shapes.memory))


def kernels_made(program: Program, at_least: int) -> list[str]:
    """Instructions that make an array of `at_least` numbers: floating ones anywhere, of int8 in the main memory."""
    offenders = []
    for each in program.within(program.entry):
        # What starts a copy hands on its operand too.
        moves = each.operation in ("copy-start", "slice-start")
        for array in each.results if each.works and each.operation != "while" else ():
            made = array.kind in ("bf16", "f32") or (array.kind == "s8" and not (moves or array.on_chip))
            if made and array.size >= at_least:
                offenders.append(each.line[:200])
    return offenders


def read_in_int8(program: Program) -> set[tuple[int, ...]]:
    """Shapes of the int8 matrices that fusions read."""
    fused = [
        program.computations[each.calls[0]] for each in program.within(program.entry) if each.operation == "fusion"
    ]
    parameters = (each for inside in fused for each in inside.values() if each.operation == "parameter")
    return {array.dims for each in parameters for array in each.results if array.kind == "s8" and len(array.dims) == 2}


def assert_read_in_int8(compiled: Compiled, config: ModelConfig) -> None:
    """Every kernel is read in int8, and nothing as large as the smallest is made of one."""
    kernels = {shape for shape in parameter_shapes(config).values() if len(shape) == 2}
    assert kernels_made(compiled.program, min(map(math.prod, kernels))) == []
    assert kernels <= read_in_int8(compiled.program)


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
    assert max(constants, default=0) <= 128 * 128, "the largest is what turns a head of 128 numbers"
    assert "f64" not in compiled.hlo
    # The CPU's orientation of a product, [out, in] @ [in, rows], must not have been chosen.
    plain = [line for line in compiled.stablehlo.splitlines() if "dot_general" in line and "batching" not in line]
    assert plain
    assert all(re.search(r"contracting_dims = \[\d\] x \[1\]", line) for line in plain)


@pytest.mark.parametrize(("method", "sampled"), [("ar", False), ("dex", True), ("one", False)])
def test_loop_in_bfloat16(tpu, method, sampled) -> None:
    compiled = compile_program(tpu, "run", METHODS[method], "bfloat16", sampled=sampled)
    assert_sound(compiled)
    shapes, _ = compiled.shapes
    one_layer = nbytes(shapes.memory.keys) // SMALL.num_layers
    assert copies_in_loop(compiled.program, one_layer // 2) == []
    # Those of the loop itself: a stage's rows, the final head's, the exits'. None chooses a platform.
    allowed = {"ar": 0, "dex": DEX.stages + 2, "one": 2}[method]
    # Two filters wherever a token is chosen: for each row count that the final layer and the exits are compiled for.
    chosen = {"ar": 1, "dex": 1 + 4, "one": 2}[method]
    assert compiled.hlo.count(" conditional(") <= allowed + 2 * chosen * sampled


EAGLE = EagleConfig(dataclasses.replace(SMALL, num_layers=1), (1, 2, 3), SMALL.width, draft_size=512)
HEAD = nnx.eval_shape(lambda: Eagle(EAGLE, lambda name, shape, kind: jnp.zeros(shape, jnp.bfloat16)))
HALF = dataclasses.replace(SMALL, num_layers=2)
OWN_LAYERS = {
    "eagle": (
        EagleDrafter(EAGLE),
        OwnArrays(nnx.state(HEAD), jax.ShapeDtypeStruct((512,), jnp.int32)),
    ),
    "model": (
        ModelDrafter(HALF, jnp.dtype(jnp.bfloat16), SMALL.vocab_size),
        OwnArrays(abstract_weights(HALF, Unrolled(), jnp.dtype(jnp.bfloat16))),
    ),
}


@pytest.mark.parametrize("name", ["run", "prefill"])
@pytest.mark.parametrize("kind", OWN_LAYERS)
def test_drafters_with_layers_of_their_own(tpu, kind, name) -> None:
    """Their caches are read where they lie, as the model's are."""
    drafter, arrays = OWN_LAYERS[kind]
    shape = dataclasses.replace(TREE, drafted=3, drafting=0.1)
    schedule = Dex(explorers=1, draft=shape).schedule_for(SMALL.num_layers)
    compiled = compile_program(tpu, name, schedule, "bfloat16", drafter=drafter, heads=Heads(drafter=arrays))
    # A prefill holds the scores of the chunk against two caches at once.
    assert_sound(compiled, temporaries=0.3 if name == "prefill" else 0.1)
    shapes, _ = compiled.shapes
    if name == "run":
        assert copies_in_loop(compiled.program, nbytes(shapes.memory.keys) // SMALL.num_layers // 2) == []


def test_prefill_in_bfloat16(tpu) -> None:
    compiled = compile_program(tpu, "prefill", METHODS["ar"], "bfloat16")
    assert_sound(compiled)
    assert compiled.hlo.count(" conditional(") == 0


@pytest.mark.parametrize("method", ["ar", "dex", "one"])
def test_start_in_bfloat16(tpu, method) -> None:
    started = compile_program(tpu, "start", METHODS[method], "bfloat16", sampled=True)
    assert started.memory.alias_size_in_bytes >= nbytes(started.shapes[0].memory)


@pytest.mark.parametrize(
    ("name", "method"), [("run", "ar"), ("run", "dex"), ("run", "one of eight rows"), ("prefill", "ar")]
)
def test_float32_runs_at_the_highest_precision(tpu, name, method) -> None:
    compiled = compile_program(tpu, name, METHODS[method], "float32", cache_length=2048)
    products = re.findall(r" (?:convolution|dot)\(.*", compiled.hlo)
    assert products
    assert [line[:200] for line in products if "operand_precision={highest,highest}" not in line] == []
    lowered = re.findall(r"dot_general.*", compiled.stablehlo)
    assert lowered
    assert [line[:200] for line in lowered if "precision = [HIGHEST, HIGHEST]" not in line] == []


@pytest.mark.parametrize(("method", "tied"), [("ar", True), ("one", False)])
def test_int8_kernels_are_read_and_never_made_dense(tpu, method, tied) -> None:
    """One sequence: an AR step, which is untied below, and ticks of K = 1 with drafts, of one row and of several."""
    config = dataclasses.replace(WIDE, tied=tied)
    schedule = {"ar": AR(), "one": Dex(explorers=1, draft=TREE)}[method].schedule_for(config.num_layers)
    about = {"config": config, "batch": 1, "cache_length": 2048, "packing": packed_alike(config, INT8)}
    compiled = compile_program(tpu, "run", schedule, "bfloat16", **about)
    assert_read_in_int8(compiled, config)
    # The smallest kernel would be 34 MB in bfloat16, and the largest of a layer 235 MB.
    assert compiled.memory.temp_size_in_bytes < 20e6
    # With all layers: what a program holds beside its arguments grows with them, if at all.
    every = dataclasses.replace(config, num_layers=32)
    assert planned_bytes(every) + 16 * compiled.memory.temp_size_in_bytes < CHIP


@pytest.mark.parametrize(("method", "format"), [("ar", "Q4_K"), ("one", "Q6_K")])
def test_blocks_lie_in_planes_and_are_never_made_dense(tpu, method, format) -> None:
    """One sequence: a step moves little more than the planes."""
    schedule = {"ar": AR(), "one": Dex(explorers=1, draft=TREE)}[method].schedule_for(WIDE.num_layers)
    about = {"config": WIDE, "batch": 1, "cache_length": 2048, "packing": packed_alike(WIDE, format + PLANES)}
    compiled = compile_program(tpu, "run", schedule, "bfloat16", **about)
    program, weights = compiled.program, compiled.shapes[0].weights
    kernels = [math.prod(shape) for shape in parameter_shapes(WIDE).values() if len(shape) == 2]
    assert kernels_made(program, min(kernels)) == []
    assert compiled.memory.temp_size_in_bytes < 20e6
    assert program.moved(program.loops[0]) < 1.1 * (nbytes(weights) - nbytes(weights["embed"]))


@pytest.mark.parametrize("name", ["run", "prefill"])
def test_llama_3_8b_fits_one_chip_in_int8(tpu, name) -> None:
    every = SHAPES["llama-3-8b"]
    assert 2 * sum(map(math.prod, parameter_shapes(every).values())) > CHIP
    # A prefill is compiled with two layers, and what it holds beside its arguments is taken to be that of all: layers
    # run in turn. With 512 tokens, which take minutes to compile, that is 0.3 GB.
    config = every if name == "run" else WIDE
    about = {"config": config, "batch": 1, "cache_length": 2048, "packing": packed_alike(config, INT8)}
    compiled = compile_program(tpu, name, AR().schedule_for(config.num_layers), "bfloat16", **about)
    memory = compiled.memory
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # A prefill does not take the unembedding.
    unread = math.prod(parameter_shapes(config)["unembed"]) if name == "prefill" else 0
    assert held == pytest.approx(planned_bytes(config) - unread, rel=0.01)
    if name == "run":
        assert_read_in_int8(compiled, config)
    assert memory.temp_size_in_bytes < (40e6 if name == "run" else 0.5e9)
    assert planned_bytes(every) + memory.temp_size_in_bytes < 0.6 * CHIP


def test_smollm2_depth_exploration_compiles(tpu) -> None:
    """With a third of its layers."""
    config = dataclasses.replace(open_checkpoint("smollm2-135m").config, num_layers=10)
    schedule = Dex(explorers=5, draft=False).schedule_for(config.num_layers)
    compiled = compile_program(tpu, "run", schedule, "bfloat16", config=config, batch=1, cache_length=2048)
    # Widths that are no multiple of 128 (576, 960) make libtpu before 0.0.52 lay weights out anew once a call; in the
    # loop no weight is moved.
    assert_sound(compiled, temporaries=1.0)
    assert copies_in_loop(compiled.program, 2 * config.width**2) == []


@pytest.mark.parametrize(("method", "most"), [(AR(), 1.4e6), (AT_ONCE, 1.6e6)])
def test_cycles_of_a_step(tpu, method, most) -> None:
    """Of SmolLM2-135M, as libtpu estimates them: both run eight rows, and neither chooses how many."""
    config = open_checkpoint("smollm2-135m").config
    schedule, about = method.schedule_for(config.num_layers), {"config": config, "batch": 1, "cache_length": 1024}
    program = compile_program(tpu, "run", schedule, "bfloat16", **about).program
    (loop, *_) = program.loops
    assert not [each for each in program.within(loop) if each.operation == "conditional"]
    assert program.cycles(loop) < most


@pytest.mark.parametrize(("wanted", "method"), [("stage=4", "dex"), ("stage=2,tensor=2", "dex"), ("stage=4", "ar")])
def test_stages_on_four_chips(topology, wanted, method) -> None:
    """A tick reads one stage on each chip, sends one cohort to the next and gathers proposals once."""
    mesh = make_mesh(wanted, topology)
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
    assert copies_in_loop(read(hlo), one_layer // 2) == []
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


def test_int8_kernels_are_split_over_a_tensor_axis(topology) -> None:
    """Each of four chips reads its own quarter of every kernel, and makes nothing dense."""
    mesh, layout = make_mesh("tensor=4", topology), Staged((WIDE.num_layers,))
    schedule = Dex(explorers=1, draft=TREE).schedule_for(WIDE.num_layers)
    about = (WIDE, jnp.dtype(jnp.bfloat16), schedule, layout, 1, 2048)
    shapes = session_shapes(*about, capacity=CAPACITY, packing=packed_alike(WIDE, INT8), mesh=mesh)
    compiled = RUN.jitted.lower(*shapes.of_run, spec=Spec(WIDE, layout, schedule, mesh=mesh)).compile()
    program, memory = read(compiled.as_text()), compiled.memory_analysis()
    split = {"out": 1, "down": 1}
    quarters = set()
    for name, shape in parameter_shapes(WIDE).items():
        if len(shape) == 2:
            axis = split.get(name.split(".")[-1], 0)
            quarters.add(tuple(size // 4 if i == axis else size for i, size in enumerate(shape)))
    assert kernels_made(program, min(map(math.prod, quarters))) == []
    assert quarters <= read_in_int8(program)
    assert memory.argument_size_in_bytes < 0.27 * sum(map(math.prod, parameter_shapes(WIDE).values()))
