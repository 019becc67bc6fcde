"""A model's layers one after the other: a program for each, or one loop over all of them.

Letters: l layers of a stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dex_jax.nn import few_rows
from dex_jax.nn.few_rows import OneOf
from dex_jax.nn.layers import DecoderLayer

Place = Any
"""A layer's number, which Python knows or the program alone."""

Step = Callable[[DecoderLayer, Any, Place], Any]

FEWEST_LAYERS = 3
"""Fewer are not worth a loop."""


def in_turn(model: Any, layers: range, step: Step, carry: Any, loop: bool = False) -> Any:
    """(carry, what every layer gave) of step(layer, carry, place) -> (carry, given).

    Each array that they gave is a tuple of l; where layers are a `loop` one array with a leading axis [l]. Only a model
    for which `is_loop` is true can be one.
    """
    if loop:
        return _numbered(model, layers, step, carry)
    given = []
    for i in layers:
        carry, each = step(model.layers[i], carry, i)
        given.append(each)
    return carry, jax.tree.map(lambda *each: each, *given)


def is_loop(model: Any) -> bool:
    """Return whether C++ finds each layer's kernels and caches by its number, so that a program has one layer for all.

    It takes a fraction of the memory and of the time to compile. Layers are alike for that: their shapes, formats and
    kinds.
    """
    if len(model.layers) < FEWEST_LAYERS or not few_rows.ready():
        return False
    if len(model.kinds.distinct) > 1 or model.config.head_dim % few_rows.LANES or model.dtype not in few_rows.DTYPES:
        return False
    found = [jax.tree.flatten(nnx.state(layer)) for layer in model.layers]
    first, *others = [(tree, [(leaf.shape, leaf.dtype) for leaf in leaves]) for leaves, tree in found]
    return all(each == first for each in others)


def cached(caches: Any, place: Place) -> Any:
    """One layer's keys or values of all."""
    return OneOf(caches, place) if isinstance(place, jax.Array) else caches[place]


def _numbered(model: Any, layers: range, step: Step, carry: Any) -> Any:
    split = [nnx.split(layer) for layer in model.layers]
    graph, tree = split[0][0], jax.tree.structure(split[0][1])
    arrays = list(zip(*(jax.tree.leaves(weights) for _, weights in split), strict=True))
    # Kernels stay where they are. Scales of norms and biases are small, and XLA adds them up itself.
    small = [jnp.stack(each[layers.start : layers.stop]) if each[0].ndim == 1 else None for each in arrays]

    def body(carry: Any, scanned: Any) -> Any:
        number, few = scanned
        own = [OneOf(each, number) if one is None else one for each, one in zip(arrays, few, strict=True)]
        return step(nnx.merge(graph, jax.tree.unflatten(tree, own)), carry, number)

    return jax.lax.scan(body, carry, (jnp.arange(layers.start, layers.stop), small))
