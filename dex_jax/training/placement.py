"""How a frozen model, its activations and exits in training lie on a mesh with axes "data" and "tensor".

Rows are spread over "data". Matrices [..., out, in], embeddings among them, are split by their output axis over
"tensor" where it divides, so that every product is local and only its results are gathered. All else is copied
everywhere. An axis that a mesh lacks splits nothing.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dex_jax.nn.transformer import Layout, Stacked

EVERYWHERE = PartitionSpec()


def rows_spec(mesh: Mesh, axis: int = 0) -> PartitionSpec:
    """Of arrays whose rows lie along `axis`."""
    return PartitionSpec(*[None] * axis, "data" if "data" in mesh.shape else None)


def matrix_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Of a matrix [..., out, in]."""
    pieces = mesh.shape.get("tensor", 1)
    if pieces == 1 or shape[-2] % pieces:
        return EVERYWHERE
    return PartitionSpec(*[None] * (len(shape) - 2), "tensor")


def place_weights(weights: Any, layout: Layout, mesh: Mesh) -> Any:
    """The weights of a model, as LanguageModel has them, on a mesh."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        stacked = isinstance(layout, Stacked) and "layers" in jax.tree_util.keystr(path)
        matrix = leaf.ndim - (2 if stacked else 0) == 2
        return jax.device_put(leaf, NamedSharding(mesh, matrix_spec(mesh, leaf.shape) if matrix else EVERYWHERE))

    return jax.tree_util.tree_map_with_path(place, weights)
