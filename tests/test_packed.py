"""Weights that stay packed: the numbers that they stand for, products with them, and models that run on them."""

from __future__ import annotations

import ctypes

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builds import BYTES, PAIRS, format_of
from conftest import slow
from reference.blocks import assert_rounded_product, dequantised, random_blocks
from test_few_rows import needs_compiler, random
from test_io_gguf import write_gguf

import dex_jax
from dex_jax.decoding.generate import prepare
from dex_jax.decoding.request import Request
from dex_jax.decoding.session import RUN
from dex_jax.language_model import outline
from dex_jax.nn import few_rows
from dex_jax.nn.blocks import FORMATS
from dex_jax.nn.layers import linear
from dex_jax.nn.packed import INT8, Packed, as_products_read, joined, take_rows, to_int8
from dex_jax.nn.planes import blank_planes, in_planes
from dex_jax.nn.products import ASSUMED, CompileTarget
from dex_jax.nn.sharding import nbytes
from dex_jax.nn.tiles import in_tiles, out_of_tiles, rows_at
from dex_jax.nn.weights import weight_bytes

formats = pytest.mark.parametrize("format", FORMATS)
METHODS = {"ar": dex_jax.AR(), "drafts": dex_jax.Dex(explorers=1), "explorers": dex_jax.Dex(explorers=2)}
PROMPTS, OPTIONS = [[1, 5, 9, 3], [7] * 11], {"max_new_tokens": 12, "exits": "shared"}
KINDS = {"attn_v": "Q8_0", "token_embd": "Q8_0", "ffn_down": "Q4_0", "attn_output": "F16"}
"""Formats that files often mix: value projections in other blocks than the query's, and some matrices in none."""


def packed(format: str, rows: int, blocks: int, seed: int = 0) -> tuple[Packed, np.ndarray]:
    """Return random blocks, and the numbers that they stand for."""
    found = random_blocks(np.random.default_rng(seed), format, rows, blocks)
    return Packed((jnp.asarray(found),), (None,), (format,)), dequantised(found, format)


@formats
def test_any_bytes_stand_for_what_the_gguf_package_makes_of_them(format) -> None:
    """The bytes of scales are random too, so that some are subnormal, infinite or NaN."""
    (columns, size), rows, blocks = FORMATS[format], 300, 3
    found = np.random.default_rng(0).integers(0, 256, (rows, blocks * size), np.uint8)
    kernel = Packed((jnp.asarray(found),), (None,), (format,))
    assert kernel.shape == (rows, blocks * columns)
    with np.errstate(all="ignore"):
        wanted = dequantised(found, format)
    planes, some = in_planes(found, format), np.array([[rows - 1, 0], [128, 127]])
    assert planes.shape == kernel.shape

    @jax.jit
    def read(kernels: list, some: jax.Array) -> list:
        wholes = [(each.dense(), each[some[0]].dense(), take_rows(each, some)) for each in kernels[1:]]
        return [(kernels[0].dense(), kernels[0].take(some[0]).dense(), kernels[0].rows_at(some)), *wholes]

    for whole, rows_of_it, one_by_one in read([planes, kernel, in_memory(kernel)], jnp.asarray(some)):
        np.testing.assert_array_equal(np.asarray(whole), wanted)
        np.testing.assert_array_equal(np.asarray(rows_of_it), wanted[some[0]])
        np.testing.assert_array_equal(np.asarray(one_by_one), wanted[some])


def in_memory(kernel: Packed) -> Packed:
    """Return the kernel as a model holds it."""
    return jax.tree.map(jnp.asarray, as_products_read(jax.tree.map(np.asarray, kernel)))


