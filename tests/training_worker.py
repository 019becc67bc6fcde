"""A training of a few seconds, as a process of its own that tests may kill.

The task learns a linear map from noise. Like the training of exits it holds something between batches that no
checkpoint keeps, so a run that misses a boundary goes another way.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.training.config import TrainConfig
from dex_jax.training.trainer import train

EVERY = {"checkpoint_every": 4, "eval_every": 10, "log_every": 3}
CONFIG = TrainConfig(**EVERY, steps=30, batch=8, warmup_steps=5, learning_rate=0.02)
WIDTH = 256


class LinearMap:
    """Learns y = x M of width D from B rows of noise a step, with some of the inputs dropped.

    Args:
      config: its batch is B.
      width: D.
      seconds: how long a batch takes to make.
      broken_from: from this batch on, rows hold NaN.
    """

    name = "linear_map"
    drop = 0.1  # the share of inputs that is dropped

    def __init__(self, config, width=8, seconds=0.0, broken_from=None):
        self.batch, self.width, self.seconds, self.broken_from = config.batch, width, seconds, broken_from
        self.target = jnp.asarray(np.random.default_rng(7).standard_normal((width, width)), jnp.float32)
        self.held = np.zeros(width, np.float32)
        self.boundaries = self.traces = 0
        self.backbone = "backbone-a"

    def settings(self):
        return {}

    def init(self, key):
        shape = (self.width, self.width)
        return {"map": 0.1 * jax.random.normal(key, shape), "scale": jnp.ones(self.width), "bias": jnp.ones(self.width)}

    def constants(self):
        return self.target

    def start(self, seed):
        return {"seed": seed, "batch": 0, "history": [["none"]]}

    def next_batch(self, cursor):
        time.sleep(self.seconds)
        rng = np.random.default_rng([cursor["seed"], cursor["batch"]])
        x = rng.standard_normal((self.batch, self.width)).astype(np.float32) + self.held
        self.held = np.float32(0.9) * self.held + x.mean(axis=0)
        if self.broken_from is not None and cursor["batch"] >= self.broken_from:
            x[:] = np.nan
        return jnp.asarray(x), {**cursor, "batch": cursor["batch"] + 1}, self.batch - cursor["batch"] % 2

    def loss(self, params, constants, batch, key, step):
        self.traces += 1
        kept = batch * jax.random.bernoulli(key, 1 - self.drop, batch.shape)
        out = kept @ params["map"] * params["scale"][None] + params["bias"][None]
        error = out - batch @ constants
        return (error**2).mean(), {"worst": jnp.abs(error).max()}

    def evaluate(self, params):
        return {"distance": float(jnp.abs(params["map"] - self.target).mean()), "undefined": float("nan")}

    def decayed(self, params):
        return {name: name == "map" for name in params}

    def boundary(self):
        self.held = np.zeros(self.width, np.float32)
        self.boundaries += 1

    def fingerprint(self):
        return self.backbone


if __name__ == "__main__":
    train(LinearMap(CONFIG, WIDTH, seconds=0.02), CONFIG, sys.argv[1])
