"""Running a function over the smallest of a few static row counts that holds the rows in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def rungs(largest: int, smallest: int = 1) -> tuple[int, ...]:
    """Row counts to compile for: powers of two from `smallest` up to `largest`, and `largest` itself."""
    counts = []
    rung = smallest
    while rung < largest:
        counts.append(rung)
        rung *= 2
    return (*counts, largest)


def climb(needed: jax.Array, counts: Sequence[int], run: Callable[[int], Any]) -> Any:
    """run(n) for the smallest n of `counts` (ascending) with n >= needed; all must return the same shapes."""
    index = jnp.sum(needed > jnp.asarray(counts[:-1]))
    return choose_rung(index, counts, run)


def fill(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Fills one axis of x with zeros up to `length`, so that what ran over few rows has the shape of many."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, padding)


def choose_rung(index: jax.Array, counts: Sequence[int], run: Callable[[int], Any]) -> Any:
    """run(counts[index]); all must return the same shapes."""
    if len(counts) == 1:
        return run(counts[0])
    return jax.lax.switch(index, [lambda n=n: run(n) for n in counts])
