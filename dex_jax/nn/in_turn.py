"""A model's layers run one after the other: unrolled in the program, or as one loop over all of them.

Letters: l layers that run.
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
"""The number of a layer: an int, or in a loop an int32 array that only the program knows."""

Step = Callable[[DecoderLayer, Any, Place], Any]

FEWEST_LAYERS = 3
"""The fewest layers that are worth a loop."""


def in_turn(model: Any, layers: range, step: Step, carry: Any, loop: bool = False) -> Any:
    """Run step(layer, carry, place) -> (carry, given) for each layer; return (carry, what every layer gave).

    Each given array becomes a tuple of l arrays, or with `loop` one array with a leading axis [l]. A `loop` needs a
    model for which `is_loop` is true.
    """
    if loop:
        return _numbered(model, layers, step, carry)
    given = []
    for i in layers:
        carry, each = step(model.layers[i], carry, i)
        given.append(each)
    return carry, jax.tree.map(lambda *each: each, *given)


def is_loop(model: Any) -> bool:
    """Return whether the layers can run as one loop, in which C++ finds kernels and caches by the layer's number.

    A loop takes a fraction of the memory and of the time to compile. All layers need the same shapes, formats and kind.
    """
    if len(model.layers) < FEWEST_LAYERS or not few_rows.ready():
        return False
    if len(model.kinds.distinct) > 1 or model.config.head_dim % few_rows.LANES or model.dtype not in few_rows.DTYPES:
        return False
    found = [jax.tree.flatten(nnx.state(layer)) for layer in model.layers]
    first, *others = [(tree, [(leaf.shape, leaf.dtype) for leaf in leaves]) for leaves, tree in found]
    return all(each == first for each in others)


def cached(caches: Any, place: Place) -> Any:
    """Return one layer's keys or values out of those of all layers."""
    return OneOf(caches, place) if isinstance(place, jax.Array) else caches[place]


def _numbered(model: Any, layers: range, step: Step, carry: Any) -> Any:
    split = [nnx.split(layer) for layer in model.layers]
    graph, tree = split[0][0], jax.tree.structure(split[0][1])
    arrays = list(zip(*(jax.tree.leaves(weights) for _, weights in split), strict=True))
    # Kernels stay where they are. Scales of norms and biases are small, and XLA reads them itself.
    small = [jnp.stack(each[layers.start : layers.stop]) if each[0].ndim == 1 else None for each in arrays]

    def body(carry: Any, scanned: Any) -> Any:
        number, few = scanned
        own = [OneOf(each, number) if one is None else one for each, one in zip(arrays, few, strict=True)]
        return step(nnx.merge(graph, jax.tree.unflatten(tree, own)), carry, number)

    return jax.lax.scan(body, carry, (jnp.arange(layers.start, layers.stop), small))
