"""The trees that exit 0 drafts below the anchors of a cohort.

Letters: P levels of a cohort with its anchors.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from dex_jax.decoding.dex.lookup import LONGEST
from dex_jax.errors import DexError
from dex_jax.lattice import MIN_LOG_PROBABILITY, SCORE_STEP

MATCH_LENGTHS = 8
"""Number of match lengths that a tree's lookup has a probability for."""


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """The shape of the tree that exit 0 drafts below the anchors of a cohort.

    Attributes:
      widths: rows of the levels below the anchors.
      drafter_levels: number of levels on which the drafter proposes; on deeper ones only the text does.
      lookup: probability that the next token after a suffix match is right, by the length of the match: 8 numbers, for
        1 to 8 tokens (longer ones: `match_log_probability`); all 0 switches it off.
      rungs: row counts that a tick may choose from, ascending: exit 0 drafts as many levels and a cohort keeps as many
        of its most probable rows as are worth their time (row_choice.py). If empty, every tick runs all rows.

    Raises:
      DexError: no level, a level without rows, more drafted levels than there are, a lookup without 8
        probabilities, or rungs that do not ascend.

    Examples:
      >>> TreeShape((3, 2, 1), drafter_levels=2, lookup=(0.0,) * 8).rows
      7
    """

    widths: tuple[int, ...]
    drafter_levels: int
    lookup: tuple[float, ...]
    rungs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or not 0 <= self.drafter_levels <= len(self.widths):
            raise DexError(
                f"a tree needs at least one row on each of its levels and as many of them drafted at most, not "
                f"{self.drafter_levels} of {self.widths}"
            )
        if len(self.lookup) != MATCH_LENGTHS or not all(0 <= share <= 1 for share in self.lookup):
            raise DexError(
                f"a tree's lookup is {MATCH_LENGTHS} probabilities, one for each length of match: {self.lookup}"
            )
        if not all(a < b for a, b in itertools.pairwise((0, *self.rungs))):
            raise DexError(f"a tree's rungs are row counts that ascend, not {self.rungs}")

    @property
    def counts(self) -> tuple[int, ...]:
        """The row counts that a cohort of one fresh root may keep."""
        return self.rungs or (self.rows,)

    @property
    def rows(self) -> int:
        """Number of rows of the whole tree below one anchor, itself included."""
        return 1 + sum(self.widths)

    @property
    def levels(self) -> int:
        """Number of levels P, with that of the anchors."""
        return 1 + len(self.widths) + self.tail

    @property
    def tail(self) -> int:
        """Number of further levels of one row each, on which the text alone goes on: one chain may fill all rows."""
        return sum(self.widths) - len(self.widths) if any(self.lookup) else 0

    @property
    def match_log_probability(self) -> np.ndarray:
        """Log-probability that the token after a match is right, by the match's length 0 to LONGEST: float32.

        Beyond `lookup` the share that is wrong falls as 1 / length: the token after a match of 8, 16, 32 and 64 tokens
        was right in 0.87, 0.93, 0.98 and 1.00 of 9,000 cases in code and chat.
        """
        longer = 1 - (1 - self.lookup[-1]) * MATCH_LENGTHS / np.arange(MATCH_LENGTHS + 1, LONGEST + 1)
        share = np.array([0.0, *self.lookup, *longer * (self.lookup[-1] > 0)])
        steps = np.round(np.log(share, where=share > 0, out=np.zeros_like(share)) / SCORE_STEP) * SCORE_STEP
        return np.where(share > 0, np.maximum(steps, MIN_LOG_PROBABILITY), -np.inf).astype(np.float32)


MATCH_PROBABILITIES = (0.25, 0.6, 0.65, 0.73, 0.79, 0.79, 0.82, 0.9)
"""The share of cases where what followed a suffix before follows it again, by the length of the match; 8 means 8 or
more: counts on SmolLM2-135M's greedy answers to held-out prompts (benchmarks/lookup.py of commit dd0098e), smoothed to
never fall."""


def _chain(length: int) -> TreeShape:
    return TreeShape((1,) * length, drafter_levels=0, lookup=MATCH_PROBABILITIES)


LOOKUP_TREES = (_chain(1), _chain(3), _chain(7))
"""The trees of the text alone, ascending."""

DRAFTED_TREES = tuple(
    TreeShape(widths, levels, MATCH_PROBABILITIES)
    for widths, levels in (((2, 1), 2), ((2, 2, 1, 1, 1), 3), ((4, 3, 2, 2, 1, 1, 1, 1), 8))
)
"""The trees of a trained drafter, ascending."""

OWN_LAYERS_TREES = tuple(
    TreeShape(widths, len(widths), MATCH_PROBABILITIES) for widths in ((1, 1, 1), (2, 2, 1, 1, 1), (4, 4, 3, 2, 1, 1))
)
"""The trees of a drafter with layers of its own, ascending; its drafts are worth more rows."""
