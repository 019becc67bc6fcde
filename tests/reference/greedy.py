"""A check that an answer is a model's greedy one, by one pass over all of it without a loop."""

from __future__ import annotations

import numpy as np

from dex_jax.language_model import LanguageModel

LENGTH = 96


def is_greedy(lm: LanguageModel, prompt: list[int], answer: list[int]) -> bool:
    """Return whether each token of the answer is the likeliest one after all before it."""
    padded, end = np.zeros((1, LENGTH), np.int32), len(prompt) + len(answer)  # padding cannot reach back
    padded[0, :end] = [*prompt, *answer]
    best = np.asarray(lm.logits(padded))[0].argmax(axis=-1)
    return answer == best[len(prompt) - 1 : end - 1].tolist()
