"""The optimizer, AdamW with clipping, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import optax

from dex_jax.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, share: float) -> float:
    """Return the learning rate after `step` steps, when a `share` of the training is done.

    It rises to the peak over the warm-up, and is at most a cosine from the peak down to its final share.
    """
    risen = 1.0 if step >= config.warmup_steps else step / config.warmup_steps
    fallen = config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * share)) / 2
    return config.learning_rate * min(risen, fallen)


def make_optimizer(config: TrainConfig, decayed: Any) -> optax.GradientTransformation:
    """Make the optimizer, with a learning rate of 1, as the trainer scales its updates.

    `decayed`, a pytree of bool like the parameters, says what weight decay applies to.
    """
    betas = config.beta1, config.beta2
    adamw = optax.adamw(1.0, *betas, config.epsilon, weight_decay=config.weight_decay, mask=decayed)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
