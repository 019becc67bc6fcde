"""Run the C++ kernels, compiled with sanitizers, on ragged and empty shapes and on operands that do not fit.

    LD_PRELOAD=libasan.so:libstdc++.so ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
        python tests/sanitized_kernels.py LIBRARY ...

Each LIBRARY is the file that `few_rows.library(part, FLAGS)` built from one of PARTS in another process: in this one
the sanitizers would watch the compiler, too.
A sanitizer that finds something ends the process; results that differ from NumPy's do, too.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.blocks import assert_rounded_product, dequantised, random_blocks

from dex_jax.nn import few_rows, native
from dex_jax.nn.blocks import FORMATS
from dex_jax.nn.packed import INT8
from dex_jax.nn.tiles import in_tiles

PARTS = ("", *few_rows.NUMBERS, *FORMATS, INT8)
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def call(target: str, shape: tuple[int, ...], *operands: np.ndarray, **attributes) -> np.ndarray:
    # Every operand is an allocation of its own, so that the sanitizer knows where it ends.
    own = [jnp.array(operand) for operand in operands]
    return np.asarray(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))(*own, **attributes))


def products(random: np.random.Generator) -> None:
    sizes = itertools.product([0, 1, 7, 17, 131], [0, 13, 1300], [0, 70])
    for (rows, width, outputs), dtype in zip(sizes, itertools.cycle(few_rows.DTYPES), strict=False):
        x, kernel = random.normal(size=(rows, width)), random.normal(size=(outputs, width)).astype(dtype)
        x = x.astype(np.float32)
        found = call(few_rows.PRODUCT, (rows, outputs), x, kernel, format="")
        np.testing.assert_allclose(found, x @ kernel.astype(np.float32).T, atol=1e-3)
    for (rows, blocks, outputs), format in zip(
        itertools.product([0, 1, 7, 17, 131], [0, 1, 3], [0, 5, 32]), itertools.cycle(FORMATS), strict=False
    ):
        columns, size = FORMATS[format]
        packed = random_blocks(random, format, outputs, blocks)
        x = random.normal(size=(rows, blocks * columns)).astype(np.float32)
        found = call(few_rows.PRODUCT, (rows, outputs), x, in_tiles(packed, format), format=format)
        assert packed.shape == (outputs, blocks * size)
        assert_rounded_product(found, x, dequantised(packed, format))
    for rows, width, outputs in itertools.product([0, 1, 19], [0, 3, 37, 64], [0, 5, 32]):
        x, kernel = random.normal(size=(rows, width)).astype("f"), random.integers(-128, 128, (outputs, width), np.int8)
        found = call(few_rows.PRODUCT, (rows, outputs), x, in_tiles(kernel, INT8), format=INT8)
        assert_rounded_product(found, x, kernel)
    x, kernels = random.normal(size=(7, 37)).astype("f"), random.normal(size=(3, 5, 37)).astype("f")
    found = call(few_rows.PRODUCT, (7, 5), x, *kernels, np.int32(2), format="")
    np.testing.assert_allclose(found, x @ kernels[2].T, atol=1e-3)
    x, kernel = random.normal(size=(3, 1, 5, 9)).astype("f"), random.normal(size=(1, 4, 6, 9)).astype("f")
    found = call(few_rows.PRODUCT, (3, 4, 5, 6), x, kernel, format="")
    np.testing.assert_allclose(found, x @ kernel.swapaxes(2, 3), atol=1e-4)


def norms(random: np.random.Generator) -> None:
    for rows, width in itertools.product([0, 1, 200], [0, 7, 577]):
        x, scale = random.normal(size=(rows, width)).astype("f"), random.normal(size=width).astype("f")
        found = call(few_rows.NORM, x.shape, x, scale, epsilon=np.float32(1e-5))
        if found.size:
            wanted = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5) * scale
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def heads_and_gates(random: np.random.Generator) -> None:
    for rows, (heads, groups), width, half in itertools.product([0, 1, 90], [(6, 2), (1, 1)], [7, 48], [0, 3]):
        x = random.normal(size=(2, rows, (heads + 2 * groups) * width)).astype("f")
        cos, sin = random.normal(size=(2, 1, rows, half)).astype("f")
        of_queries, of_keys = (2, rows, heads, width), (2, groups, rows, width)
        give = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (of_queries, of_keys, of_keys)]
        queries, _, values = jax.ffi.ffi_call(few_rows.TURN, give)(*(jnp.array(each) for each in (x, cos, sin)))
        each = x.reshape(2, rows, heads + 2 * groups, width)
        left, right = each[:, :, :heads, :half], each[:, :, :heads, half : 2 * half]
        turned = left * cos[:, :, None] - right * sin[:, :, None]
        np.testing.assert_allclose(queries[..., :half], turned, atol=1e-5)
        np.testing.assert_array_equal(queries[..., 2 * half :], each[:, :, :heads, 2 * half :])
        np.testing.assert_array_equal(values, each[:, :, heads + groups :].swapaxes(1, 2))
    for rows, width in itertools.product([0, 1, 200], [0, 7, 77]):
        x = random.normal(size=(rows, 2 * width)).astype("f")
        found = call(few_rows.GATE, (rows, width), x, activation="silu")
        np.testing.assert_allclose(found, x[:, :width] / (1 + np.exp(-x[:, :width])) * x[:, width:], atol=1e-5)


def attentions(random: np.random.Generator) -> None:
    sizes = itertools.product([0, 1, 33], [(6, 2), (3, 3)], [48], [0, 70])
    for (rows, (heads, groups), width, length), dtype in zip(sizes, itertools.cycle(few_rows.DTYPES), strict=False):
        cap = 2.0 if rows == 33 else 0.0
        queries = random.normal(size=(2, rows, heads, width)).astype("f")
        keys, values = (random.normal(size=(2, groups, length, width)).astype(dtype) for _ in range(2))
        own_keys, own_values = (random.normal(size=(2, groups, rows, width)).astype(dtype) for _ in range(2))
        seen = np.arange(length) < np.array([length, length // 2])[:, None, None]
        causal = np.broadcast_to(np.tril(np.ones((rows, rows), bool)), (2, rows, rows))
        sources = (keys, values, seen, own_keys, own_values, causal)
        found = call(few_rows.ATTENTION, queries.shape, queries, *sources, cap=np.float32(cap))
        several = (keys + 1, keys, keys, values, values, values + 1, *sources[2:])
        attributes = {"cap": np.float32(cap), "choices": np.array([3, 1])}
        same = call(few_rows.ATTENTION, queries.shape, queries, np.int32(1), *several, **attributes)
        np.testing.assert_array_equal(same, found)
        both = [np.concatenate(pair, axis=2).astype("f") for pair in ((keys, own_keys), (values, own_values))]
        keys, values = (np.repeat(each, heads // groups, axis=1) for each in both)
        scores = np.einsum("brhd,bhsd->bhrs", queries, keys) / np.sqrt(width)
        scores = cap * np.tanh(scores / cap) if cap else scores
        mask = np.concatenate([np.broadcast_to(seen, (2, rows, length)), causal], axis=2)
        weights = np.where(mask[:, None], np.exp(scores), 0)
        wanted = np.einsum("bhrs,bhsd->brhd", weights, values) / weights.sum(3).transpose(0, 2, 1)[..., None]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def writes(random: np.random.Generator) -> None:
    batch, groups, rows, width, margin = 3, 2, 5, 6, 4
    start, row = np.array([-1, 2, 9], np.int32), np.array([[0, 1, 2], [4, 0, 9], [-1, 1, 3]], np.int32)
    for dtype, length, ring in ((few_rows.DTYPES[0], 14, 0), (few_rows.DTYPES[1], 16, 8)):
        fresh = random.normal(size=(2, 1, batch, groups, rows, width)).astype(dtype)
        caches = random.normal(size=(2, batch, groups, length, width)).astype(dtype)
        own = [jnp.array(each) for each in caches]
        attributes = {"rings": np.array([ring]), "margin": np.int64(margin)}
        shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in own]
        operands = [jnp.array(each) for each in (start, row, *fresh)]
        found = jax.ffi.ffi_call(few_rows.WRITE, shapes, input_output_aliases={4: 0, 5: 1})(
            *operands, *own, **attributes
        )
        for b, first in enumerate(start):
            place = margin + first % ring if ring else first
            for p, chosen in enumerate(np.clip(row[b], 0, rows - 1)):
                if first >= 0:
                    caches[:, b, :, place + p] = fresh[:, 0, b, :, chosen]
        np.testing.assert_array_equal(np.stack(found), caches)
        apart = [own for together in fresh for own in together]
        own = [jnp.array(each) for each in caches]
        write = jax.ffi.ffi_call(few_rows.WRITE, shapes, input_output_aliases={4: 0, 5: 1})
        found = write(start, row, *(jnp.array(each) for each in apart), *own, **attributes)
        np.testing.assert_array_equal(np.stack(found), caches)
    # A write that passes the end of a ring of 8 goes on at its beginning.
    own = [jnp.zeros((1, 1, 16, 1)) for _ in range(2)]
    operands = [jnp.array([7]), jnp.arange(3)[None], *jnp.arange(1.0, 4).reshape(1, 1, 1, 1, 3, 1).repeat(2, 0)]
    write = jax.ffi.ffi_call(few_rows.WRITE, own, input_output_aliases={4: 0, 5: 1})
    keys, _ = write(*operands, *own, rings=np.array([8]), margin=np.int64(4))
    np.testing.assert_array_equal(keys[0, 0, 4:12, 0], [2, 3, 0, 0, 0, 0, 0, 1])


def refusals() -> None:
    def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
        return np.zeros(shape, dtype)

    queries, keys, mask = zeros(1, 2, 4, 16), zeros(1, 2, 5, 16), zeros(1, 2, 5, dtype="bool")
    scale, numbers, blocks = {"epsilon": np.float32(0)}, {"format": ""}, {"format": "Q4_1"}
    several, ring = {"cap": np.float32(0), "choices": np.array([2])}, {"rings": np.array([0]), "margin": np.int64(4)}
    cache, fresh = zeros(1, 2, 5, 16), zeros(1, 1, 2, 3, 16)
    misfits = [
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(3, 4)), numbers),
        (few_rows.PRODUCT, (4, 3), (zeros(2, 5), zeros(3, 5)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(1, 3, 5)), numbers),
        (few_rows.PRODUCT, (4, 2, 3), (zeros(3, 2, 5), zeros(1, 3, 5)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(3, 5, dtype="float16")), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5, dtype="int32"), zeros(3, 5)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(3, 5), zeros(3, 5), zeros(1)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(3, 5), zeros(3, 5), np.int32(2)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(3, 5), np.int32(0)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 5), zeros(3, 4), zeros(3, 5), np.int32(0)), numbers),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 32), zeros(3, 20)), blocks),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 32), zeros(3, 19, dtype="uint8")), blocks),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 40), zeros(3, 25, dtype="uint8")), blocks),
        (few_rows.PRODUCT, (2, 3), (zeros(2, 32), zeros(3, 20, dtype="uint8")), {"format": "Q9_1"}),
        (few_rows.NORM, (2, 5), (zeros(2, 5), zeros(4)), scale),
        (few_rows.NORM, (2, 5), (zeros(3, 5), zeros(5)), scale),
        (few_rows.NORM, (2, 5), (zeros(2, 5), zeros()), scale),
        (few_rows.GATE, (2, 3), (zeros(2, 5),), {"activation": "silu"}),
        (few_rows.GATE, (2, 3), (zeros(1, 6),), {"activation": "silu"}),
        (few_rows.GATE, (2, 3), (zeros(2, 6),), {"activation": "tanh"}),
        (few_rows.TURN, (2, 3, 4), (zeros(2, 12), zeros(2, 2), zeros(2, 2))),
        (few_rows.ATTENTION, queries.shape, (queries, keys, keys)),
        (few_rows.ATTENTION, queries.shape, (queries,)),
        (few_rows.ATTENTION, queries.shape, (queries, keys, zeros(1, 2, 4, 16), mask)),
        (few_rows.ATTENTION, queries.shape, (queries, np.int32(2), *[keys] * 4, mask), several),
        (few_rows.ATTENTION, queries.shape, (queries, *[keys] * 4, mask), several),
        (few_rows.ATTENTION, queries.shape, (queries, np.int32(0), *[keys] * 3, mask), several),
        (few_rows.WRITE, cache.shape, (np.zeros(1, "i"), np.zeros((1, 1), "i"), fresh, cache), ring),
        (few_rows.WRITE, cache.shape, (np.zeros(1, "i"), np.zeros((1, 1), "i"), fresh, fresh, cache, cache), ring),
        (few_rows.ATTENTION, queries.shape, (queries, keys, keys, zeros(1, 3, 5, dtype="bool"))),
        (few_rows.ATTENTION, queries.shape, (queries, keys, keys, zeros(1, 2, 5))),
        (few_rows.ATTENTION, queries.shape, (queries, zeros(1, 3, 5, 16), zeros(1, 3, 5, 16), mask)),
        (few_rows.ATTENTION, queries.shape, (queries, zeros(1, 0, 5, 16), zeros(1, 0, 5, 16), mask)),
        (few_rows.ATTENTION, (1, 2, 4, 12), (zeros(1, 2, 4, 12), zeros(1, 2, 5, 12), zeros(1, 2, 5, 12), mask)),
        (few_rows.ATTENTION, queries.shape, (queries, keys, zeros(1, 2, 5, 16, dtype="float16"), mask)),
    ]
    for target, shape, operands, *attributes in misfits:
        given = attributes[0] if attributes else {"cap": np.float32(0)}
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call(target, shape, *operands, **given)


if __name__ == "__main__":
    built = dict(zip(PARTS, map(Path, sys.argv[1:]), strict=True))
    native.library = lambda name, *_: built["" if name == "kernels" else name]
    assert few_rows.ready(), "the library cannot be loaded"
    for part in PARTS[1:]:
        few_rows._load(part)
    for check in (products, norms, attentions, heads_and_gates, writes):
        check(np.random.default_rng(0))
    refusals()
    print("clean")
