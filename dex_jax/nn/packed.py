"""Packed weights, which stay in memory as they are stored: in blocks of 4 to 8 bits.

On CPUs they lie in tiles, and products with them are computed in whole numbers (nn/cpp/tiles.h): rows are rounded to 16
bits. Elsewhere they are unpacked inside the product.

Letters: R rows, in and out the widths of a product, V rows of a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.nn import few_rows
from dex_jax.nn.blocks import FORMATS, unpack
from dex_jax.nn.planes import PLANES, Planes, blank_planes, in_planes
from dex_jax.nn.products import FEWEST, gpu_capability, rows_times_kernel, sums_over_kernel
from dex_jax.nn.sharding import nbytes
from dex_jax.nn.tiles import in_tiles, out_of_tiles, rows_at

INT8 = "int8"
"""The format with 8 bits for each weight and one scale for each output."""

_SUMMED_UP = 4096
"""Number of a kernel's rows that are summed over at once: XLA holds in memory what it unpacks of more."""

_AT_ONCE = 1 << 20
"""Number of weights that are rounded to 8 bits at once."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "scales"], meta_fields=["formats", "tiles"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A kernel [out, in] with packed rows; those of a fused kernel may be of several formats."""

    parts: tuple[Any, ...]  # for each run of one format's rows uint8 [..., rows, bytes], int8 [..., rows, in] or Planes
    scales: tuple[Any, ...]  # for each run: float32 [..., rows], the factors of its products; None but for INT8
    formats: tuple[str, ...]  # for each run: a key of FORMATS, one with PLANES behind it, or INT8
    tiles: bool = False  # whether each run lies in tiles (nn/tiles.py)

    def __getitem__(self, index: Any) -> Packed:
        """Return the rows at `index` [V'], packed, of a kernel of one format; itself for `...`, as flax takes it."""
        if index is Ellipsis:
            return self
        (part,), (scale,), (format,) = self.parts, self.scales, self.formats
        if isinstance(part, Planes):
            rows = part.take(index)
        else:
            rows = in_tiles(rows_at(part, jnp.asarray(index), format), format) if self.tiles else part[index]
        return Packed((rows,), (None if scale is None else scale[index],), self.formats, self.tiles)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked kernel, [..., out, in]."""
        first = self.parts[0]
        width = first.shape[-1]
        if self.formats[0] in FORMATS:
            columns, size = FORMATS[self.formats[0]]
            width = width // size * columns
        return (*first.shape[:-2], sum(part.shape[-2] for part in self.parts), width)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all arrays."""
        return nbytes(self)

    def product(self, rows: jax.Array) -> jax.Array:
        """Multiply rows [R, in] by kernel.T: [R, out] float32."""
        each = zip(self.parts, self.scales, self.formats, strict=True)
        return jnp.concatenate([_product(rows, *part, self.tiles) for part in each], axis=-1)

    def dense(self) -> jax.Array:
        """Unpack the kernel: float32 [..., out, in]."""
        each = zip(self.parts, self.scales, self.formats, strict=True)
        return jnp.concatenate([_dense(_as_stored(part, f, self.tiles), scale, f) for part, scale, f in each], axis=-2)


