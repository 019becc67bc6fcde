"""A training of a few seconds that runs as a process of its own, which tests may kill.

The task learns a linear map from noise. The arguments are the folder and, for a disk that gets full, the most bytes
that a file may have.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.training.config import TrainConfig
from dex_jax.training.trainer import train

EVERY = {"checkpoint_every": 4, "eval_every": 10, "log_every": 3}
CONFIG = TrainConfig(**EVERY, steps=30, batch=8, warmup_steps=5, learning_rate=0.02)
WIDTH = 256


class LinearMap:
    """A task that learns y = x M of width D from B rows of noise a step, with some of the inputs dropped.

    Args:
      config: the training's configuration; its batch is B.
      width: D.
      seconds: how long a batch takes to make.
      broken_from: from this batch on, rows hold NaN.
    """

    name = "linear_map"
    drop = 0.1  # the share of inputs that is dropped

    def __init__(self, config, width=8, seconds=0.0, broken_from=None):
        self.batch_size, self.width, self.seconds, self.broken_from = config.batch, width, seconds, broken_from
        self.target = jnp.asarray(np.random.default_rng(7).standard_normal((width, width)), jnp.float32)
        self.traces, self.seed = 0, config.seed
        self.backbone = "backbone-a"

    def settings(self):
        return {}

    def init(self, key):
        shape = (self.width, self.width)
        return {"map": 0.1 * jax.random.normal(key, shape), "scale": jnp.ones(self.width), "bias": jnp.ones(self.width)}

    def constants(self):
        return self.target

    def batch_of(self, step):
        x = np.random.default_rng([self.seed, step]).standard_normal((self.batch_size, self.width)).astype(np.float32)
        if self.broken_from is not None and step >= self.broken_from:
            x[:] = np.nan
        return x

    def batch(self, step):
        time.sleep(self.seconds)
        return jnp.asarray(self.batch_of(step)), self.batch_size - step % 2

    def read(self, constants, batch):
        return batch

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

    def fingerprint(self):
        return self.backbone


def cut_off(folder, size):
    """Return a `notify` that lets no file pass `size` bytes once the first checkpoint is whole, as on a full disk."""

    def notify(event):
        # Not before: a compiled program is kept on disk, too.
        if (step_of(event) or 0) > CONFIG.checkpoint_every:
            while checkpoints_in(folder) != [CONFIG.checkpoint_every]:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return notify


def checkpoints_in(folder):
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def step_of(event) -> int | None:
    """Return the step of a Standing, or None for lines of text."""
    return None if isinstance(event, str) else int(event.what.removeprefix("step ").partition("/")[0])


if __name__ == "__main__":
    where = Path(sys.argv[1])
    limited = cut_off(where, int(sys.argv[2])) if len(sys.argv) > 2 else None
    train(LinearMap(CONFIG, WIDTH, seconds=0.02), CONFIG, where, notify=limited)
