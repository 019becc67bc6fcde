"""The LayerSkip recipe (Elhoushi et al., arXiv 2404.16710) as pure functions: layer dropout and early-exit loss.

Both grow with depth, so that shallow layers are trained as usual and deep ones become dispensable. The loss at every
exit goes through the model's own final norm and unembedding, hence decoding takes exits="shared".

Letters: L layers, B sequences, t the step, T steps in all.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from dex_jax.foreign import Size, check_fields


@dataclasses.dataclass(frozen=True)
class LayerSkip:
    """What the recipe leaves to choose; the defaults are those of the paper's small model trained from scratch.

    Attributes:
      dropout: probability, in [0, 1), that a sequence skips the last layer at the end of training; other layers are
        skipped less often.
      warm_dropout: whether that probability grows over training from 0, which suits training from scratch; otherwise it
        is there from the first step, which suits going on from a trained model.
      exit_scale: how much the losses of early exits count, at least 0, beside the last layer's.
      curriculum: which early exits have a loss at a step. "rotational": every `period`-th, one further each step;
        "gradual": the deepest first, all from half of the training on; "all": all of them, always.
      period: R of the rotational curriculum.
    """

    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    warm_dropout: bool = True
    exit_scale: Annotated[float, Meta(ge=0, le=1e30)] = 0.2
    curriculum: Literal["rotational", "gradual", "all"] = "rotational"
    period: Size = 4

    def __post_init__(self):
        check_fields(self)


def dropout_by_layer(num_layers: int, last: float) -> np.ndarray:
    """Probability of skipping each layer, [L] float32: 0 for the first, `last` for the last, exponential between.

    LayerSkip, section on layer dropout: D(l) = exp(l ln 2 / (L - 1)) - 1 for l = 0 .. L - 1. A single layer is kept.
    """
    if num_layers == 1:
        return np.zeros(1, np.float32)
    return (last * (2.0 ** (np.arange(num_layers) / (num_layers - 1)) - 1)).astype(np.float32)


def dropout_over_time(step: jax.Array | int, steps: int) -> jax.Array:
    """Factor of the dropout at step t: scalar float32, 0 at the first step, 1 at the last, exponential between."""
    done = jnp.asarray(step, jnp.float32) / max(steps - 1, 1)
    return jnp.exp2(jnp.clip(done, 0.0, 1.0)) - 1


def kept_layers(
    recipe: LayerSkip, key: jax.Array, num_layers: int, batch: int, step: jax.Array | int, steps: int
) -> jax.Array:
    """Which layers each sequence runs at this step: [L, B] bool; a layer that is not kept is the identity."""
    skipped = jnp.asarray(dropout_by_layer(num_layers, recipe.dropout))
    if recipe.warm_dropout:
        skipped = skipped * dropout_over_time(step, steps)
    return jax.random.uniform(key, (num_layers, batch)) >= skipped[:, None]


def loss_scale(num_layers: int, exit_scale: float) -> np.ndarray:
    """How much the loss at each depth 1 .. L counts before the curriculum, [L] float32, not normalised.

    LayerSkip, section on early exit loss: for l = depth - 1, exit_scale (0 + 1 + ... + l) below the last layer, and
    L - 1 + exit_scale (0 + 1 + ... + L - 2) for the last. Depth 1 thus counts nothing unless it is all there is.
    """
    if num_layers == 1:
        return np.ones(1, np.float32)
    index = np.arange(num_layers)
    scale = exit_scale * index * (index + 1) / 2
    scale[-1] = num_layers - 1 + scale[-2]
    return scale.astype(np.float32)


def active_exits(recipe: LayerSkip, num_layers: int, step: jax.Array | int, steps: int) -> jax.Array:
    """Depths 1 .. L that have a loss at this step, [L] bool; the last always has one."""
    index, step = jnp.arange(num_layers), jnp.asarray(step, jnp.int32)
    if recipe.curriculum == "rotational":
        active = (index - step) % recipe.period == 0
    elif recipe.curriculum == "gradual":
        interval = max(1, math.ceil(steps / (2 * num_layers)))
        active = index >= num_layers - 1 - step // interval
    else:
        active = jnp.ones(num_layers, bool)
    return active.at[-1].set(True)


def exit_weights(recipe: LayerSkip, num_layers: int, step: jax.Array | int, steps: int) -> jax.Array:
    """Weight of the loss at each depth 1 .. L at this step: [L] float32, sum 1, 0 where the curriculum has no loss."""
    scale = jnp.asarray(loss_scale(num_layers, recipe.exit_scale))
    weights = jnp.where(active_exits(recipe, num_layers, step, steps), scale, 0.0)
    return weights / weights.sum()
