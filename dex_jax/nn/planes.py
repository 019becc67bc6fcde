"""GGUF's blocks in a layout for TPUs: codes in planes, which XLA widens on their way into the matrix units.

From blocks in a file's layout, XLA on a TPU makes a dense copy for each product, and slowly. Here the codes at one
place of all groups form a plane, and the scales form another. A number is computed from what lies at one place in two
or three planes, inside the product.

Letters: R rows, in and out the widths of a product, n columns of a group.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.nn.blocks import FORMATS, Unpacked, unpack
from dex_jax.nn.products import dot, filled_up

PLANES = " in planes"
"""The suffix of the name of a format in planes."""

_FOUR_BITS = {"Q4_0", "Q4_1", "Q4_K"}

_LANES = 128
"""Number of values that lie side by side in a TPU's registers."""

_AT_ONCE = 1 << 24
"""Number of weights that are unpacked at once: a TPU's compiler holds 8 bytes of each."""


class Planes(Unpacked):
    """A kernel [out, in] in planes: codes [n, in / n, out], with 4 bits as int4 or uint4, the rest [1, in / n, out]."""

    @property
    def shape(self) -> tuple[int, int]:
        """The kernel's shape, [out, in]."""
        n, groups, out = self.codes.shape
        return out, n * groups

    def dense(self) -> jax.Array:
        """Unpack the numbers, to the last bit as the gguf package does: float32 [out, in]."""
        return self.numbers().transpose(2, 1, 0).reshape(self.shape)

    def product(self, rows: jax.Array) -> jax.Array:
        """Multiply rows [R, in] by kernel.T in the rows' dtype: [R, out] float32."""
        n, groups, _ = self.codes.shape
        columns = filled_up(rows).reshape(-1, groups, n).transpose(0, 2, 1)
        return dot(columns, self.numbers().astype(rows.dtype), ((1, 2), (0, 1)))[: rows.shape[0]]

    def take(self, index: jax.Array | np.ndarray) -> Planes:
        """Return the rows at `index` [V'], in planes."""
        return jax.tree.map(lambda plane: plane[..., index], self)

    def rows_at(self, index: jax.Array) -> jax.Array:
        """Unpack the rows at `index` [...]: float32 [..., in].

        Each is picked out of the lanes around it: to gather lanes a TPU would copy all planes.
        """
        width, out = min(_LANES, self.codes.shape[-1]), self.codes.shape[-1]

        def one(at: jax.Array) -> jax.Array:
            first = jnp.minimum(at // width * width, out - width)
            beside = jax.tree.map(lambda plane: jax.lax.dynamic_slice_in_dim(plane, first, width, -1), self)
            picked = jnp.where(jnp.arange(width) == at - first, beside.numbers(), 0)
            return jnp.sum(picked, axis=-1).T.reshape(-1)

        return jax.lax.map(one, index.reshape(-1)).reshape(*index.shape, -1)


def blank_planes(shape: tuple[int, ...], format: str) -> Planes:
    """Return zeros in the place of a kernel [out, in] in a format, one of FORMATS."""
    out, width = shape
    columns, size = FORMATS[format]
    found = jax.eval_shape(lambda: _planes(jnp.zeros((out, width // columns * size), jnp.uint8), format))
    return jax.tree.map(lambda plane: jnp.zeros(plane.shape, plane.dtype), found)


def in_planes(blocks: np.ndarray, format: str) -> Planes:
    """Convert rows [out, bytes] uint8 of one of FORMATS to planes on the default device, some of them at a time."""
    columns, size = FORMATS[format]
    step = max(1, _AT_ONCE // (blocks.shape[1] // size * columns))
    parts = [_planes(blocks[first : first + step], format) for first in range(0, len(blocks), step)]
    return jax.tree.map(lambda *each: jnp.concatenate(each, axis=-1), *parts)


@functools.partial(jax.jit, static_argnums=1)
def _split(blocks: jax.Array, format: str) -> Unpacked:
    return jax.tree.map(lambda x: x.transpose(2, 1, 0), unpack(blocks, format))


def _planes(blocks: jax.Array | np.ndarray, format: str) -> Planes:
    codes, scale, least = _split(blocks, format)
    # This is a program of its own: jaxlib 0.7.2 aborts on CPUs where one returns numbers of 4 bits beside others.
    if format in _FOUR_BITS:
        codes = codes.astype(jnp.int4 if codes.dtype == jnp.int8 else jnp.uint4)
    return Planes(codes, scale, least)
