"""What can be trained on the stream of a frozen model: all that the trainer asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.language_model import LanguageModel
from dex_jax.nn.targets import Vocabulary
from dex_jax.nn.weights import merge_model
from dex_jax.training.sources import digest_of
from dex_jax.training.stream import Activations, Cursor, Stream

Params = Any
"""A pytree of float32 arrays: what the optimizer updates."""


class Task(ABC):
    """One thing to train: all that the trainer knows of it.

    Args:
      lm: the model; never changed.
      vocabulary: [V'] int32 ascending token ids of the draft vocabulary; None for the full one.
      stream: of lm's activations.
      data: names the data, for checkpoints.
      settings: plain JSON, what else decides the training beside TrainConfig.
    """

    name: str
    """Of the kind of task, kept in every checkpoint."""

    def __init__(
        self, lm: LanguageModel, vocabulary: np.ndarray | None, stream: Stream, data: str, settings: dict[str, Any]
    ):
        self.lm, self.vocabulary, self.stream, self._data, self._settings = lm, vocabulary, stream, data, settings

    def settings(self) -> dict[str, Any]:
        """Plain JSON, what decides the training beside TrainConfig: a folder is only resumed with equal settings."""
        spec, words = self.stream.spec, () if self.vocabulary is None else self.vocabulary.tolist()
        stream = {"batch": self.stream.batch, "steps": spec.steps, "length": spec.length}
        return self._settings | {"stream": stream, "data": self._data, "vocabulary": digest_of(repr(words))[:16]}

    @abstractmethod
    def init(self, key: jax.Array) -> Params:
        """The parameters before the first step."""

    def constants(self) -> dict[str, Any]:
        """Frozen arrays that the loss reads, an argument of the update: {"embed", "final_norm", "vocabulary"}."""
        model = merge_model(self.lm.config, self.stream.weights)
        kernel = model.vocabulary_kernel
        draft = None if self.vocabulary is None else jnp.asarray(self.vocabulary, jnp.int32)
        vocabulary = Vocabulary(kernel, None if draft is None else kernel[draft], draft, self.lm.config.logit_cap)
        return {"embed": model.embed[...], "final_norm": model.final_scale, "vocabulary": vocabulary}

    def start(self, seed: int) -> Cursor:
        """The place before the first batch; places are plain JSON."""
        return {"item": 0, "seed": seed}

    def next_batch(self, cursor: Cursor) -> tuple[Activations, Cursor, int]:
        """(the chunk at `cursor`, of the same shapes every time; the next place; tokens learnt from)."""
        if cursor != self.stream.cursor:
            self.stream.restart(cursor)
        activations, learnt = self.stream.next()
        return activations, self.stream.cursor, learnt

    @abstractmethod
    def loss(
        self, params: Params, constants: dict[str, Any], batch: Activations, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss, and scalars to report by name, float32; traced once under jit.

        `constants` and `batch` are as from the methods of these names, `key` is this step's own, `step` an int32 scalar
        from 0.
        """

    def evaluate(self, params: Params) -> dict[str, Any]:
        """Figures on held-out data, plain JSON. `params` lie where training keeps them. It must not move any cursor."""
        return {}

    @abstractmethod
    def decayed(self, params: Params) -> Any:
        """Which arrays weight decay applies to: a pytree of bool like `params`."""

    def boundary(self) -> None:
        """Half-done items are dropped: their caches are in no checkpoint.

        Called right after a checkpoint has been saved and right after one has been restored, so that a run that goes on
        and a run that was killed and resumed are in the same state from here.
        """
        self.stream.restart()

    def fingerprint(self) -> str:
        """Names the frozen model: checkpoints of another one are used with a warning."""
        return self.lm.fingerprint
