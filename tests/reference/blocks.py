"""Random blocks of weights as GGUF files have them, and what the gguf package makes of them."""

from __future__ import annotations

import gguf
import numpy as np

from dex_jax.nn.blocks import FORMATS

SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Bytes of a block at which there is a float16; all others may be anything."""


def random_blocks(random: np.random.Generator, format: str, rows: int, blocks: int) -> np.ndarray:
    """[rows, bytes] uint8 of `blocks` blocks each, whose scales are of a size with those of models."""
    _, size = FORMATS[format]
    found = random.integers(0, 256, (rows, blocks, size), np.uint8)
    for at in SCALES[format]:
        found[..., at : at + 2] = (0.02 * random.normal(size=(rows, blocks, 1))).astype(np.float16).view(np.uint8)
    return found.reshape(rows, blocks * size)


def dequantised(blocks: np.ndarray, format: str) -> np.ndarray:
    """[rows, bytes] uint8 -> [rows, in] float32."""
    columns, size = FORMATS[format]
    if not blocks.size:
        return np.zeros((blocks.shape[0], blocks.shape[1] // size * columns), np.float32)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format])


def rounded(rows: np.ndarray) -> np.ndarray:
    """Rows [R, in] float32 as products with packed weights take them: 16 bits in blocks of 32, [R, in] float64."""
    if rows.size == 0:
        return rows.astype(np.float64)
    blocks = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32))).reshape(len(rows), -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127 * 256), largest, out=np.zeros_like(largest), where=largest >= 1e-30)
    numbers = np.rint(blocks * inverse).astype(np.float64) * (largest / np.float32(127 * 256))
    return numbers.reshape(len(rows), -1)[:, : rows.shape[1]]


def assert_rounded_product(found: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> None:
    """Within 1e-6 of the sum of magnitudes."""
    wide, kernel = rounded(rows), numbers.astype(np.float64).T
    assert np.all(np.abs(found - wide @ kernel) <= 1e-6 * (np.abs(wide) @ np.abs(kernel)))
