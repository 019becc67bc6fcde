"""The task of a training on the states of a frozen model: all that the trainer asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.language_model import LanguageModel
from dex_jax.nn.packed import Packed
from dex_jax.nn.targets import Vocabulary
from dex_jax.nn.weights import merge_model
from dex_jax.training.packing import Activations, Epochs, TextRows, read_rows
from dex_jax.training.sources import digest_of

Params = Any
"""A pytree of float32 arrays: what the optimizer updates."""


class Task(ABC):
    """One thing to train: all that the trainer knows of it.

    Args:
      lm: the model; never changed.
      depths: whose states the loss reads.
      vocabulary: [V'] int32 ascending token ids of the draft vocabulary; None for the full one.
      rows: batches of texts.
      settings: plain JSON, what decides the training beside TrainConfig.
    """

    name: str
    """Of the kind of task, kept in every checkpoint."""

    def __init__(
        self,
        lm: LanguageModel,
        depths: tuple[int, ...],
        vocabulary: np.ndarray | None,
        rows: Epochs,
        settings: dict[str, Any],
    ):
        self.lm, self._depths, self.vocabulary, self._rows, self._settings = lm, depths, vocabulary, rows, settings

    def settings(self) -> dict[str, Any]:
        """Plain JSON, what decides the training beside TrainConfig: a folder is only resumed with equal settings."""
        words = () if self.vocabulary is None else self.vocabulary.tolist()
        return self._settings | {"weights": self.lm.weights_kind, "vocabulary": digest_of(repr(words))[:16]}

    @abstractmethod
    def init(self, key: jax.Array) -> Params:
        """The parameters before the first step."""

    def constants(self) -> dict[str, Any]:
        """Frozen arrays, an argument of the update: {"weights", "vocabulary"}."""
        model = merge_model(self.lm.config, self.lm.weights)
        kernel, draft = model.vocabulary_kernel, None
        own = kernel.dense() if isinstance(kernel, Packed) and self.vocabulary is None else None
        if self.vocabulary is not None:
            draft = jnp.asarray(self.vocabulary, jnp.int32)
            rows = kernel[draft]
            own = rows.dense() if isinstance(rows, Packed) else rows  # Gradients go through it.
        return {"weights": self.lm.weights, "vocabulary": Vocabulary(kernel, own, draft, self.lm.config.logit_cap)}

    def batch(self, step: int) -> tuple[TextRows, int]:
        """(what step `step`, from 0, learns from, of the same shapes every time; how many tokens that are)."""
        rows = self._rows.batch(step)
        return rows, int(np.sum(rows.weight > 0))

    def read(self, constants: dict[str, Any], batch: TextRows) -> Activations:
        """Compute what the loss is given of a batch; it is traced under jit, and nothing in it gets a gradient."""
        return read_rows(merge_model(self.lm.config, constants["weights"]), batch, self._depths)

    @abstractmethod
    def loss(
        self, params: Params, constants: dict[str, Any], batch: Activations, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss, and scalars to report by name, float32; traced once under jit.

        `constants` and `batch` are what `constants` and `read` give, `key` is this step's own, `step` an int32 scalar
        from 0.
        """

    def evaluate(self, params: Params) -> dict[str, Any]:
        """Figures on held-out data, plain JSON. `params` lie where training keeps them."""
        return {}

    @abstractmethod
    def decayed(self, params: Params) -> Any:
        """Which arrays weight decay applies to: a pytree of bool like `params`."""

    def fingerprint(self) -> str:
        """Names the frozen model: checkpoints of another one are used with a warning."""
        return self.lm.fingerprint
