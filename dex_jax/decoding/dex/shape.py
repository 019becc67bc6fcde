"""How much exit 0 drafts below the heads of a cohort, and what the rows of a cohort cost.

Letters: P levels of a cohort with its heads.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding.dex.lookup import LONGEST
from dex_jax.errors import DexError
from dex_jax.lattice import MIN_LOG_PROBABILITY, SCORE_STEP

TRUSTED = 8
"""Lengths of match that a tree's lookup has a probability for."""


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """How much exit 0 drafts below the heads of a cohort.

    Attributes:
      widths: rows of the levels below the heads.
      drafted: on how many levels the drafter proposes; deeper ones only go on with what the text said before.
      lookup: probability that the next token after a suffix match is right, by the length of the match: 8 numbers, for
        1 to 8 tokens (longer ones: `trust`); all 0 switches it off.
      rungs: (rows, AR steps that a step of so many takes), ascending: exit 0 drafts as many levels and a cohort keeps
        as many of its most probable rows as are worth their time. Empty for all of them always.
      drafting: AR steps that drafting one level takes; only asked for with rungs.

    Raises:
      DexError: no level, a level without rows, more drafted levels than there are, trust that is no probability,
        rungs that do not ascend, or a negative cost.

    Examples:
      >>> TreeShape((3, 2, 1), drafted=2, lookup=(0.0,) * 8).rows
      7
    """

    widths: tuple[int, ...]
    drafted: int
    lookup: tuple[float, ...]
    rungs: tuple[tuple[int, float], ...] = ()
    drafting: float = 0.0

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or not 0 <= self.drafted <= len(self.widths):
            raise DexError(
                f"a tree needs at least one row on each of its levels and as many of them drafted at most, not "
                f"{self.drafted} of {self.widths}"
            )
        if len(self.lookup) != TRUSTED or not all(0 <= share <= 1 for share in self.lookup):
            raise DexError(f"a tree's lookup is {TRUSTED} probabilities, one for each length of match: {self.lookup}")
        ascending = all(a < b and s <= t for (a, s), (b, t) in itertools.pairwise(((0, 0.0), *self.rungs)))
        if not ascending or (self.rungs and self.rungs[0][1] <= 0):
            raise DexError(f"a tree's rungs ascend, with costs above 0, not {self.rungs}")
        if self.drafting < 0:
            raise DexError(f"drafting a level cannot take {self.drafting} AR steps")

    @property
    def counts(self) -> tuple[int, ...]:
        """The row counts that a cohort of one fresh root may keep."""
        return tuple(rows for rows, _ in self.rungs) or (self.rows,)

    @property
    def costs(self) -> RowCosts | None:
        """What `rungs` and `drafting` say, as arrays; None without rungs."""
        if not self.rungs:
            return None
        return RowCosts(jnp.asarray([cost for _, cost in self.rungs], jnp.float32), jnp.float32(self.drafting))

    @property
    def without_costs(self) -> TreeShape:
        """What programs depend on: the row counts, and whether levels are chosen, without the figures."""
        rungs = tuple((rows, float(place)) for place, (rows, _) in enumerate(self.rungs, 1))
        return dataclasses.replace(self, rungs=rungs, drafting=float(self.drafting > 0))

    @property
    def rows(self) -> int:
        """Rows of the whole tree below one head, the head included."""
        return 1 + sum(self.widths)

    @property
    def levels(self) -> int:
        """P."""
        return 1 + len(self.widths) + self.tail

    @property
    def tail(self) -> int:
        """Further levels of a row each, on which only the text goes on: it may fill all rows with one chain."""
        return sum(self.widths) - len(self.widths) if any(self.lookup) else 0

    @property
    def trust(self) -> np.ndarray:
        """Logarithms of the probability that the token after a match is right, by its length, 0 to LONGEST: float32.

        Beyond `lookup` the share that is wrong falls as 1 / length: the token after a match of 8, 16, 32 and 64 tokens
        was right in 0.87, 0.93, 0.98 and 1.00 of 9,000 cases in code and chat.
        """
        longer = 1 - (1 - self.lookup[-1]) * TRUSTED / np.arange(TRUSTED + 1, LONGEST + 1)
        share = np.array([0.0, *self.lookup, *longer * (self.lookup[-1] > 0)])
        steps = np.round(np.log(share, where=share > 0, out=np.zeros_like(share)) / SCORE_STEP) * SCORE_STEP
        return np.where(share > 0, np.maximum(steps, MIN_LOG_PROBABILITY), -np.inf).astype(np.float32)


class RowCosts(NamedTuple):
    """What ticks take, in AR steps, float32; programs do not depend on it."""

    rows: jax.Array  # of a step of each of the row counts that a cohort may keep, beside its drafting
    drafting: jax.Array  # of drafting one level
