"""AdamW with clipping and accumulation, and the learning rate by how much of the training is done."""

from __future__ import annotations

import math
from typing import Any

import optax

from dex_jax.training.config import TrainConfig


def make_optimizer(config: TrainConfig, decayed: Any) -> optax.GradientTransformation:
    """Gradients -> the direction that parameters go, which the trainer scales by minus the learning rate.

    The learning rate stays outside: with a budget of tokens it follows what the data turn out to be, which no count of
    steps inside the optimizer could tell.

    `decayed`, a pytree of bool like the parameters, says which of them weight decay applies to. With accumulation there
    are zeros on all but the last of `config.accumulate` calls, and there the direction for the mean of their gradients,
    clipped once.
    """
    optimizer = optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
    if config.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()


def progress(config: TrainConfig, step: int, tokens: int) -> float:
    """The share of the training that is done, 0 to 1, by steps or tokens, whichever is further."""
    shares = [step / config.steps] + ([] if config.tokens is None else [tokens / config.tokens])
    return min(1.0, max(shares))


def learning_rate(config: TrainConfig, step: int, tokens: int) -> float:
    """The rate of the step after `step` steps and `tokens` tokens: a linear warm-up times a cosine to the end."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress(config, step, tokens)))
    return config.learning_rate * warmup * (config.final_rate + (1.0 - config.final_rate) * cosine)
