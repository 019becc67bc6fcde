"""The training stream in plain Python: each item by itself with a full forward at every token, then rows by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from reference.filters import filter_logits

from dex_jax.language_model import LanguageModel
from dex_jax.sampling import position_noise, sampling_keys
from dex_jax.training.items import Item

IDLE = -1


@dataclasses.dataclass(frozen=True)
class Told:
    """An item run to its end: its tokens and how much each of their steps counts."""

    tokens: list[int]
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Table:
    """What every row does in every step: [B, steps] each, IDLE and weight 0 where there is no item."""

    number: np.ndarray
    token: np.ndarray
    position: np.ndarray
    weight: np.ndarray


def run_item(lm: LanguageModel, item: Item, number: int, seed: int, length: int) -> Told:
    """One item, run anew from its first token at every free step."""
    tokens: list[int] = []
    weights: list[float] = []
    for turn in item.turns:
        for token in turn.forced:
            if len(weights) < len(tokens):
                weights.append(turn.forced_weight)
            tokens.append(token)
        for _ in range(turn.limit):
            token = _choice(lm, tokens, turn.temperature, turn.top_p, number, seed, length)
            weights.append(1.0)
            if token in lm.eos_ids:
                break
            tokens.append(token)
    if len(weights) < len(tokens):
        weights.append(1.0 if item.turns[-1].limit else item.turns[-1].forced_weight)
    return Told(tokens, weights)


def run_rows(told: Callable[[int], Told | None], batch: int, steps: int, chunks: int, waiting: int) -> Table:
    """Rows side by side: an idle row starts the next item, of which at most `waiting` may start in one chunk."""
    table = Table(
        *(np.full((batch, steps * chunks), IDLE, np.int32) for _ in range(3)),
        np.zeros((batch, steps * chunks), np.float32),
    )
    running: list[tuple[int, int] | None] = [None] * batch
    following = 0
    for step in range(steps * chunks):
        if step % steps == 0:
            left = waiting
        for row in range(batch):
            if running[row] is None and left > 0 and told(following) is not None:
                running[row] = (following, 0)
                following, left = following + 1, left - 1
            place = running[row]
            if place is None:
                continue
            number, position = place
            item = told(number)
            assert item is not None
            table.number[row, step], table.position[row, step] = number, position
            table.token[row, step], table.weight[row, step] = item.tokens[position], item.weights[position]
            running[row] = (number, position + 1) if position + 1 < len(item.tokens) else None
    return table


def _choice(
    lm: LanguageModel, tokens: list[int], temperature: float, top_p: float, number: int, seed: int, length: int
) -> int:
    padded = np.zeros((1, length), np.int32)  # what follows cannot reach back
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(lm.logits(padded))[0, len(tokens) - 1]
    if temperature == 0:
        return int(np.argmax(logits))
    key = jax.random.fold_in(sampling_keys([seed])[0], number)
    kept = filter_logits(logits / np.float32(temperature), None, top_p if top_p < 1 else None)
    return int(np.argmax(kept + np.asarray(position_noise(key, len(tokens), len(logits)))))
