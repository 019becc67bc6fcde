"""Several sources in fixed shares, as one sequence of items."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dex_jax.errors import DexError
from dex_jax.training.items import Item

BLOCK = 256
"""A mixture keeps its shares in every BLOCK items."""


class Source(Protocol):
    """A sequence of items without end; `name` is what users write."""

    name: str

    def item(self, number: int) -> Item:
        """As Mixture.item."""

    @property
    def held_out(self) -> list[Item]:
        """Items that are never trained on."""

    @property
    def digest(self) -> str:
        """Changes with the data."""


class Mixture:
    """Several sources in given shares of the items; itself a sequence of items without end.

    `weights` are relative shares, one a source; `seed` is of the order in which sources take turns.

    Raises:
      DexError: no sources, equal names, or weights that are missing or not above 0.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int = 0):
        if not 1 <= len(sources) <= BLOCK or len(weights) != len(sources):
            raise DexError(f"a mixture takes 1 to {BLOCK} sources with a weight each, not {len(sources)}")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DexError(f"the weights of data must be above 0, not {', '.join(map(str, weights))}")
        names = [source.name for source in sources]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DexError(f"{twice[0]} is given twice: give it once, with a larger weight")
        self.sources, self._seed = tuple(sources), seed
        self._counts = _shares(weights)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def item(self, number: int) -> Item:
        """The item of any number from 0; the same at every call."""
        source, at = self.place(number)
        return self.sources[source].item(at)

    def place(self, number: int) -> tuple[int, int]:
        """(index of the source, number within it) of an item."""
        block, within = divmod(number, BLOCK)
        turns, ranks = self._block(block)
        source = int(turns[within])
        return source, block * self._counts[source] + int(ranks[within])

    @property
    def held_out(self) -> dict[str, list[Item]]:
        """Items never trained on, by the name of their source."""
        return {source.name: source.held_out for source in self.sources}

    def fingerprint(self) -> str:
        """Short hexadecimal digest of the data, their shares and their order."""
        parts = [(source.name, source.digest, count) for source, count in zip(self.sources, self._counts, strict=True)]
        return digest_of(json.dumps([parts, self._seed]))[:16]

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        turns = np.repeat(np.arange(len(self._counts)), self._counts)
        turns = np.random.default_rng([self._seed, block]).permutation(turns)
        ranks = np.zeros(BLOCK, np.int64)
        for source in range(len(self._counts)):
            ranks[turns == source] = np.arange(self._counts[source])
        return turns, ranks


def digest_of(text: str) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _shares(weights: Sequence[float]) -> list[int]:
    """How many of BLOCK items each source gives, at least one: the largest remainders are rounded up."""
    spare = BLOCK - len(weights)
    exact = [spare * weight / sum(weights) for weight in weights]
    counts = [1 + math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: math.floor(exact[i]) - exact[i])
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    return counts
