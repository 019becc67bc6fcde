"""The items to learn from: scripts of texts, some parts of them yet to be written by a model.

An item is a script of turns. In each turn some tokens are given, then the model goes on freely. A prompt and its
answer, a prompt that the model writes itself, and a given text are all items.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Turn:
    """Given tokens, then free ones, which end at their limit or where the model chooses an end token."""

    forced: tuple[int, ...]  # token ids, at least one
    limit: int = 0  # the most free tokens after them; 0 for none
    temperature: float = 0.0  # of the free part; 0 is greedy
    top_p: float = 1.0  # of the free part, in (0, 1]; 1 keeps every token. Unused when greedy
    forced_weight: float = 0.0  # how much predicting a given token counts; a free one, and the last turn's end, count 1


@dataclasses.dataclass(frozen=True)
class Item:
    """The script of a text: one or more turns, one after the other."""

    turns: tuple[Turn, ...]

    @property
    def longest(self) -> int:
        """The most tokens that a text of this item can have."""
        return sum(len(turn.forced) + turn.limit for turn in self.turns)
