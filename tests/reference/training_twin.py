"""A slow twin of the training of a LinearMap (training_worker.py): NumPy, float64, one plain loop."""

from __future__ import annotations

import math

import jax
import numpy as np


def train_linear_map(task, config, params, key):
    """Return (params, losses of all steps) of a run that is never interrupted.

    `task` is a second LinearMap, not that of the tested run; `params` are {"map" [D, D], "scale" [D], "bias" [D]} at
    the first step; the inputs that a step drops are drawn from `key`, which is the run's own.
    """
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    target = np.asarray(task.constants(), np.float64)
    losses = []
    for step in range(config.steps):
        batch = task.batch_of(step)
        kept = jax.random.bernoulli(jax.random.fold_in(key, step), 1 - task.drop, batch.shape)
        loss, gradients = loss_and_gradients(params, np.asarray(batch, np.float64), np.asarray(kept), target)
        losses.append(loss)
        norm = math.sqrt(sum((value**2).sum() for value in gradients.values()))
        cosine = (1 + math.cos(math.pi * step / config.steps)) / 2
        share = min(step / config.warmup_steps, config.final_rate + (1 - config.final_rate) * cosine)
        for name in params:
            gradient = gradients[name] * min(1.0, config.clip_norm / norm)
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient**2
            one = first[name] / (1 - config.beta1 ** (step + 1))
            two = second[name] / (1 - config.beta2 ** (step + 1))
            direction = one / (np.sqrt(two) + config.epsilon)
            if name == "map":
                direction = direction + config.weight_decay * params[name]
            params[name] = params[name] - config.learning_rate * share * direction
    return params, losses


def loss_and_gradients(params, batch, kept, target):
    """Return the mean squared error of (batch * kept) map * scale + bias against batch target, and its gradients."""
    inputs = batch * kept
    mapped = inputs @ params["map"]
    error = mapped * params["scale"] + params["bias"] - batch @ target
    outer = 2 * error / error.size
    gradients = {
        "map": inputs.T @ (outer * params["scale"]),
        "scale": (outer * mapped).sum(axis=0),
        "bias": outer.sum(axis=0),
    }
    return (error**2).mean(), gradients
