"""Operations of layers on a CPU, in C++ (cpp/) that the machine's compiler compiles when it is first needed.

One library has what all models need, and each format of kernels has one of its own. Programs may use them if they are
traced while `ready()` is true. A row's result is the same to the last bit however many rows are beside it. Without a
compiler, with DEX_JAX_NATIVE=0, and where XLA divides a program among several devices, XLA computes instead.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.errors import DexError
from dex_jax.io.whole_files import cache_folder
from dex_jax.nn import native
from dex_jax.nn.products import ASSUMED, for_one_device

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""The dtypes that rows and kernels of a product may have."""

LANES = 16
"""The number that must divide the width of attention heads."""

NORM, PRODUCT, ATTENTION = "dex_jax_norm", "dex_jax_product", "dex_jax_attention"
TURN, GATE, WRITE = "dex_jax_turn", "dex_jax_gate", "dex_jax_write"
SOURCES = Path(__file__).with_name("cpp")
NUMBERS = {"float32": "float", "bfloat16": "BFloat16"}
"""The C++ type of a kernel that is not packed, by dtype."""

MISSING = (
    "without a C++ compiler XLA computes on dense weights, which takes several times as long: install g++ or clang, or "
    "pip install ziglang"
)
"""The line that is printed once where the C++ files cannot be compiled."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays", "number"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of several arrays, chosen while the program runs: C++ reads the chosen one in place."""

    arrays: tuple[jax.Array, ...]  # of all layers, alike
    number: jax.Array  # int32

    def __getitem__(self, index: object) -> OneOf:
        """Return all of it, as flax takes the value of a parameter with `[...]`."""
        assert index is Ellipsis
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of every array."""
        return self.arrays[0].shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of every array."""
        return self.arrays[0].dtype


@jax.custom_jvp
def few_rows_product(rows: jax.Array, kernel: jax.Array | OneOf) -> jax.Array:
    """Multiply rows [R, in] by kernel [out, in].T on a CPU, both float32 or bfloat16: [R, out] float32.

    It has a derivative where the kernel is no OneOf.
    """
    return _product(rows, kernel, "")