@needs_compiler
@pytest.mark.parametrize("format", [*FORMATS, INT8])
def test_a_product_is_that_of_rounded_rows_and_each_row_alone(format) -> None:
    outputs, width = (133, 1536) if format in FORMATS else (37, 1003)
    if format == INT8:
        kernel = to_int8(np.random.default_rng(0).normal(size=(outputs, width)).astype(np.float32))
        numbers = np.asarray(kernel.dense())
    else:
        kernel, numbers = packed(format, outputs, width // FORMATS[format][0])
    kernel = in_memory(kernel)
    assert kernel.tiles
    rows = np.random.default_rng(0).normal(size=(131, width)) * 10.0 ** np.arange(-65, 66)[:, None].clip(-30, 20)
    rows[7], rows[9, :40] = 0, 0
    # In one block of columns an error of one step of its sum shows.
    few = FORMATS[format][0] if format in FORMATS else 32
    one = in_memory(packed(format, outputs, 1)[0] if format in FORMATS else to_int8(numbers[:, :few]))
    x = random(1, (5, few))[0]
    assert_rounded_product(np.asarray(one.product(jnp.asarray(x))), x, np.asarray(one.dense()))
    for dtype in few_rows.DTYPES:
        x = rows.astype(dtype)
        found = np.asarray(kernel.product(jnp.asarray(x)))
        assert_rounded_product(found, x.astype(np.float32), numbers)
        for count in (1, 2, 3, 7, 8, 17):
            np.testing.assert_array_equal(kernel.product(jnp.asarray(x[60 : 60 + count])), found[60 : 60 + count])


@needs_compiler
def test_what_is_not_finite_stays_so_in_its_row_alone() -> None:
    kernel, x = in_memory(packed("Q4_1", 20, 3)[0]), random(0, (3, 96))[0]
    wanted = np.asarray(kernel.product(jnp.asarray(x)))
    x[1, 40], x[2, 0] = np.nan, -np.inf
    found = np.asarray(kernel.product(jnp.asarray(x)))
    np.testing.assert_array_equal(found[0], wanted[0])
    assert np.all(np.isnan(found[1:]))


@pytest.mark.parametrize(("format", "rows"), [("Q4_1", 5), slow("Q6_K", 16), slow("Q5_K", 39), (INT8, 35)])
def test_tiles_are_the_bytes_of_the_rows_in_another_order(format, rows) -> None:
    generator, width = np.random.default_rng(0), 27 if format == INT8 else 2 * FORMATS[format][1]
    stored = generator.integers(0, 256, (3, rows, width), np.uint8)
    tiles = in_tiles(stored, format)
    assert (tiles.shape, tiles.dtype) == (stored.shape, stored.dtype)
    np.testing.assert_array_equal(np.sort(tiles, axis=None), np.sort(stored, axis=None))
    np.testing.assert_array_equal(in_tiles(jnp.asarray(stored), format), tiles)
    np.testing.assert_array_equal(out_of_tiles(jnp.asarray(tiles), format), stored)
    index = generator.integers(rows, size=(2, 4))
    np.testing.assert_array_equal(rows_at(jnp.asarray(tiles[1]), jnp.asarray(index), format), stored[1][index])


@formats
def test_without_cpp_xla_takes_blocks_to_pieces(monkeypatch, format) -> None:
    monkeypatch.setattr(few_rows, "ready", lambda: False)
    kernel, numbers = packed(format, 9, 2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, numbers.shape[1])), jnp.float32)
    assert few_rows.PRODUCT not in str(jax.make_jaxpr(lambda x: linear(x, kernel))(x))
    np.testing.assert_allclose(linear(x, kernel), x @ numbers.T, rtol=1e-4, atol=1e-4)
    planes = in_planes(np.asarray(kernel.parts[0]), format)
    np.testing.assert_allclose(planes.product(x), x @ numbers.T, rtol=1e-4, atol=1e-4)
    like = jax.tree.map(lambda plane: jax.ShapeDtypeStruct(plane.shape, plane.dtype), planes)
    assert like == jax.eval_shape(lambda: blank_planes(numbers.shape, format))


def test_planes_of_many_rows_are_made_some_at_a_time(monkeypatch) -> None:
    kernel, numbers = packed("Q5_K", 9, 2)
    monkeypatch.setattr("dex_jax.nn.planes._AT_ONCE", 4 * 512)
    np.testing.assert_array_equal(in_planes(np.asarray(kernel.parts[0]), "Q5_K").dense(), numbers)


