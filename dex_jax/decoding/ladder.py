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
    if len(counts) == 1:
        return run(counts[0])
    return jax.lax.switch(jnp.sum(needed > jnp.asarray(counts[:-1])), [lambda n=n: run(n) for n in counts])


def row_counts(counts: Sequence[int], rows: int, empty: bool = True) -> tuple[int, ...]:
    """None, where it may be `empty`, those of `counts` (ascending) that are less than all `rows`, and all of them."""
    return (*(0,) * empty, *(count for count in counts if count < rows), rows)


def last_row(live: jax.Array) -> jax.Array:
    """Return the number of first rows on the last axis of a bool array that hold all live ones: int32.

    Survivors of a collapse stand anywhere in a cohort.
    """
    return jnp.max(jnp.where(live, jnp.arange(1, live.shape[-1] + 1), 0))


def fill(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Fills one axis of x with zeros up to `length`, so that what ran over few rows has the shape of many."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, padding)
