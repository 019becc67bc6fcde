"""The decoding programs compile for NVIDIA GPUs on a machine that has none, and are read as XLA has optimised them.

Run with `pytest -m cuda` in an environment that docs/howto_gpu_tpu.md makes.
"""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from dex_jax.cli.decode import main
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.footprint import session_shapes
from dex_jax.decoding.methods import AR, Dex
from dex_jax.decoding.spec import Spec
from dex_jax.evaluation.compiled import read
from dex_jax.evaluation.targets import lower, target
from dex_jax.io.opening import open_checkpoint
from dex_jax.nn.attention import KeyValues, attend
from dex_jax.nn.packed import INT8
from dex_jax.nn.transformer import Unrolled, parameter_shapes
from dex_jax.nn.weights import packed_alike
from dex_jax.planner import SHAPES
from dex_jax.sharding import nbytes

pytestmark = pytest.mark.cuda

CACHE, CHUNK = 2048, 512
TREE = TreeShape((2, 2, 1, 1, 1), drafted=0, lookup=(0.5,) * 8)
METHODS = {
    "ar": AR(),
    "one": Dex(explorers=1, draft=TREE),
    "dex": Dex(explorers=5, draft=False),
    "dex with drafts": Dex(explorers=5, draft=TREE),
}
LAYERS = 5
MODELS = {"smollm2": open_checkpoint("smollm2-135m").config, "8b": SHAPES["llama-3-8b"]}


def compiled(gpu: str, model: str, method: str, name: str = "run", cache: int = CACHE, format: str | None = None):
    """(program, its memory figures, the shapes that went in) of "run" or "prefill" with a few layers, one sequence."""
    config = dataclasses.replace(MODELS[model], num_layers=LAYERS)
    dtype = jnp.dtype(jnp.float16 if gpu == "t4" else jnp.bfloat16)
    schedule = METHODS[method].schedule_for(config.num_layers)
    packing = () if format is None else packed_alike(config, format)
    shapes = session_shapes(config, dtype, schedule, Unrolled(), 1, cache, capacity=256, packing=packing)
    with target(gpu) as (device,):
        found = lower(name, shapes, Spec(config, Unrolled(), schedule), device, CHUNK).compile()
    return read(found.as_text()), found.memory_analysis(), shapes


# (GPU, model, method): kernels of a step and megabytes that it moves, not to be passed.
MOST = {
    ("h100", "smollm2", "ar"): (79, 113),
    ("h100", "smollm2", "one"): (195, 114),
    ("h100", "smollm2", "dex"): (208, 179),
    ("h100", "smollm2", "dex with drafts"): (311, 194),
    ("h100", "8b", "ar"): (85, 3340),
    ("h100", "8b", "one"): (200, 3344),
    ("h100", "8b", "dex with drafts"): (316, 4493),
    ("a100-40", "8b", "dex"): (213, 4417),
    ("t4", "8b", "ar"): (118, 3315),
    ("t4", "8b", "dex with drafts"): (376, 4585),
}


@pytest.mark.parametrize(("gpu", "model", "method"), MOST)
def test_loop(gpu: str, model: str, method: str) -> None:
    program, memory, shapes = compiled(gpu, model, method)
    kernels = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(shapes.weights) if leaf.ndim == 2}
    width = MODELS[model].head_dim
    moves = ("convert", "copy", "transpose", "slice", "concatenate")
    for each in program.within(*program.loops):
        for array in each.results if program.operation_of(each) in moves else ():
            assert tuple(sorted(size for size in array.dims if size > 1)) not in kernels, each.line[:300]
            assert array.dims[-1:] != (width,) or max(array.dims) < CACHE, each.line[:300]
    (loop, *_), (most, megabytes) = program.loops, MOST[gpu, model, method]
    assert program.kernels(loop) <= most
    assert program.moved(loop) / 1e6 <= megabytes
    assert memory.temp_size_in_bytes < 40e6
    assert memory.alias_size_in_bytes >= nbytes(shapes.state)


@pytest.mark.parametrize(
    ("gpu", "method", "format"),
    [("t4", "one", INT8), ("h100", "one", INT8), ("t4", "one", "Q4_K"), ("h100", "ar", "Q4_K")],
)
def test_packed_kernels_are_read_where_they_lie(gpu: str, method: str, format: str) -> None:
    """Nothing dense is made of them, and a step in int8 moves little more than its weights."""
    program, memory, shapes = compiled(gpu, "8b", method, format=format)
    smallest = min(math.prod(shape) for shape in parameter_shapes(MODELS["8b"]).values() if len(shape) == 2)
    (loop, *_) = program.loops
    for each in program.within(*program.loops):
        for array in each.results if each.works and each.operation != "while" else ():
            assert array.kind in ("s8", "u8") or array.size < smallest, each.line[:300]
    # Blocks are read piece by piece, each of which counts as a reading of all.
    if format == INT8:
        assert program.moved(loop) < 1.12 * nbytes([shapes.weights[name] for name in ("layers", "unembed")])
    assert memory.temp_size_in_bytes < 80e6


@pytest.mark.parametrize(("rows", "heads", "groups", "width"), [(1, 32, 8, 128), (16, 32, 8, 128), (16, 4, 1, 256)])
def test_attention_fits_into_the_shared_memory_of_small_cores(rows: int, heads: int, groups: int, width: int) -> None:
    with target("l4") as (device,):
        here = jax.sharding.SingleDeviceSharding(device)

        def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

        cached, own = (
            KeyValues(*[shape(1, groups, length, width)] * 2, shape(1, rows, length, dtype=bool))
            for length in (CACHE, rows)
        )
        found = jax.jit(attend).lower(shape(1, rows, heads, width), [cached, own]).compile().as_text()
    assert "few_rows_attention" in found


@pytest.mark.parametrize("gpu", ["t4", "h100"])
def test_a_prompt_never_has_all_of_its_scores_in_memory(gpu: str) -> None:
    """A chunk of a prompt over a cache of 16,384 positions would have a gigabyte of scores a layer."""
    program, memory, _ = compiled(gpu, "8b", "ar", "prefill", cache=16384)
    largest = max(array.size for each in program.within(program.entry) if each.works for array in each.results)
    assert largest < 0.2 * MODELS["8b"].num_heads * CHUNK * 16384
    assert memory.temp_size_in_bytes < 0.25e9
    fused = [each for each in program.within(program.entry) if "dot_product_attention" in each.line]
    assert bool(fused) == (gpu == "h100")


def test_a_dry_run_measures_temporaries(capsys) -> None:
    main(["--dry-run", "--json", "--hardware", "h100", "--method", "ar", "--prompt", "Hi"])
    out, err = capsys.readouterr()
    assert "estimated" not in err
    assert json.loads(out)["workspace_bytes"] < 20e6
