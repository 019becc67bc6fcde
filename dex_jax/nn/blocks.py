"""Unpacking of GGUF's blocks by XLA: a block's codes, and the scale and offset that make numbers of them.

Letters: n columns of a group, which share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

FORMATS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""The columns and bytes of one block, by ggml's name of the format."""


class Unpacked(NamedTuple):
    """Unpacked blocks; a number is scale * code + least."""

    codes: jax.Array  # [..., groups, n] int8 or uint8
    scale: jax.Array  # [..., groups, 1] float32
    least: jax.Array | None = None  # [..., groups, 1] float32; None for 0

    def numbers(self) -> jax.Array:
        """Compute the numbers, bit for bit as the gguf package does: float32, of the codes' shape."""
        scaled = self.scale * self.codes.astype(jnp.float32)
        return scaled if self.least is None else scaled + self.least


def unpack(part: jax.Array, format: str) -> Unpacked:
    """Unpack rows [..., bytes] uint8 of one of FORMATS; groups are those of a row, in the order of its columns."""
    _, size = FORMATS[format]
    each = _UNPACK[format](part.reshape(*part.shape[:-1], -1, size))
    return jax.tree.map(lambda x: x.reshape(*part.shape[:-1], -1, x.shape[-1]), each)


def _half(blocks: jax.Array, at: int) -> jax.Array:
    """Return the float16 at byte `at` of every block: [..., 1] float32."""
    return jax.lax.bitcast_convert_type(blocks[..., at : at + 2], jnp.float16)[..., None].astype(jnp.float32)


def _nibbles(codes: jax.Array) -> jax.Array:
    """Return the low codes of 4 bits, then the high ones: [..., n] uint8 -> [..., 2 n]."""
    return (_bits(codes[..., None, :], -2, 4) & 15).reshape(*codes.shape[:-1], -1)


def _bits(codes: jax.Array, axis: int, step: int) -> jax.Array:
    """Shift uint8 codes right by 0, `step`, 2 * `step`, ... bits along an axis of size 1."""
    shape = [1] * codes.ndim
    shape[axis] = 8 // step
    return codes >> jnp.arange(0, 8, step, dtype=jnp.uint8).reshape(shape)


def _q5_0(blocks: jax.Array) -> Unpacked:
    fifth = _bits(blocks[..., 2:6, None], -1, 1) & 1
    codes = _nibbles(blocks[..., 6:]) | fifth.reshape(*blocks.shape[:-1], 32) << 4
    return Unpacked(_less(codes, 16), _half(blocks, 0))


def _less(codes: jax.Array, zero: int) -> jax.Array:
    """Subtract `zero`, the code that stands for 0, from codes: int8."""
    return codes.astype(jnp.int8) - jnp.int8(zero)


def _k_scales(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the scale and the least number of each 32 columns: two of [..., 8, 1] float32."""
    six = blocks[..., 4:16]
    low, high, last = six[..., :4], six[..., 4:8], six[..., 8:]
    multiple = jnp.concatenate([low & 63, last & 15 | (low >> 6) << 4], axis=-1)
    less = jnp.concatenate([high & 63, last >> 4 | (high >> 6) << 4], axis=-1)
    scale, least = (_half(blocks, at) * each.astype(jnp.float32) for at, each in ((0, multiple), (2, less)))
    return scale[..., None], -least[..., None]


def _k_codes(codes: jax.Array) -> jax.Array:
    """Return the codes of 4 bits of each 32 columns: [..., 128] -> [..., 8, 32]; two groups share the same bytes."""
    lead = codes.shape[:-1]
    return _nibbles(codes.reshape(*lead, 4, 32)).reshape(*lead, 8, 32)


def _q5_k(blocks: jax.Array) -> Unpacked:
    fifth = _bits(blocks[..., None, 16:48], -2, 1) & 1
    return Unpacked(_k_codes(blocks[..., 48:]) | fifth << 4, *_k_scales(blocks))


def _q6_k(blocks: jax.Array) -> Unpacked:
    lead = blocks.shape[:-1]
    four = _nibbles(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 2, 4, 32)
    two = _bits(blocks[..., 128:192].reshape(*lead, 2, 1, 32), -2, 2) & 3
    scales = jax.lax.bitcast_convert_type(blocks[..., 192:208], jnp.int8).astype(jnp.float32)
    return Unpacked(_less((four | two << 4).reshape(*lead, 16, 16), 32), (_half(blocks, 208) * scales)[..., None])


_UNPACK: dict[str, Callable[[jax.Array], Unpacked]] = {
    "Q4_0": lambda blocks: Unpacked(_less(_nibbles(blocks[..., 2:]), 8), _half(blocks, 0)),
    "Q4_1": lambda blocks: Unpacked(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)),
    "Q5_0": _q5_0,
    "Q8_0": lambda blocks: Unpacked(jax.lax.bitcast_convert_type(blocks[..., 2:], jnp.int8), _half(blocks, 0)),
    "Q4_K": lambda blocks: Unpacked(_k_codes(blocks[..., 16:]), *_k_scales(blocks)),
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
