"""Intervals by resampling: of a figure's median over prompts. N is how many there are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

from dex_jax.errors import DexError

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A figure and where it may lie."""

    value: float  # of the items themselves
    low: float
    high: float
    items: int  # N

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratios(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """base / other item by item, NaN where either is missing or `other` is 0: a speedup where both are costs."""
    base, other = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if base.shape != other.shape:
        raise DexError(f"paired values need one of each for every item, not {base.shape} and {other.shape}")
    return np.where(other > 0, base / np.where(other > 0, other, 1), np.nan)


def bootstrap(values: np.ndarray) -> Interval:
    """The median of values [N], such as `ratios` of paired costs, and its percentile interval; NaN are left out.

    Raises:
      DexError: no items.

    Examples:
      >>> bootstrap(np.array([2.0, 2.0, 2.0])).low
      2.0
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise DexError("there is nothing to resample: no item has a value")
    # A single one cannot be drawn anew, which SciPy refuses.
    drawn = scipy.stats.bootstrap(
        (values if len(values) > 1 else np.repeat(values, 2),),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return Interval(float(np.median(values)), float(low), float(high), len(values))
