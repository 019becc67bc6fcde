"""What a decoding took: ticks, from which exit gave each token, and the speedup that they stand for."""

from __future__ import annotations

import numpy as np


def ticks_of(exits: np.ndarray, length: int, stages: int) -> int:
    """Ticks that a sequence of `length` tokens took: K + sum(exits[1 : n - 1]), 0 for one token.

    Examples:
      >>> ticks_of(np.array([-1, 2, 5, 1]), 4, stages=5)
      12
    """
    return 0 if length < 2 else stages + int(exits[1 : length - 1].sum())


def depth_side_speedup(ticks: np.ndarray, lengths: np.ndarray, stages: int) -> np.ndarray:
    """K (n - 1) / ticks for each sequence, NaN where n = 1."""
    ticks = np.asarray(ticks, np.float64)
    return np.where(lengths > 1, stages * (lengths - 1) / np.where(ticks > 0, ticks, 1), np.nan)
