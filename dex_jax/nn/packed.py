"""Weights as they are stored: blocks of 4 to 8 bits, which stay packed in memory and are taken to pieces on the way.

Letters: R rows, in and out the widths of a product, V rows of a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.nn import few_rows
from dex_jax.nn.products import FEWEST, gpu_capability, rows_times_kernel, sums_over_kernel

FORMATS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""ggml's name of a format -> columns and bytes of one of its blocks."""

INT8 = "int8"
"""The format of 8 bits a weight and one scale for each output."""

_SUMMED_UP = 8192
"""Rows of blocks that are summed up at once: XLA holds what it has unpacked of more."""

_AT_ONCE = 1 << 20
"""Weights that are rounded to 8 bits at once."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "scales"], meta_fields=["formats"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A kernel [out, in] whose rows are packed; those of a fused kernel may be of several formats.

    Attributes:
      parts: of each run of rows in one format, uint8 [..., rows, bytes], and of INT8 int8 [..., rows, in].
      scales: of each run float32 [..., rows], by which products are multiplied; None but for INT8.
      formats: of each run, a key of FORMATS or INT8.
    """

    parts: tuple[Any, ...]
    scales: tuple[Any, ...]
    formats: tuple[str, ...]

    def __getitem__(self, index: object) -> Packed:
        """Every array at an index of its leading axes, which a stacked kernel has."""
        return self if index is Ellipsis else jax.tree.map(lambda array: array[index], self)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in], as of the kernel that this stands for."""
        first = self.parts[0]
        return (*first.shape[:-2], sum(part.shape[-2] for part in self.parts), _columns(first, self.formats[0]))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def product(self, rows: jax.Array, whole: bool = True) -> jax.Array:
        """rows [R, in] @ kernel.T: [R, out] float32; `whole` as of `layers.linear`."""
        each = zip(self.parts, self.scales, self.formats, strict=True)
        outs = [_product(rows, *part, whole) for part in each]
        return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=-1)

    def take(self, index: jax.Array) -> Packed:
        """The rows at `index`, an array of any shape [...]: the kernel [..., in] of one format, packed."""
        (part,), (scale,) = self.parts, self.scales
        return Packed((_rows_at(part, index),), (None if scale is None else scale[index],), self.formats)

    def dense(self) -> jax.Array:
        """The numbers that this stands for, float32 [..., out, in]."""
        each = zip(self.parts, self.scales, self.formats, strict=True)
        runs = [_dense(*part) for part in each]
        return runs[0] if len(runs) == 1 else jnp.concatenate(runs, axis=-2)


def blank_kernel(shape: tuple[int, ...], runs: tuple[tuple[str, int], ...]) -> Packed:
    """Zeros in the place of a kernel [..., out, in] whose runs of rows are (format, rows)."""
    lead, width = shape[:-2], shape[-1]
    parts = [jnp.zeros((*lead, rows, _row_bytes(format, width)), _dtype(format)) for format, rows in runs]
    scales = [jnp.zeros((*lead, rows), jnp.float32) if format == INT8 else None for format, rows in runs]
    return Packed(tuple(parts), tuple(scales), tuple(format for format, _ in runs))


def kernel_bytes(shape: tuple[int, ...], runs: tuple[tuple[str, int], ...]) -> int:
    """Bytes of a kernel [out, in] whose runs of rows are (format, rows)."""
    return sum(rows * (_row_bytes(format, shape[-1]) + (4 if format == INT8 else 0)) for format, rows in runs)


def to_int8(kernel: np.ndarray) -> Packed:
    """A kernel [out, in] in 8 bits, with the scale of each output that its largest weight needs; arrays are NumPy's.

    It is worked through a few rows at a time, as the largest kernels take much of a model's memory.
    """
    values, scales = np.empty(kernel.shape, np.int8), np.empty(kernel.shape[:1], np.float32)
    step = max(1, _AT_ONCE // kernel.shape[1])
    for first in range(0, len(kernel), step):
        wide = np.array(kernel[first : first + step], np.float32)
        scale = np.abs(wide).max(axis=1) / np.float32(127)
        wide *= np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)[:, None]
        values[first : first + step], scales[first : first + step] = np.rint(wide, out=wide), scale
    return Packed((values,), (scales,), (INT8,))


def joined(blocks: list[np.ndarray], runs: tuple[tuple[str, int], ...]) -> Packed:
    """The kernel of blocks [rows, bytes] one above the other, whose runs of rows are (format, rows)."""
    parts: list[Any] = []
    left = list(blocks)
    for _, rows in runs:
        own = [left.pop(0)]
        while sum(map(len, own)) < rows:
            own.append(left.pop(0))
        parts.append(own[0] if len(own) == 1 else np.concatenate(own))
    return Packed(tuple(parts), (None,) * len(parts), tuple(format for format, _ in runs))


def take_rows(kernel: jax.Array | Packed, index: jax.Array) -> jax.Array:
    """Rows of a kernel [V, in], packed or not: at `index` [...], [..., in]; packed ones come out in float32."""
    if isinstance(kernel, Packed):
        return kernel.take(index).dense()
    return jnp.take(kernel, index, axis=0)


def _rows_at(part: jax.Array, index: jax.Array) -> jax.Array:
    if index.size != 1:
        return part[index]

    def twice(part: jax.Array, index: jax.Array) -> jax.Array:
        return part[jnp.tile(index.reshape(1), 2)][0].reshape(*index.shape, -1)

    # A TPU reads one row of bytes out of a copy of the whole kernel, which it makes in every step. Two rows are read
    # where they lie.
    return jax.lax.platform_dependent(part, index, tpu=twice, default=lambda part, index: part[index])


def _row_bytes(format: str, width: int) -> int:
    if format == INT8:
        return width
    columns, size = FORMATS[format]
    return width // columns * size


def _dtype(format: str) -> jnp.dtype:
    return jnp.dtype(jnp.int8 if format == INT8 else jnp.uint8)


def _columns(part: jax.Array, format: str) -> int:
    if format == INT8:
        return part.shape[-1]
    columns, size = FORMATS[format]
    return part.shape[-1] // size * columns


def _product(rows: jax.Array, part: jax.Array, scale: jax.Array | None, format: str, whole: bool) -> jax.Array:
    by_xla = functools.partial(_product_by_xla, format=format)
    if whole and rows.dtype in few_rows.DTYPES and few_rows.ready():
        in_cpp = functools.partial(few_rows.packed_product, format="" if format == INT8 else format)
        one_of = isinstance(part, few_rows.OneOf)
        out = in_cpp(rows, part) if one_of else jax.lax.platform_dependent(rows, part, cpu=in_cpp, default=by_xla)
    else:
        out = by_xla(rows, part)
    return out if scale is None else out * scale[None]


def _product_by_xla(rows: jax.Array, part: jax.Array, format: str) -> jax.Array:
    # For products XLA makes a dense copy of blocks, and on older GPUs of int8; for sums it reads them where they lie.
    if rows.shape[0] <= FEWEST and (gpu_capability() if format != INT8 else 0 < gpu_capability() < 8):
        step = part.shape[0] if format == INT8 else _SUMMED_UP
        pieces = (part[first : first + step] for first in range(0, part.shape[0], step))
        return jnp.concatenate([sums_over_kernel(rows, _dense(piece, None, format)) for piece in pieces], axis=-1)
    return rows_times_kernel(rows, part if format == INT8 else _dense(part, None, format))


def _dense(part: jax.Array, scale: jax.Array | None, format: str) -> jax.Array:
    """Rows of one format as float32 [..., in], to the last bit as the gguf package has them."""
    if format == INT8:
        wide = part.astype(jnp.float32)
        return wide if scale is None else wide * scale[..., None]
    _, size = FORMATS[format]
    blocks = part.reshape(*part.shape[:-1], -1, size)
    return _UNPACK[format](blocks).reshape(*part.shape[:-1], -1)


def _half(blocks: jax.Array, at: int) -> jax.Array:
    """The float16 at a byte of every block, [..., 1] float32."""
    return jax.lax.bitcast_convert_type(blocks[..., at : at + 2], jnp.float16)[..., None].astype(jnp.float32)


def _nibbles(codes: jax.Array) -> jax.Array:
    """The low codes of 4 bits, then the high ones: [..., n] uint8 -> [..., 2 n]."""
    return (_bits(codes[..., None, :], -2, 4) & 15).reshape(*codes.shape[:-1], -1)


def _bits(codes: jax.Array, axis: int, step: int) -> jax.Array:
    """uint8 codes moved right by 0, `step`, 2 * `step`, ... bits along an axis of size 1."""
    shape = [1] * codes.ndim
    shape[axis] = 8 // step
    return codes >> jnp.arange(0, 8, step, dtype=jnp.uint8).reshape(shape)


def _q4_0(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]).astype(jnp.float32) - 8)


def _q4_1(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:]).astype(jnp.float32) + _half(blocks, 2)


def _q5_0(blocks: jax.Array) -> jax.Array:
    fifth = _bits(blocks[..., 2:6, None], -1, 1) & 1
    codes = _nibbles(blocks[..., 6:]) | fifth.reshape(*blocks.shape[:-1], 32) << 4
    return _half(blocks, 0) * (codes.astype(jnp.float32) - 16)


def _q8_0(blocks: jax.Array) -> jax.Array:
    codes = jax.lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
    return _half(blocks, 0) * codes.astype(jnp.float32)


def _k_scales(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale and the least value of each 32 columns, two of [..., 8, 1] float32."""
    six = blocks[..., 4:16]
    low, high, last = six[..., :4], six[..., 4:8], six[..., 8:]
    multiple = jnp.concatenate([low & 63, last & 15 | (low >> 6) << 4], axis=-1)
    less = jnp.concatenate([high & 63, last >> 4 | (high >> 6) << 4], axis=-1)
    scale, least = (_half(blocks, at) * each.astype(jnp.float32) for at, each in ((0, multiple), (2, less)))
    return scale[..., None], least[..., None]


