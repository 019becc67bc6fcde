"""Intervals by resampling: of one figure over prompts, of several at once, and of items over templates.

Letters: N items (prompts), G columns (templates or methods), R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats

from dex_jax.errors import DexError

RESAMPLES = 2000
LEVEL = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]
"""Of values [R, N, ...] over the items, axis 1: [R, ...]."""


class Interval(NamedTuple):
    """A figure and where it may lie.

    Attributes:
      value: of the items themselves.
      low, high: of the interval.
      items: N.
    """

    value: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def median(values: np.ndarray) -> np.ndarray:
    """Median over items; NaN are left out."""
    return np.nanmedian(values, axis=1)


def ratio_of_sums(values: np.ndarray) -> np.ndarray:
    """values[..., 0] over values[..., 1], each summed over items: long answers count for more; NaN over nothing."""
    sums = np.nansum(values, axis=1)
    under = sums[..., 1]
    return np.where(under > 0, sums[..., 0] / np.where(under > 0, under, 1), np.nan)


def ratios(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """base / other item by item, NaN where either is missing or `other` is 0: a speedup where both are costs."""
    base, other = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if base.shape != other.shape:
        raise DexError(f"paired values need one of each for every item, not {base.shape} and {other.shape}")
    return np.where(other > 0, base / np.where(other > 0, other, 1), np.nan)


def bootstrap(
    values: np.ndarray,
    statistic: Statistic = median,
    *,
    resamples: int = RESAMPLES,
) -> Interval:
    """A percentile interval by resampling items; pairs stay together, as an item's values are one row.

    Args:
      values: [N] such as `ratios` of paired costs, or [N, ...] for a statistic of several values an item. Rows that are
        all NaN are dropped.
      statistic: of [R, N, ...] over axis 1.
      resamples: R.

    Raises:
      DexError: no items.

    Examples:
      >>> bootstrap(np.array([2.0, 2.0, 2.0])).low
      2.0
    """
    values = _kept(values)
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    low, high = np.quantile(_resampled(values, statistic, resamples, 0), tails)
    return Interval(float(statistic(values[None])[0]), float(low), float(high), len(values))


def simultaneous(
    values: np.ndarray,
    statistic: Statistic = median,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """An interval for each column of values [N, G], so wide that all of them hold together with probability LEVEL.

    By the largest deviation over columns, each in units of its own spread over resamples (max-t); items are resampled
    with their values of every column. Where a column does not vary, its interval is its value. With few items they
    hold less often than they say, as resamples know nothing of what the items leave out: give 100 or more.

    Raises:
      DexError: no items.
    """
    values = _kept(values)
    found = statistic(values[None])[0]
    drawn = _resampled(values, statistic, resamples, seed)
    spread = np.std(drawn, axis=0)
    scaled = np.abs(drawn - found) / np.where(spread > 0, spread, np.inf)
    width = np.quantile(np.max(scaled, axis=1), LEVEL) * spread
    return [
        Interval(float(value), float(value - half), float(value + half), len(values))
        for value, half in zip(found, width, strict=True)
    ]


def _kept(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    kept = values[~np.isnan(values.reshape(len(values), -1)).all(axis=1)] if len(values) else values
    if not len(kept):
        raise DexError("there is nothing to resample: no item has a value")
    return kept


def _resampled(values: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    """[R, ...], the statistic of R draws of N items with replacement."""
    if len(values) == 1:
        return statistic(values[None])

    def of(chosen: np.ndarray, axis: int) -> np.ndarray:
        found = statistic(values[np.atleast_2d(chosen).astype(int)])
        return np.moveaxis(found, 0, -1) if chosen.ndim > 1 else found[0]

    drawn = scipy.stats.bootstrap(
        (np.arange(len(values)),),
        of,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, int(4e6) // max(values.size, 1)),  # parts that stay small
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return np.moveaxis(drawn.bootstrap_distribution, -1, 0)
