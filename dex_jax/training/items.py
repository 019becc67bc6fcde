"""Items: what a row of the training stream runs from position 0 to its end, and how the device sees many of them.

An item is a script of turns. In each turn some tokens are forced, then the model goes on freely. So a prompt and its
answer, a prompt that the model writes itself, and a given text are one thing, and reading and decoding one program.

Letters: N scripts, S longest item, G turns a script.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_TURNS = 4
"""G: each turn costs a few numbers a script."""

NO_ITEM = -1
"""Stands for the item number, token and position of a step in which a row is idle."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Forced tokens, then free ones.

    A free part ends at its limit or where the model chooses an end token. That token is never run: what follows is the
    next turn's first forced token, or the next item.
    """

    forced: tuple[int, ...]  # token ids, at least one
    limit: int = 0  # most free tokens after them; 0 for none
    temperature: float = 0.0  # of the free part; 0 is greedy
    top_p: float = 1.0  # of the free part, in (0, 1]; 1 keeps every token. Unused when greedy
    forced_weight: float = 0.0  # how much a step counts whose next token this turn forces; where it is free, 1


@dataclasses.dataclass(frozen=True)
class Item:
    """One to MAX_TURNS turns, run one after another in one row."""

    turns: tuple[Turn, ...]

    @property
    def longest(self) -> int:
        """The most tokens that can be run."""
        return sum(len(turn.forced) + turn.limit for turn in self.turns)


class Scripts(NamedTuple):
    """N items as arrays."""

    forced: np.ndarray  # [N, S] int32, forced tokens of all turns one after another
    end: np.ndarray  # [N, G] int32, where in `forced` each turn's tokens end
    limit: np.ndarray  # [N, G] int32
    temperature: np.ndarray  # [N, G] float32, as the next two
    top_p: np.ndarray
    forced_weight: np.ndarray
    turns: np.ndarray  # [N] int32, how many turns there are
    number: np.ndarray  # [N] int32, the item's number in its sequence; NO_ITEM where there is no item


def script(item: Item, number: int, length: int) -> Scripts:
    """One item as arrays without the axis N, for rows of `length` = S, which it cannot outgrow."""
    forced = [token for turn in item.turns for token in turn.forced]

    def padded(values: Sequence[float], dtype: type, size: int = MAX_TURNS) -> np.ndarray:
        return np.pad(np.array(values, dtype), (0, size - len(values)))

    return Scripts(
        forced=padded(forced, np.int32, length),
        end=padded([*itertools.accumulate(len(turn.forced) for turn in item.turns)], np.int32),
        limit=padded([turn.limit for turn in item.turns], np.int32),
        temperature=padded([turn.temperature for turn in item.turns], np.float32),
        top_p=padded([turn.top_p for turn in item.turns], np.float32),
        forced_weight=padded([turn.forced_weight for turn in item.turns], np.float32),
        turns=np.asarray(len(item.turns), np.int32),
        number=np.asarray(number, np.int32),
    )


def no_script(length: int) -> Scripts:
    """What fills a place without an item."""
    return script(Item((Turn((0,)),)), NO_ITEM, length)


def stack_scripts(scripts: Sequence[Scripts]) -> Scripts:
    """N scripts of one S, along a new first axis."""
    return Scripts(*map(np.stack, zip(*scripts, strict=True)))