def _k_codes(codes: jax.Array) -> jax.Array:
    """The codes of 4 bits of each 32 columns: [..., 128] -> [..., 8, 32]; two groups have the same bytes."""
    lead = codes.shape[:-1]
    return _nibbles(codes.reshape(*lead, 4, 32)).reshape(*lead, 8, 32)


def _q4_k(blocks: jax.Array) -> jax.Array:
    scale, least = _k_scales(blocks)
    return scale * _k_codes(blocks[..., 16:]).astype(jnp.float32) - least


def _q5_k(blocks: jax.Array) -> jax.Array:
    scale, least = _k_scales(blocks)
    fifth = _bits(blocks[..., None, 16:48], -2, 1) & 1
    return scale * (_k_codes(blocks[..., 48:]) | fifth << 4).astype(jnp.float32) - least


def _q6_k(blocks: jax.Array) -> jax.Array:
    lead = blocks.shape[:-1]
    four = _nibbles(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 2, 4, 32)
    two = _bits(blocks[..., 128:192].reshape(*lead, 2, 1, 32), -2, 2) & 3
    codes = (four | two << 4).reshape(*lead, 16, 16).astype(jnp.float32) - 32
    scales = jax.lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8).astype(jnp.float32)
    return (_half(blocks, 208) * scales)[..., None] * codes


_UNPACK: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
