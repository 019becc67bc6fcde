"""Functions that run a computation over the smallest of a few static row counts that holds the rows in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def rungs(largest: int, smallest: int = 1) -> tuple[int, ...]:
    """Return row counts to compile for: `smallest`, doubled until it reaches `largest`, and `largest` itself."""
    counts = []
    rung = smallest
    while rung < largest:
        counts.append(rung)
        rung *= 2
    return (*counts, largest)


def run_rung(needed: jax.Array, counts: Sequence[int], run: Callable[[int], Any]) -> Any:
    """Return run(n) for the smallest n of `counts` (ascending) with n >= needed; all must return the same shapes."""
    if len(counts) == 1:
        return run(counts[0])
    return jax.lax.switch(jnp.sum(needed > jnp.asarray(counts[:-1])), [lambda n=n: run(n) for n in counts])


def row_counts(counts: Sequence[int], rows: int, empty: bool = True) -> tuple[int, ...]:
    """Return 0 if rows may be `empty`, those of `counts` (ascending) that are below `rows`, and `rows` itself."""
    return (*(0,) * empty, *(count for count in counts if count < rows), rows)


def last_row(live: jax.Array) -> jax.Array:
    """Return the number of first rows on the last axis of a bool array that hold all live ones: int32.

    Survivors of a collapse stand anywhere in a cohort.
    """
    return jnp.max(jnp.where(live, jnp.arange(1, live.shape[-1] + 1), 0))


def fill(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Pad one axis of x with zeros up to `length`, so that the result of few rows has the shape of many."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, padding)
