"""The split of a transformer into weights, which jitted programs take, and the module that they put around them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import ModelConfig
from dex_jax.nn.kinds import KindTable
from dex_jax.nn.layers import names_in
from dex_jax.nn.packed import Packed, blank_kernel, kernel_bytes
from dex_jax.nn.products import compiled_for
from dex_jax.nn.transformer import Staged, Transformer, parameter_shapes


def merge_model(
    config: ModelConfig,
    weights: Any,
    tensor_axis: str | None = None,
    vocabulary_axis: str | None = None,
    kinds: KindTable | None = None,
    layout: Staged | None = None,
) -> Transformer:
    """Build the module around `weights`, under a trace or not; the other arguments are those of Transformer."""
    return nnx.merge(_graph_of(config, layout, tensor_axis, vocabulary_axis, kinds), weights)


@functools.lru_cache(maxsize=64)
def _graph_of(config: ModelConfig, *about: Any) -> Any:
    """Return the nnx graph definition of a transformer, without any array."""
    made = nnx.eval_shape(lambda: Transformer(config, lambda name, shape, kind: jnp.zeros(shape), *about))
    return nnx.split(made)[0]


def with_wide_scales(weights: Any) -> Any:
    """Return weights for a loop: on TPUs the scales of layers' norms become float32.

    Norms are computed in float32, and a TPU would widen each scale by a program of its own, in every step.
    """
    if compiled_for().platform != "tpu":
        return weights

    def wide(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = names_in(path)
        return leaf.astype(jnp.float32) if "layers" in names and any(name.endswith("norm") for name in names) else leaf

    return jax.tree_util.tree_map_with_path(wide, weights)


Packing = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
"""The kernels that stay packed: the canonical name and the runs of rows, (format, rows), of each; () for none."""


def blank_weight(name: str, shape: tuple[int, ...], dtype: jnp.dtype, packing: Packing) -> jax.Array | Packed:
    """Return zeros in the place of a parameter, in `dtype` or as `packing` says."""
    # All layers that share an array, as on a mesh those of all stages do, are packed alike.
    found = dict(packing).get(name.replace("*", ""))
    return jnp.zeros(shape, dtype) if found is None else blank_kernel(shape, found)


def abstract_weights(config: ModelConfig, dtype: jnp.dtype, packing: Packing = (), layout: Staged | None = None) -> Any:
    """Return the shapes of weights as jax.ShapeDtypeStruct, to compile or to plan without loading any."""

    def blank(name: str, shape: tuple[int, ...], kind: str) -> jax.Array | Packed:
        return blank_weight(name, shape, dtype, packing)

    # flax's own eval_shape would, within a user's jax.set_mesh, ask packed kernels for their dtype.
    return jax.eval_shape(lambda: nnx.state(Transformer(config, blank, layout)))


def canonical_weights(config: ModelConfig, weights: Any) -> dict[str, np.ndarray]:
    """Return weights of one device as dense arrays on the host, by canonical name ("embed", "layers.0.qkv", ...)."""
    model = merge_model(config, weights)

    def read(name: str) -> np.ndarray:
        owner, _, field = name.rpartition(".")
        module = model.layers[int(owner.split(".")[1])] if owner else model
        found = getattr(module, field)[...]
        return np.asarray(found.dense() if isinstance(found, Packed) else found)

    return {name: read(name) for name in parameter_shapes(config)}


def weight_bytes(config: ModelConfig, dtype: jnp.dtype, packing: Packing = ()) -> dict[str, int]:
    """Return the bytes of every parameter, by canonical name."""
    runs = dict(packing)
    return {
        name: kernel_bytes(shape, runs[name]) if name in runs else math.prod(shape) * dtype.itemsize
        for name, shape in parameter_shapes(config).items()
    }