@few_rows_product.defjvp
def _tangent(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple:
    (rows, kernel), (rows_tangent, kernel_tangent) = primals, tangents

    def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.dot(rows, kernel.T, preferred_element_type=jnp.float32)

    return few_rows_product(rows, kernel), product(rows_tangent, kernel) + product(rows, kernel_tangent)


def tiles_product(rows: jax.Array, kernel: jax.Array | OneOf, format: str) -> jax.Array:
    """Multiply rows [R, in] by a kernel in tiles on a CPU, in whole numbers: [R, out] float32, without a derivative.

    The kernel [out, bytes] is in tiles (nn/tiles.py), in a format of GGUF files, or "int8" for codes alone. Rows are
    rounded to 16 bits in blocks of 32 columns: a number changes by up to about 2^-16 of the block's largest.
    """
    return _product(rows, kernel, format)


def _product(rows: jax.Array, kernel: jax.Array | OneOf, format: str) -> jax.Array:
    _load(format or str(kernel.dtype))
    rows = rows.astype(jnp.float32)
    shape = jax.ShapeDtypeStruct((rows.shape[0], kernel.shape[0]), jnp.float32)
    operands = (*kernel.arrays, kernel.number) if isinstance(kernel, OneOf) else (kernel,)
    return jax.ffi.ffi_call(PRODUCT, shape, vmap_method="expand_dims")(rows, *operands, format=format)


def in_cpp(cpp: Callable[..., Any], plain: Callable[..., Any], *operands: jax.Array) -> Any:
    """Return plain(*operands); on CPUs `cpp` computes the same in float32 and rounds it once.

    Results have the first operand's dtype. Only float32 and bfloat16 go to `cpp`; derivatives are those of `plain`.
    """
    if not {operand.dtype for operand in operands} <= {*DTYPES} or not ready():
        return plain(*operands)

    def rounded(*operands: jax.Array) -> Any:
        exact = cpp(*(x.astype(jnp.float32) for x in operands))
        return jax.tree.map(lambda x: _rounded(x, operands[0].dtype), exact)

    run = jax.custom_jvp(rounded)

    # With `run` in here JAX would never forget what it traced of it: its cache holds a function that holds the key.
    @run.defjvp
    def tangent(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        return rounded(*primals), jax.jvp(plain, primals, tangents)[1]

    return jax.lax.platform_dependent(*operands, cpu=run, default=plain)


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # XLA leaves out roundings to a narrower dtype and back, in some programs and not in others.
    info = jnp.finfo(dtype)
    return x if dtype == x.dtype else jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def few_rows_norm(rows: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Compute `layers.rms_norm` on a CPU: rows [..., D], scale [D] -> [..., D], all float32, without a derivative."""
    shape = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    return jax.ffi.ffi_call(NORM, shape, vmap_method="expand_dims")(rows, scale, epsilon=np.float32(eps))


def few_rows_turn(
    heads: jax.Array, cos: jax.Array, sin: jax.Array, groups: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute `rotary.turned` on a CPU, all float32, without a derivative."""
    *lead, rows, numbers = heads.shape
    shapes = ((*lead, rows, numbers // width - 2 * groups, width), *((*lead, groups, rows, width),) * 2)
    give = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    queries, keys, values = jax.ffi.ffi_call(TURN, give, vmap_method="expand_dims")(heads, cos, sin)
    return queries, keys, values


def few_rows_gate(gate_up: jax.Array, activation: str) -> jax.Array:
    """Compute `layers.gated` on a CPU, all float32, without a derivative."""
    shape = jax.ShapeDtypeStruct((*gate_up.shape[:-1], gate_up.shape[-1] // 2), jnp.float32)
    return jax.ffi.ffi_call(GATE, shape, vmap_method="expand_dims")(gate_up, activation=activation)


def few_rows_attention(queries: jax.Array, *sources: jax.Array | OneOf, cap: float | None = None) -> jax.Array:
    """Compute grouped-query attention on a CPU in float32: queries [B, R, H, d], d a multiple of LANES.

    `sources` has three arrays for each set of keys: keys [B, G, S, d] and values of that shape, all float32 or all
    bfloat16, and the mask [B, R, S] or [B, 1, S], bool; a B of 1 is for all sequences. All OneOf have the same number.
    A row that sees nothing gets zeros. With a `cap`, scores become cap tanh(score / cap). Returns [B, R, H, d] float32,
    without a derivative.
    """
    queries = queries.astype(jnp.float32)
    shape = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
    call = jax.ffi.ffi_call(ATTENTION, shape, vmap_method="expand_dims")
    numbers = [array.number for array in sources if isinstance(array, OneOf)][:1]
    arrays = [array.arrays if isinstance(array, OneOf) else (array,) for array in sources]
    about = {"choices": np.asarray([*map(len, arrays[::3])], np.int64)} if numbers else {}
    return call(queries, *numbers, *itertools.chain(*arrays), cap=np.float32(cap or 0), **about)


def write(
    caches: tuple[jax.Array, ...],
    fresh: tuple[jax.Array, ...],
    row: jax.Array,
    start: jax.Array,
    rings: list[int],
    margin: int,
) -> tuple[jax.Array, ...]:
    """Write rows into all layers' caches in place, on a CPU.

    Args:
      caches: keys of L layers, then values, [B, G, S, d] each; they are consumed.
      fresh: rows to choose from, of the caches' dtype: keys and values [L, B, G, N, d], or L of [B, G, N, d] each.
      row: [B, P] int32, the index of each row to write among the N, clipped to 0..N-1.
      start: [B] int32, the first of P consecutive positions; nothing is written where it is below 0.
      rings: the size of the ring that each layer keeps positions in, or 0.
      margin: the number of places in front of a ring, and behind it (nn/kinds.py).
    """
    shapes = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches]
    aliases = {2 + len(fresh) + i: i for i in range(len(caches))}
    call = jax.ffi.ffi_call(WRITE, shapes, input_output_aliases=aliases)
    return tuple(call(start, row, *fresh, *caches, rings=np.asarray(rings, np.int64), margin=np.int64(margin)))


def ready() -> bool:
    """Return whether a program traced now may use these functions; compile the library if needed."""
    return for_one_device() and takes_tiles()


def takes_tiles() -> bool:
    """Return whether packed weights are kept in tiles, the layout that products here take."""
    return ASSUMED.get() is None and _registered() is not None


def start_build(formats: Iterable[str]) -> None:
    """Start to build the library of all models and those of `formats`, as far as they are missing, in threads."""
    for format in ("", *sorted(formats)) if _wanted() else ():
        native.start_build(*_parts(format))


def _wanted() -> bool:
    return os.environ.get("DEX_JAX_NATIVE") != "0" and jax.default_backend() == "cpu"


def _parts(format: str, flags: tuple[str, ...] = ()) -> tuple[str, Path, tuple[str, ...]]:
    """Return (name, source, flags) of the library that all models need, or of a format of kernels."""
    kernel = f"NumbersOf<{NUMBERS[format]}>" if format in NUMBERS else f"TilesOf<{format.upper()}>"
    chosen = (f"-DDEX_JAX_FORMAT={kernel}",) if format else ()
    return format or "kernels", SOURCES / ("format.cc" if format else "kernels.cc"), (*flags, *chosen)


def library(format: str = "", flags: tuple[str, ...] = ()) -> Path:
    """Return the file of the library of all models, or of a format of kernels; errors are `native.library`'s."""
    return native.library(*_parts(format, flags))


@functools.cache
def _registered() -> ctypes.CDLL | None:
    """Return the C++ library, registered with JAX at the first call; None where XLA computes instead."""
    if not _wanted():
        return None
    try:
        compiled = native.loaded(*_parts(""))
    except (OSError, subprocess.CalledProcessError, DexError) as error:
        print(f"{MISSING} ({error})", file=sys.stderr)
        return None
    for target in (NORM, PRODUCT, ATTENTION, TURN, GATE, WRITE):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(compiled, target)), platform="cpu")
    compiled.dex_jax_load.restype = ctypes.c_char_p
    return compiled


@functools.cache
def _load(format: str) -> None:
    """Make a format of kernels, numbers or tiles, known to products, before a program that has it runs."""
    known = _registered()
    if known is None:
        return
    try:
        compiled = native.loaded(*_parts(format))
    except (OSError, subprocess.CalledProcessError) as error:
        what = f"the C++ kernels for {format} cannot be built, though others were"
        raise DexError(f"{what}: {error} (DEX_JAX_NATIVE=0 in the environment does without them)") from error
    load_as(format, ctypes.c_char.in_dll(compiled, "dex_jax_format"))


def load_as(name: str, format: Any) -> None:
    """Make a Format (cpp/format.h), a ctypes object, known to products by a name.

    Raises:
      DexError: it reads rows in another layout than they have: it was built for another CPU than what rounds them.
    """
    known = _registered()
    assert known is not None
    refusal = known.dex_jax_load(name.encode(), ctypes.byref(format))
    if refusal is not None:
        why = f"the C++ kernels for {name} do not fit the others: {refusal.decode()}"
        raise DexError(f"{why} (remove {cache_folder() / 'native'}, so that all are built for this CPU)")


def kept_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype to keep draft-only weights in: bfloat16 for float32, where C++ reads it in half the time.

    It is the same for one device and for many, which have to draft the same.
    """
    return jnp.dtype(jnp.bfloat16) if dtype == jnp.float32 and _registered() is not None else dtype


def language() -> str:
    """Name what multiplies few rows in float32 here, for reports: "C++" or "XLA"."""
    return "XLA" if _registered() is None else "C++"


def version() -> str:
    """Return `language`, or for C++ the library's name, which changes with its sources."""
    known = _registered()
    return "XLA" if known is None else Path(known._name).stem
