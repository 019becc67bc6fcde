"""Exit depths x_1 < ... < x_K = L: even grids, those that users give, the nearest ones that heads are trained at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from dex_jax.errors import DexError, is_integer


def even_depths(stages: int, num_layers: int) -> tuple[int, ...]:
    """Return the even grid of DEX-1/K: x_k = ceil(k L / K)."""
    return tuple(-(-k * num_layers // stages) for k in range(1, stages + 1))


def check_depths(depths: Any, num_layers: int) -> tuple[int, ...]:
    """Return exit depths that a user gave; raise DexError unless they are whole numbers x_1 < ... < x_K = L."""
    if isinstance(depths, str) or not isinstance(depths, Sequence) or not all(map(is_integer, depths)):
        raise DexError(f"depths are whole numbers, such as (6, 12, 30), not {depths!r}")
    depths = tuple(int(x) for x in depths)
    text = ",".join(map(str, depths))
    if not depths or depths[0] < 1 or depths[-1] > num_layers:
        raise DexError(f"depths must lie between 1 and the model's {num_layers} layers, not {text or 'nothing'}")
    if any(a >= b for a, b in itertools.pairwise(depths)):
        raise DexError(f"depths must ascend without repeats, not {text}")
    if depths[-1] != num_layers:
        raise DexError(f"depths must end at the model's final layer, {num_layers}, not at {depths[-1]}")
    return depths


def nearest_depths(wanted: tuple[int, ...], trained: tuple[int, ...], source: str) -> tuple[int, ...]:
    """Return the nearest trained depth for each wanted one in turn, the deeper of two, and none twice; ascending.

    Raise DexError for fewer trained than wanted; `source` names the exits.
    """
    if len(wanted) > len(trained):
        raise DexError(
            f"the exits in {source} are trained at {len(trained)} depths, which serve at most {len(trained) + 1} "
            f"explorers, not {len(wanted) + 1}: ask for fewer"
        )
    left = set(trained)
    for depth in wanted:
        left.remove(min(left, key=lambda each: (abs(each - depth), -each)))
    return tuple(sorted({*trained} - left))
