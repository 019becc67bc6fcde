"""Statistics over items and templates once more, slowly: plain loops, one resample at a time."""

from __future__ import annotations

import statistics

import numpy as np


def ratio(base: list[list[float]], other: list[list[float]], items: list[int], template: int) -> float:
    """Sum of `base` over sum of `other` over some items (repeats count), in one template."""
    both = [(base[i][template], other[i][template]) for i in items]
    both = [(a, b) for a, b in both if a == a and b == b]
    return sum(a for a, _ in both) / sum(b for _, b in both)


def relative(base, other, items: list[int]) -> list[float]:
    """Each template's ratio over the median of all."""
    each = [ratio(base, other, items, t) for t in range(len(base[0]))]
    middle = statistics.median(each)
    return [value / middle for value in each]


def over_best(dex, rivals, items: list[int]) -> list[float]:
    """The cheapest rival over DEX, in each template."""
    return [min(ratio(rival, dex, items, t) for rival in rivals) for t in range(len(dex[0]))]


def lowest_bound(figures, count: int, resamples: int, level: float, seed: int) -> float:
    """The lowest of simultaneous bounds by the largest deviation, each template's in units of its own spread.

    figures: items -> one figure a template.
    """
    random = np.random.default_rng(seed)
    found = figures(list(range(count)))
    drawn = [figures(random.integers(0, count, count).tolist()) for _ in range(resamples)]
    spreads = [statistics.pstdev(each[t] for each in drawn) for t in range(len(found))]
    largest = sorted(
        max(abs(each[t] - found[t]) / spreads[t] for t in range(len(found)) if spreads[t] > 0) for each in drawn
    )
    place = level * (resamples - 1)
    low, high = largest[int(place)], largest[min(int(place) + 1, resamples - 1)]
    width = low + (high - low) * (place - int(place))
    return min(value - width * spread for value, spread in zip(found, spreads, strict=True))
