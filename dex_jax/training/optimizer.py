"""AdamW with clipping, and its learning rate."""

from __future__ import annotations

from typing import Any

import optax

from dex_jax.training.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The number of steps done -> the rate of the next one: up to the peak, then a cosine down to the last step."""
    warmup, last = min(config.warmup_steps, config.steps - 1), config.final_rate * config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps, last)


def make_optimizer(config: TrainConfig, decayed: Any) -> optax.GradientTransformation:
    """Gradients -> updates. `decayed`, a pytree of bool like the parameters, says what weight decay applies to."""
    betas = config.beta1, config.beta2
    adamw = optax.adamw(learning_rate(config), *betas, config.epsilon, weight_decay=config.weight_decay, mask=decayed)
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
