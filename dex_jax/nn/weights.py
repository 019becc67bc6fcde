"""A transformer's module and its weights apart: jitted programs take the weights, and put the module around them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dex_jax.config import ModelConfig
from dex_jax.nn.transformer import Layout, Transformer


@functools.lru_cache(maxsize=64)
def graph_of(
    config: ModelConfig, layout: Layout, tensor_axis: str | None = None, vocabulary_axis: str | None = None
) -> Any:
    """The nnx graph definition of a transformer, without any array; arguments as of Transformer."""

    def blank(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
        return jnp.zeros(shape)

    return nnx.split(nnx.eval_shape(lambda: Transformer(config, layout, blank, tensor_axis, vocabulary_axis)))[0]


def merge_model(
    config: ModelConfig,
    layout: Layout,
    weights: Any,
    tensor_axis: str | None = None,
    vocabulary_axis: str | None = None,
) -> Transformer:
    """The module of (config, layout) over `weights`, under a trace or not."""
    return nnx.merge(graph_of(config, layout, tensor_axis, vocabulary_axis), weights)


def abstract_weights(config: ModelConfig, layout: Layout, dtype: jnp.dtype) -> Any:
    """Weights as jax.ShapeDtypeStruct, to compile or to plan without loading any."""
    return nnx.state(
        nnx.eval_shape(lambda: Transformer(config, layout, lambda name, shape, kind: jnp.zeros(shape, dtype)))
    )
