"""The rows that texts are packed into and shuffled, and the teacher-forced pass of the model over them.

Letters: B rows, S tokens of a row, X trained depths, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.nn.forward import states_apart
from dex_jax.nn.transformer import Transformer
from dex_jax.training.answers import Text

NOTHING = -1
"""The token and the position where a row has no text."""

TOGETHER = 256
"""Number of texts that are packed into rows together."""


class TextRows(NamedTuple):
    """Texts, one after the other, in rows of S tokens."""

    token: np.ndarray | jax.Array  # [B, S] int32, NOTHING where there is none
    position: np.ndarray | jax.Array  # [B, S] int32, within its text, from 0; NOTHING where there is none
    weight: np.ndarray | jax.Array  # [B, S] float32, how much predicting the next token counts; 0 where there is none


class Activations(NamedTuple):
    """The hidden states of the model along rows of texts.

    Tokens i and j < i of a row belong to the same text iff position[i] >= 0 and position[i] - position[j] == i - j.
    """

    states: jax.Array  # [X, B, S, D], hidden states at the trained depths, in the model's dtype
    final: jax.Array  # [B, S, D], at depth L before the final norm
    embedded: jax.Array  # [B, S, D], at depth 0
    token: jax.Array  # as in TextRows
    position: jax.Array
    weight: jax.Array


class Epochs:
    """Batches without end: each text once an epoch, packed and shuffled anew for every epoch.

    Args:
      texts: to learn from; what is longer than a row is cut off.
      batch: B.
      length: S.
      seed: of the shuffles.
    """

    def __init__(self, texts: Sequence[Text], batch: int, length: int, seed: int):
        self._texts, self._batch, self._length, self._seed = texts, batch, length, seed
        self._begins = [0]  # the first batch of each epoch
        self._rows: list[list[int]] = []  # of the last epoch
        self._epoch = -1

    def batch(self, number: int) -> TextRows:
        """Return the batch of a number from 0, the same at every call."""
        epoch = max(i for i, begin in enumerate(self._begins) if begin <= number)
        while True:
            if self._epoch != epoch:
                self._epoch, self._rows = epoch, self._packed(epoch)
            batches = max(1, len(self._rows) // self._batch)
            if epoch + 1 == len(self._begins):
                self._begins.append(self._begins[epoch] + batches)
            if number < self._begins[epoch + 1]:
                break
            epoch += 1
        first = (number - self._begins[epoch]) * self._batch
        rows = self._rows[first : first + self._batch]
        return self._filled([*rows, *[[]] * (self._batch - len(rows))])

    def _packed(self, epoch: int) -> list[list[int]]:
        """Pack each text into the first row with room, the longest of TOGETHER first: the texts' numbers by row."""
        rng = np.random.default_rng([self._seed, epoch])
        order, rows = rng.permutation(len(self._texts)), []
        for first in range(0, len(order), TOGETHER):
            open_rows: list[tuple[list[int], int]] = []
            for text in sorted(order[first : first + TOGETHER], key=lambda i: -len(self._texts[i].token)):
                size = min(len(self._texts[text].token), self._length)
                place = next((i for i, (_, room) in enumerate(open_rows) if room >= size), len(open_rows))
                row, room = open_rows[place] if place < len(open_rows) else ([], self._length)
                open_rows[place : place + 1] = [([*row, int(text)], room - size)]
            rows += [row for row, _ in open_rows]
        return [rows[i] for i in rng.permutation(len(rows))]

    def _filled(self, rows: Sequence[Sequence[int]]) -> TextRows:
        shape = (len(rows), self._length)
        token, position = np.full((2, *shape), NOTHING, np.int32)
        filled = TextRows(token, position, np.zeros(shape, np.float32))
        for row, members in enumerate(rows):
            at = 0
            for text in (self._texts[i] for i in members):
                here = slice(at, at := min(at + len(text.token), self._length))
                size = here.stop - here.start
                for field, values in zip(filled, (text.token, np.arange(size), text.weight), strict=True):
                    field[row, here] = values[:size]
        return filled


def read_rows(model: Transformer, rows: TextRows, depths: tuple[int, ...]) -> Activations:
    """Run the frozen model over rows of texts, each text by itself and without gradients."""
    token, position, weight = map(jnp.asarray, rows)
    apart = jnp.arange(position.shape[1])[:, None] - jnp.arange(position.shape[1])[None]
    same = (position[:, None] >= 0) & (position[:, :, None] - position[:, None] == apart[None]) & (apart >= 0)[None]
    embedded, states = states_apart(model, token, position, same)
    kept = [embedded if depth == 0 else states[depth - 1] for depth in depths]
    found = jax.lax.stop_gradient((jnp.stack(kept), states[-1], embedded))
    return Activations(*found, token, position, weight)
