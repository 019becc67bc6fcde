"""The programs of decoding compile for GPUs and TPUs on a machine that has none, and these tests read XLA's output.

They run with `pytest -m cuda` and `pytest -m tpu` if docs/howto_gpu_tpu.md's compilers are there. In the loop no weight
and no cache is copied or widened, and little more than the weights is moved.
"""

from __future__ import annotations

import dataclasses
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from reference.compiled import Hlo, assumed, devices_of
from reference.small_models import LLAMA, outline_of, packed_alike, programs_of

from dex_jax.decoding.dex.drafters import draft_model
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.plan import GivenHeads, plan_for
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.session import Session
from dex_jax.nn.attention import KeyValues, attend
from dex_jax.nn.packed import INT8
from dex_jax.nn.planes import PLANES
from dex_jax.nn.sharding import make_mesh, nbytes
from dex_jax.nn.transformer import Staged, parameter_shapes

TREE = TreeShape((2, 2, 1, 1, 1), drafter_levels=0, lookup=(0.5,) * 8)
DRAFTED = dataclasses.replace(TREE, drafter_levels=3)
METHODS = {
    "ar": AR(),
    "one": Dex(explorers=1, draft=TREE),
    "dex": Dex(explorers=5, draft=False),
    "dex with drafts": Dex(explorers=5, draft=TREE),
    "four": Dex(explorers=4, draft=False),
    "two": Dex(explorers=2, draft=False),
    "drafter": Dex(explorers=1, draft=DRAFTED),
}
# Five layers of Llama 3 8B: a copy of any kernel would stand out. The vocabulary is small, as arrays count as a whole.
WIDE = dataclasses.replace(
    LLAMA, vocab_size=4096, num_layers=5, width=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=14336,
    context=32768, tied=False, eos_ids=(2,),
)  # fmt: skip
# Its widths are no multiples of 128, like those of SmolLM2-135M.
NARROW = dataclasses.replace(
    WIDE, width=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_width=1536, vocab_size=49152, tied=True
)


def compiled(name, method, which="run_ticks", *, config=WIDE, dtype="bfloat16", format=None, mesh=None, length=64):
    """Return (session, lowered text, compiled program) of one sequence on a GPU or a TPU."""
    devices = devices_of(name)
    spread = None if mesh is None else make_mesh(mesh, devices)
    stages = plan_for(Dex(explorers=1 if mesh is None else spread.shape["stage"]), config.num_layers).depths
    packing = () if format is None else packed_alike(config, format)
    about = (dtype, packing, spread, Staged(stages) if mesh else None)

    def put(tree, at=None):  # there is no device to put arrays on
        return jax.tree.map(lambda x: x if at is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)

    with assumed(name), mock.patch.object(jax, "device_put", put):
        lm, drafter = outline_of(config, *about), None
        if method == "drafter":
            drafter = draft_model(lm, outline_of(dataclasses.replace(config, num_layers=2), *about))
        plan = dataclasses.replace(plan_for(METHODS[method], config.num_layers), heads=GivenHeads(drafter=drafter))
        sampled = {"temperature": 1.0, "top_k": 5, "top_p": 0.9} if method == "dex with drafts" else {}
        session = Session(lm, [[1] * length], plan, Request(max_new_tokens=300, **sampled))
        program, arguments, statics = programs_of(session)[which]
        arguments = arguments if mesh else put(arguments, SingleDeviceSharding(devices[0]))
        lowered = program.jitted.lower(*arguments, **statics)
        return session, lowered.as_text(), lowered.compile()


def read_in_place(session, found):
    """Return the program; its loop must make no array of a kernel's size but logits, and no copy of half a cache."""
    hlo, config, length, mesh = Hlo(found.as_text()), session.lm.config, session.cache_length, session.lm.mesh
    smallest = min(math.prod(shape) for shape in parameter_shapes(config).values() if len(shape) == 2)
    pieces = 1 if mesh is None else mesh.shape["tensor"]
    for array, line in hlo.made(hlo.loop):
        size = pieces * math.prod(array.dims)
        assert size < smallest or (array.dims[-1] == config.vocab_size and size <= 64 * config.vocab_size), line[:300]
        copied = {length, config.head_dim} <= {*array.dims}
        assert not copied or 2 * size < length * config.num_kv_heads * config.head_dim, line[:300]
    return hlo


def case(name, *values, slow=True):
    return pytest.param(
        name, *values, marks=[pytest.mark.tpu if name == "v5e" else pytest.mark.cuda, *[pytest.mark.slow] * slow]
    )


@pytest.mark.parametrize(
    ("name", "method", "format"),
    [
        *(case(name, method, None, slow=False) for name in ("h100", "v5e") for method in ("ar", "one", "dex")),
        *(case(name, "dex with drafts", None) for name in ("t4", "h100", "v5e")),
        *(case(name, "one", INT8) for name in ("t4", "h100", "v5e")),
        case("t4", "one", "Q4_K"),
        case("h100", "ar", "Q4_K"),
        case("v5e", "ar", "Q4_K" + PLANES),
        case("v5e", "one", "Q6_K" + PLANES),
    ],
)
def test_loop(name, method, format):
    session, _, found = compiled(name, method, dtype="float16" if name == "t4" else "bfloat16", format=format)
    hlo, weights, memory = read_in_place(session, found), session.lm.weights, found.memory_analysis()
    assert memory.argument_size_in_bytes > nbytes(weights), "an array that had become a constant would be missing"
    assert memory.alias_size_in_bytes >= 4 * WIDE.num_layers * session.cache_length * 8 * 128
    assert memory.temp_size_in_bytes < 80e6
    if format != "Q4_K":  # GPUs read blocks piece by piece, and each piece counts as the whole array
        read = nbytes(weights) - nbytes(weights["embed"])
        read += nbytes(weights["unembed"]) if session.plan.stages > 1 else 0  # once for exits, once for the final layer
        assert hlo.moved(hlo.loop) < 1.1 * read


