"""What tasks have in common that learn from the stream of a frozen model."""

from __future__ import annotations

import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dex_jax.language_model import LanguageModel
from dex_jax.nn.targets import Vocabulary
from dex_jax.nn.weights import merge_model
from dex_jax.training.stream import Activations, Stream


class StreamTask:
    """The data of such a task and what its loss reads of the model; see Task.

    Args:
      lm: the model; never changed.
      vocabulary: [V'] int32 ascending token ids of the draft vocabulary; None for the full one.
      stream: of lm's activations.
    """

    def __init__(self, lm: LanguageModel, vocabulary: np.ndarray | None, stream: Stream):
        self.lm, self.vocabulary, self.stream = lm, vocabulary, stream

    @property
    def vocabulary_digest(self) -> str:
        """16 hexadecimal digits that change with any token of the draft vocabulary."""
        words = () if self.vocabulary is None else self.vocabulary.tolist()
        return hashlib.sha256(repr(words).encode()).hexdigest()[:16]

    def constants(self) -> dict[str, Any]:
        """The frozen arrays that the loss reads: {"embed", "final_norm", "vocabulary"}."""
        model = merge_model(self.lm.config, self.lm.layout, self.stream.weights)
        kernel = model.vocabulary_kernel
        draft = None if self.vocabulary is None else jnp.asarray(self.vocabulary, jnp.int32)
        vocabulary = Vocabulary(kernel, None if draft is None else kernel[draft], draft, self.lm.config.logit_cap)
        return {"embed": model.embed[...], "final_norm": model.final_scale, "vocabulary": vocabulary}

    def start(self, seed: int) -> dict[str, int]:
        """The first item."""
        return {"item": 0, "seed": seed}

    def next_batch(self, cursor: dict[str, int]) -> tuple[Activations, dict[str, int], int]:
        """The next chunk of the stream."""
        if cursor != self.stream.cursor:
            self.stream.restart(cursor)
        activations, learnt = self.stream.next()
        return activations, self.stream.cursor, learnt

    def boundary(self) -> None:
        """Half-done items are dropped: their caches are in no checkpoint."""
        self.stream.restart()

    def fingerprint(self) -> str:
        """Of the model."""
        return self.lm.fingerprint