def blank_kernel(shape: tuple[int, ...], runs: tuple[tuple[str, int], ...]) -> Packed:
    """Return zeros in the place of a kernel [..., out, in] with the runs of rows (format, rows)."""
    lead, width = shape[:-2], shape[-1]

    def part(format: str, rows: int) -> Any:
        if format.endswith(PLANES):
            return blank_planes((rows, width), format.removesuffix(PLANES))
        if format == INT8:
            return jnp.zeros((*lead, rows, width), jnp.int8)
        columns, size = FORMATS[format]
        return jnp.zeros((*lead, rows, width // columns * size), jnp.uint8)

    scales = (jnp.zeros((*lead, rows), jnp.float32) if format == INT8 else None for format, rows in runs)
    formats = tuple(format for format, _ in runs)
    return Packed(tuple(part(*run) for run in runs), tuple(scales), formats, _in_tiles_here(formats))


def _in_tiles_here(formats: tuple[str, ...]) -> bool:
    return few_rows.takes_tiles() and not any(format.endswith(PLANES) for format in formats)


@functools.cache
def kernel_bytes(shape: tuple[int, ...], runs: tuple[tuple[str, int], ...]) -> int:
    """Return the bytes of a kernel [out, in] with the runs of rows (format, rows)."""
    return nbytes(jax.eval_shape(lambda: blank_kernel(shape, runs)))


def to_int8(kernel: np.ndarray) -> Packed:
    """Round a kernel [out, in] to 8 bits, with a scale for each output from its largest weight; arrays are NumPy's.

    It takes a few rows at a time, as the largest kernels take much of a model's memory.
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
    """Join blocks [rows, bytes], one above the other, to the packed kernel with the runs of rows (format, rows)."""
    parts: list[Any] = []
    left = list(blocks)
    for format, rows in runs:
        own = [left.pop(0)]
        while sum(map(len, own)) < rows:
            own.append(left.pop(0))
        part = own[0] if len(own) == 1 else np.concatenate(own)
        parts.append(in_planes(part, format.removesuffix(PLANES)) if format.endswith(PLANES) else part)
    return Packed(tuple(parts), (None,) * len(parts), tuple(format for format, _ in runs))


def as_products_read(kernel: Packed) -> Packed:
    """Put a kernel of NumPy arrays that lie as in a file into tiles, where products on this machine read tiles."""
    if kernel.tiles or not _in_tiles_here(kernel.formats):
        return kernel
    parts = (in_tiles(part, format) for part, format in zip(kernel.parts, kernel.formats, strict=True))
    return dataclasses.replace(kernel, parts=tuple(parts), tiles=True)


def take_rows(kernel: jax.Array | Packed, index: jax.Array) -> jax.Array:
    """Return the rows at `index` [...] of a kernel [V, in]: [..., in]; those of a packed kernel are float32."""
    if not isinstance(kernel, Packed):
        return jnp.take(kernel, index, axis=0)
    (part,), (scale,), (format,) = kernel.parts, kernel.scales, kernel.formats
    if isinstance(part, Planes):
        return part.rows_at(index)
    rows = rows_at(part, index, format) if kernel.tiles else _rows_at(part, index)
    return _dense(rows, None if scale is None else scale[index], format)


def _rows_at(part: jax.Array, index: jax.Array) -> jax.Array:
    if index.size != 1:
        return part[index]

    def twice(part: jax.Array, index: jax.Array) -> jax.Array:
        return part[jnp.tile(index.reshape(1), 2)][0].reshape(*index.shape, -1)

    # A TPU reads one row of bytes out of a copy of the whole kernel, which it makes in every step. Two rows are read
    # where they lie.
    return jax.lax.platform_dependent(part, index, tpu=twice, default=lambda part, index: part[index])


def _product(rows: jax.Array, part: Any, scale: jax.Array | None, format: str, tiles: bool) -> jax.Array:
    if isinstance(part, Planes):
        return part.product(rows)

    def by_xla(rows: jax.Array, part: jax.Array) -> jax.Array:
        return _product_by_xla(rows, _as_stored(part, format, tiles), format)

    if tiles and rows.dtype in few_rows.DTYPES and few_rows.ready():
        in_cpp = functools.partial(few_rows.tiles_product, format=format)
        one_of = isinstance(part, few_rows.OneOf)
        out = in_cpp(rows, part) if one_of else jax.lax.platform_dependent(rows, part, cpu=in_cpp, default=by_xla)
    else:
        out = by_xla(rows, part)
    return out if scale is None else out * scale[None]


def _as_stored(part: Any, format: str, tiles: bool) -> Any:
    return out_of_tiles(part, format) if tiles and not isinstance(part, Planes) else part


def _product_by_xla(rows: jax.Array, part: jax.Array, format: str) -> jax.Array:
    # For products XLA makes a dense copy of blocks, and on older GPUs of int8; for sums it reads them in place.
    if rows.shape[0] <= FEWEST and (gpu_capability() if format != INT8 else 0 < gpu_capability() < 8):
        step = part.shape[0] if format == INT8 else _SUMMED_UP
        some = (part[first : first + step] for first in range(0, part.shape[0], step))
        return jnp.concatenate([sums_over_kernel(rows, _dense(each, None, format)) for each in some], axis=-1)
    return rows_times_kernel(rows, part if format == INT8 else _dense(part, None, format))


def _dense(part: Any, scale: jax.Array | None, format: str) -> jax.Array:
    """Unpack rows of one format to float32 [..., in], to the last bit as the gguf package does."""
    if isinstance(part, Planes):
        return part.dense()
    if format == INT8:
        wide = part.astype(jnp.float32)
        return wide if scale is None else wide * scale[..., None]
    return unpack(part, format).numbers().reshape(*part.shape[:-1], -1)