@pytest.mark.parametrize(("name", "method"), [case("h100", "dex"), case("v5e", "dex"), case("v5e", "drafter")])
def test_narrow_layers_and_a_drafter_with_layers_of_its_own(name, method):
    session, _, found = compiled(name, method, config=NARROW)
    read_in_place(session, found)


@pytest.mark.parametrize(
    ("name", "method", "which"),
    [
        *(case(name, method, "run_ticks") for name in ("h100", "v5e") for method in ("one", "dex")),
        *(case(name, "ar", "prefill_chunk") for name in ("h100", "v5e")),
    ],
)
def test_float32_has_the_highest_precision(name, method, which):
    _, text, found = compiled(name, method, which, config=NARROW, dtype="float32")
    assert not re.search(r"\bf64\b|xf64>", text)
    for products, highest in (
        (re.findall(r"dot_general.*", text), "precision = [HIGHEST, HIGHEST]"),
        (re.findall(r" (?:convolution|dot)\(.*", found.as_text()), "operand_precision={highest,highest}"),
    )[: 2 if name == "v5e" else 1]:
        assert products
        assert [line[:200] for line in products if highest not in line] == []


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "method", "format"),
    [("stage=4", "ar", None), ("stage=4", "four", None), ("stage=2,tensor=2", "two", None), ("tensor=4", "one", INT8)],
)
def test_meshes_of_four_chips(mesh, method, format):
    """Each chip reads its own part where it lies, and sends one cohort to the next stage in a tick."""
    session, _, found = compiled("v5e", method, mesh=mesh, format=format)
    read_in_place(session, found)
    stages = session.lm.mesh.shape["stage"]
    permutes = len(re.findall(r" collective-permute(?:-start)?\(", found.as_text()))
    assert permutes == (stages - 1 if method == "ar" else int(stages > 1))


@pytest.mark.parametrize("name", [case("t4"), case("h100"), case("v5e")])
def test_a_prompt_never_has_all_of_its_scores_in_memory(name):
    """A chunk of 512 tokens over a cache of 17,408 positions would have more than a gigabyte of scores a layer."""
    session, _, found = compiled(name, "ar", "prefill_chunk", length=16384)
    # A T4 holds the float32 products of 512 rows for several layers at once, but no layer's scores.
    assert found.memory_analysis().temp_size_in_bytes < (0.7e9 if name == "t4" else 0.25e9)
    assert found.memory_analysis().alias_size_in_bytes >= 2 * 2 * WIDE.num_layers * session.cache_length * 8 * 128
    assert ("dot_product_attention" in found.as_text()) == (name == "h100")


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "heads", "groups", "width"), [(1, 32, 8, 128), (16, 32, 8, 128), (16, 4, 1, 256)])
def test_attention_fits_into_the_shared_memory_of_small_cores(rows, heads, groups, width):
    here = SingleDeviceSharding(devices_of("l4")[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=here)

    sources = [
        KeyValues(*[shape(1, groups, length, width)] * 2, shape(1, rows, length, dtype=bool)) for length in (2048, rows)
    ]
    with assumed("l4"):
        found = jax.jit(attend).lower(shape(1, rows, heads, width), sources).compile()
    assert "few_rows_attention" in found.as_text()


def test_a_widened_kernel_is_seen():
    def run(kernel, x, widened):
        def turn(state):
            at, x = state
            return at + 1, (kernel * at.astype(kernel.dtype) if widened else kernel) @ x

        return jax.lax.while_loop(lambda state: state[0] < 9, turn, (jnp.int32(0), x))

    found = {}
    for widened in (False, True):
        program = jax.jit(run, static_argnums=2).lower(jnp.ones((256, 256)), jnp.ones((256, 8)), widened)
        hlo = Hlo(program.compile().as_text())
        found[widened] = (hlo.moved(hlo.loop), any(array.dims == (256, 256) for array, _ in hlo.made(hlo.loop)))
    kernel = 4 * 256 * 256
    assert found[False] == (pytest.approx(kernel, rel=0.2), False)
    assert found[True] == (pytest.approx(3 * kernel, rel=0.2), True)


def test_what_was_traced_for_one_device_is_not_used_for_another():
    keys = jnp.ones((1, 1, 30, 20))  # C++ does not take this width
    attention = jax.jit(lambda queries: attend(queries, [KeyValues(keys, keys, jnp.ones((1, 4, 30), bool))]))

    def has_ways(name):
        with assumed(name):
            return "platform_index" in str(attention.trace(jnp.ones((1, 4, 1, 20))).jaxpr)

    assert [has_ways(name) for name in ("v5e", "h100", "v5e", "t4")] == [False, True, False, True]