def test_runs_of_several_formats_are_one_kernel() -> None:
    (first, some), (second, more) = packed("Q4_1", 6, 8), packed("Q6_K", 3, 1)
    blocks = [np.asarray(part) for part in (first.parts[0][:2], first.parts[0][2:], second.parts[0])]
    kernel = jax.tree.map(jnp.asarray, joined(blocks, (("Q4_1", 6), ("Q6_K", 3))))
    assert (kernel.shape, kernel.formats, len(kernel.parts)) == ((9, 256), ("Q4_1", "Q6_K"), 2)
    numbers = np.concatenate([some, more])
    np.testing.assert_array_equal(kernel.dense(), numbers)
    x = jnp.ones((2, 3, 256))
    np.testing.assert_allclose(linear(x, kernel), x @ numbers.T, rtol=1e-4, atol=1e-4)


def test_int8_rounds_to_the_nearest_of_255_steps_a_row(monkeypatch) -> None:
    kernel = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
    kernel[3] = 0
    found = jax.tree.map(jnp.asarray, to_int8(kernel))
    step = np.abs(kernel).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(np.asarray(found.dense()) - kernel) <= 0.5001 * step)
    assert np.asarray(found.parts[0]).min() >= -127
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 33)), jnp.float32)
    for ready in (few_rows.ready(), False):
        monkeypatch.setattr(few_rows, "ready", lambda ready=ready: ready)
        np.testing.assert_allclose(found.product(x), x @ found.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["Q4_1", INT8])
def test_gpus_sum_up_few_rows_where_a_product_would_copy_the_kernel(format) -> None:
    generator = np.random.default_rng(0)
    kernel = packed("Q4_1", 7, 3)[0] if format == "Q4_1" else jax.tree.map(jnp.asarray, to_int8(random(1, (7, 96))[0]))
    rows, dense = jnp.asarray(generator.normal(size=(20, 96)), jnp.float16), np.asarray(kernel.dense(), np.float64)
    for capability, count in ((7.5, 5), (7.5, 20), (8.0, 5), (0.0, 5)):
        before = ASSUMED.set(CompileTarget("gpu", capability))
        as_sums = "dot_general" not in str(jax.make_jaxpr(lambda rows: kernel.product(rows))(rows[:count]))
        found = kernel.product(rows[:count])
        ASSUMED.reset(before)
        assert as_sums == (count == 5 and (capability == 7.5 or (capability == 8 and format != INT8)))
        np.testing.assert_allclose(found, np.asarray(rows[:count], np.float64) @ dense.T, rtol=2e-3, atol=0.02)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return str(write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "llama3", "Q4_1", kinds=KINDS))


@pytest.fixture(scope="module")
def models(file) -> dict[str, dex_jax.LanguageModel]:
    found = {kind: dex_jax.load(file, "float32", weights=kind) for kind in ("stored", "dense", "int8")}
    return found | {"bfloat16": dex_jax.load(file, "bfloat16", weights="stored")}


@needs_compiler
def test_blocks_stay_packed_unless_one_part_of_a_matrix_has_none(file, models, capsys) -> None:
    stored = dex_jax.load(file, "float32")
    assert "F16" in capsys.readouterr().err
    assert stored.weights_kind == models["stored"].weights_kind == "Q4_0 and Q4_1 and Q8_0"
    assert models["dense"].weights_kind == "float32"
    assert stored.parameter_bytes < 0.45 * models["dense"].parameter_bytes
    fields = {name.split(".")[-1] for name, _ in stored.packing}
    assert fields == {"embed", "qkv", "gate_up", "down"} | ({"unembed"} if not stored.config.tied else set())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored.weights)
    chex.assert_trees_all_equal(shapes, outline(file, "float32").weights)


