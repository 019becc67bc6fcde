"""The settings of one training run, whatever is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dex_jax.errors import DexError

DTYPES = ("float32", "bfloat16", "float16")

MAY_CHANGE = ("steps", "tokens", "keep", "eval_every", "log_every", "tensorboard")
"""Fields that a resumed run may set anew: how long it goes on, and what is kept and written on the way."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how carefully to train.

    A step is one batch: forwards, backwards, and its share of an update.

    Attributes:
      steps: training ends after so many steps.
      tokens: training ends sooner, once this many tokens have been learnt from; None leaves it to `steps`.
      batch: rows of a batch, B; the task makes them.
      learning_rate: its peak. It rises linearly over the warm-up, then follows a cosine to the end of training,
        measured by steps or tokens, whichever is further.
      warmup_steps: steps of the warm-up.
      final_rate: what is left of the learning rate at the end, as a share of its peak.
      weight_decay: of AdamW, on matrices only.
      beta1, beta2, epsilon: of AdamW.
      clip_norm: gradients of a larger global norm are scaled down to it; None never.
      accumulate: steps whose gradients are averaged into one update.
      checkpoint_every: steps between checkpoints. Data in the making are dropped at each, so it is part of the result.
      keep: checkpoints kept; older ones are deleted.
      eval_every: steps between evaluations; None evaluates at the end only.
      log_every: steps between lines of the journal, and of the progress where there is no terminal.
      seed: of parameters, data and dropout.
      dtype: of the backbone's activations. Parameters in training are always float32.
      tensorboard: also write TensorBoard files.
    """

    steps: int = 10_000
    tokens: int | None = None
    batch: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_rate: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    accumulate: int = 1
    checkpoint_every: int = 500
    keep: int = 2
    eval_every: int | None = 1000
    log_every: int = 20
    seed: int = 0
    dtype: str = "float32"
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "keep", "log_every"):
            _check_integer(name, getattr(self, name), 1)
        for name in ("tokens", "eval_every"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            _check_integer(name, getattr(self, name), 0)
        _check_number("learning_rate", self.learning_rate, low=0.0, open_low=True)
        _check_number("final_rate", self.final_rate, low=0.0, high=1.0)
        _check_number("weight_decay", self.weight_decay, low=0.0)
        for name in ("beta1", "beta2"):
            _check_number(name, getattr(self, name), low=0.0, high=1.0)
            if getattr(self, name) == 1:
                raise DexError(f"{name} must be below 1: with 1 the optimizer never moves")
        _check_number("epsilon", self.epsilon, low=0.0, open_low=True)
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm, low=0.0, open_low=True)
        if self.dtype not in DTYPES:
            raise DexError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not isinstance(self.tensorboard, bool):
            raise DexError(f"tensorboard must be True or False, not {self.tensorboard!r}")

    def replace(self, flags: Mapping[str, Any]) -> TrainConfig:
        """A configuration with the given fields changed; None means "as it is", as flags that were not given are None.

        Raises:
          DexError: a field that does not exist, or a value that will not do.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise DexError(f"TrainConfig has no field {', '.join(unknown)}")
        return dataclasses.replace(self, **given)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON."""
        return dataclasses.asdict(self)

    def conflicts(self, earlier: Mapping[str, Any]) -> list[str]:
        """How this configuration differs, in what may not change, from the one that a folder was trained with.

        Args:
          earlier: that one, from `to_json`. A field that it lacks counts as its default.

        Returns:
          "name was X, is Y" for each such field.
        """
        found = []
        for field in dataclasses.fields(self):
            before, now = earlier.get(field.name, field.default), getattr(self, field.name)
            if field.name not in MAY_CHANGE and before != now:
                found.append(f"{field.name} was {before}, is {now}")
        return found


def _check_integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise DexError(f"{name} must be a whole number of at least {low}, not {value!r}")


def _check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
            f" and at most {high:g}" if high < math.inf else ""
        )
        raise DexError(f"{name} must be a number {bounds}, not {value!r}")
