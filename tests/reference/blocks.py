"""Random blocks of weights as GGUF files have them, and the numbers that the gguf package reads from them."""

from __future__ import annotations

import gguf
import numpy as np

from dex_jax.nn.blocks import FORMATS

SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Offsets of the float16 scales in a block, by format; all other bytes may be anything."""


def random_blocks(random: np.random.Generator, format: str, rows: int, blocks: int) -> np.ndarray:
    """Return [rows, bytes] uint8 with `blocks` blocks a row and scales of the size that models have."""
    _, size = FORMATS[format]
    found = random.integers(0, 256, (rows, blocks, size), np.uint8)
    for at in SCALES[format]:
        found[..., at : at + 2] = (0.02 * random.normal(size=(rows, blocks, 1))).astype(np.float16).view(np.uint8)
    return found.reshape(rows, blocks * size)


def dequantised(blocks: np.ndarray, format: str) -> np.ndarray:
    """Return the weights [rows, in] float32 that packed `blocks` [rows, bytes] uint8 stand for."""
    columns, size = FORMATS[format]
    if not blocks.size:
        return np.zeros((blocks.shape[0], blocks.shape[1] // size * columns), np.float32)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format])


def rounded(rows: np.ndarray) -> np.ndarray:
    """Return `rows` [R, in] float32 as products with packed weights round them, to 16 bits in blocks of 32: float64."""
    if rows.size == 0:
        return rows.astype(np.float64)
    blocks = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32))).reshape(len(rows), -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127 * 256), largest, out=np.zeros_like(largest), where=largest >= 1e-30)
    numbers = np.rint(blocks * inverse).astype(np.float64) * (largest / np.float32(127 * 256))
    return numbers.reshape(len(rows), -1)[:, : rows.shape[1]]


def assert_rounded_product(found: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> None:
    """Assert that a product of rounded rows is right to 1e-6 of the sum of magnitudes, and to less for few columns.

    Of each block float32 rounds the sum, its two factors and the total.
    """
    wide, kernel = rounded(rows), numbers.astype(np.float64).T
    tolerance = min(1e-6, (4 + rows.shape[1] / 32) * 2.0**-24)
    assert np.all(np.abs(found - wide @ kernel) <= tolerance * (np.abs(wide) @ np.abs(kernel)))
