"""Small programs that some version of JAX has compiled to wrong results, without a word."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 32_769
"""The least number of float32 rows at which jax 0.10.2 goes wrong."""


def squared_products() -> bool:
    """Whether a vmapped product of matrix and row, squared and summed, is right in all rows: jax issue 39103."""
    rows = jnp.zeros((ROWS, 3)).at[:, 0].set(jnp.arange(ROWS))
    matrix = jnp.eye(3)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    # The identity leaves the row as it is, so nothing is rounded but the square.
    return bool(np.array_equal(found, np.arange(ROWS, dtype=np.float32) ** 2))


def arctangents() -> bool:
    """Whether arctan is right at 50 and more numbers: jax issue 39352, which not every CPU shows."""
    return all(
        np.allclose(jnp.arctan(x), np.arctan(x), atol=1e-3)
        for x in (np.linspace(-8, 8, count, dtype=np.float32) for count in (50, 64, 200))
    )


CANARIES = {"39103": squared_products, "39352": arctangents}
"""jax issue -> whether this device computes what it is about."""
