"""Texts to teacher-force: a model's own greedy answers, and any others once they are checked.

Letters: B texts of a batch, R padded length, A longest answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import AR
from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel
from dex_jax.prompts import Prompt

Text = tuple[Sequence[int], Sequence[int]]
"""(token ids of the prompt, token ids of the answer)."""

LENGTH_STEP = 64


def answers(lm: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int, batch: int) -> list[Text]:
    """The model's greedy answers, in the order of the prompts.

    Args:
      lm: the model.
      prompts: as `dex_jax.generate` takes them.
      max_new_tokens: of each answer, an EOS that ends it included.
      batch: prompts of similar length answered at a time.

    Raises:
      DexError: as `dex_jax.generate`.
    """
    if batch < 1:
        raise DexError(f"batch must be at least 1, not {batch}")
    ids = [lm.encode(prompt) for prompt in prompts]
    texts: dict[int, Text] = {}
    for chosen in batches([len(each) for each in ids], batch):
        # The last batch is filled up, so that it needs no program of its own.
        filled = [ids[i] for i in chosen] + [ids[chosen[-1]]] * (batch - len(chosen))
        out = generate(lm, filled, method=AR(), max_new_tokens=max_new_tokens, exits="shared")
        for row, i in enumerate(chosen):
            texts[i] = (ids[i], out.tokens[row, : out.lengths[row]].tolist())
    return [texts[i] for i in range(len(ids))]


def batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Numbers of texts to run together, by length, all batches but the last full.

    Examples:
      >>> list(batches([100, 120, 10, 200, 110], 2))
      [[2, 0], [4, 1], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def checked_text(lm: LanguageModel, number: int, prompt: Sequence[int], answer: Sequence[int]) -> Text:
    """The text up to the answer's first EOS.

    A DexError for no prompt or no answer, too many tokens for the model, or ids that it does not have.
    """
    end = next((i + 1 for i, token in enumerate(answer) if token in lm.eos_ids), len(answer))
    if not len(prompt) or not end:
        raise DexError(f"text {number} has no {'answer' if len(prompt) else 'prompt'}: give at least one token of each")
    if len(prompt) + end > lm.config.context:
        raise DexError(
            f"text {number} has {len(prompt) + end} tokens, which passes the model's context of {lm.config.context}: "
            "shorten it"
        )
    ids = [int(token) for token in (*prompt, *answer[:end])]
    if not all(0 <= token < lm.config.vocab_size for token in ids):
        raise DexError(f"text {number} holds token ids outside the model's vocabulary of {lm.config.vocab_size}")
    return ids[: len(prompt)], ids[len(prompt) :]


def padded(texts: Sequence[Text], batch: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, R], answer positions [B, A]); rows and positions beyond a text's end hold anything."""
    length = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
    ids = np.zeros((batch, -(-length // LENGTH_STEP) * LENGTH_STEP), np.int32)
    at = np.zeros((batch, longest), np.int32)
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer) - 1] = [*prompt, *answer[:-1]]
        at[row] = np.minimum(len(prompt) - 1 + np.arange(longest), ids.shape[1] - 1)
    return ids, at