@needs_compiler
def test_logits_are_near_those_of_dense_weights_and_a_prompts_are_those_of_each_row(models) -> None:
    tokens = np.random.default_rng(0).integers(0, models["dense"].config.vocab_size, (2, 21))
    found = models["stored"].logits(tokens)
    chex.assert_trees_all_close(found, models["dense"].logits(tokens), atol=0.01)
    alone = [models["stored"].logits(tokens[1:, : length + 1])[0, -1] for length in (0, 6, 20)]
    chex.assert_trees_all_equal(jnp.stack(alone), found[1, jnp.asarray([0, 6, 20])])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("stored", ("ar", "drafts")),
        slow("stored", METHODS),
        slow("int8", ("ar", "explorers")),
        slow("bfloat16", ("ar", "explorers")),
    ],
)
def test_every_method_gives_ars_tokens(models, kind, names) -> None:
    outs = {name: dex_jax.generate(models[kind], PROMPTS, method=METHODS[name], **OPTIONS) for name in names}
    for out in outs.values():
        np.testing.assert_array_equal(out.tokens, outs["ar"].tokens)
        assert out.stats.weights == models[kind].weights_kind
    if kind == "stored" and len(names) > 2:
        dense = dex_jax.generate(models["dense"], PROMPTS, method=METHODS["drafts"], **OPTIONS)
        np.testing.assert_array_equal(dense.tokens, outs["ar"].tokens)
        np.testing.assert_array_equal(dense.stats.exits, outs["drafts"].stats.exits)


@needs_compiler
def test_a_text_is_the_same_by_the_libraries_of_either_layout(models) -> None:
    lm, options = models["stored"], OPTIONS | {"max_new_tokens": 32}
    formats = lm.weights_kind.split(" and ")

    def decoded() -> tuple[np.ndarray, np.ndarray]:
        tokens = dex_jax.generate(lm, PROMPTS[:1], method=METHODS["drafts"], **options).tokens
        return tokens, lm.logits(np.asarray([PROMPTS[0] + tokens[0].tolist()]))

    wanted = decoded()
    assert wanted[0].shape == (1, 32)
    try:
        for layout in (BYTES, PAIRS):
            for format in formats:
                library = ctypes.CDLL(str(few_rows.library(format, (layout,))))
                few_rows.load_as(format, format_of(library))
            chex.assert_trees_all_equal(decoded(), wanted)
    finally:
        few_rows._load.cache_clear()  # which loads this CPU's own again
        for format in formats:
            few_rows._load(format)


@needs_compiler
def test_no_step_makes_a_dense_copy(models) -> None:
    lm = models["stored"]
    session = prepare(lm, [[1, 2]], Request(method=dex_jax.AR(), max_new_tokens=4))
    session.prefill()
    program = RUN.compile(
        lm.weights, session.heads, session.state, session.limits, None, jnp.int32(0), plan=session.plan
    )
    kernels = [np.prod(shape) for shape in map(np.shape, jax.tree.leaves(models["dense"].weights)) if len(shape) == 2]
    assert program.memory_analysis().temp_size_in_bytes < 4 * min(kernels)


@pytest.mark.slow
def test_a_model_on_planes_is_the_dense_one(file, models, monkeypatch) -> None:
    """A model without kernels in C++, as on a TPU, has the dense one's logits and the stored one's tokens."""
    stored = dex_jax.generate(models["stored"], PROMPTS, method=METHODS["ar"], **OPTIONS)
    monkeypatch.setattr(few_rows, "ready", lambda: False)
    monkeypatch.setattr("dex_jax.language_model.compiled_for", lambda: CompileTarget("tpu"))
    lm = dex_jax.load(file, "float32", weights="stored")
    assert lm.weights_kind == "Q4_0 and Q4_1 and Q8_0 in planes"
    held = sum(leaf.size for leaf in jax.tree.leaves(lm.weights) if leaf.dtype == jnp.uint4)
    assert held > 0
    assert lm.parameter_bytes == nbytes(lm.weights) == sum(weight_bytes(lm.config, lm.dtype, lm.packing).values())
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 21))
    np.testing.assert_allclose(lm.logits(tokens), models["dense"].logits(tokens), rtol=1e-4, atol=1e-4)
    for name in ("ar", "drafts"):
        found = dex_jax.generate(lm, PROMPTS, method=METHODS[name], **OPTIONS)
        np.testing.assert_array_equal(found.tokens, stored.tokens, err_msg=name)


def test_other_weights_are_refused_and_int8_is_named(file, models) -> None:
    with pytest.raises(dex_jax.DexError, match="int4"):
        dex_jax.load(file, "float32", weights="int4")
    assert models["int8"].weights_kind == INT8
    assert "int8" in repr(models["int8"])
