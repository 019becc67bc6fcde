"""How much exit 0 drafts below the heads of a cohort, and trees whose worth is known.

How many tokens a tick emits does not depend on the device, so it is measured once and kept; what a tick takes does,
and is not kept.

Letters: P levels of a cohort with its heads.
"""

from __future__ import annotations

import dataclasses
import itertools

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
      rungs: (rows, tokens that the time of a step of so many is worth: AR emits one in an AR step), ascending: exit 0
        drafts as many levels and a cohort keeps as many of its most probable rows as are worth their time. Empty for
        all of them always.
      drafting: tokens that the time of drafting one level is worth; only asked for with rungs.

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
            raise DexError(f"drafting a level cannot take the time of {self.drafting} tokens")

    @property
    def counts(self) -> tuple[int, ...]:
        """The row counts that a cohort of one fresh root may keep."""
        return tuple(rows for rows, _ in self.rungs) or (self.rows,)

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


LOOKUP_TRUST = (0.25, 0.6, 0.65, 0.73, 0.79, 0.79, 0.82, 0.9)
"""How often what followed a suffix before follows it again, by the length of the match; 8 means 8 or more: counts on
SmolLM2-135M's greedy answers to held-out prompts (benchmarks/lookup.py of commit dd0098e), smoothed to never
fall."""


@dataclasses.dataclass(frozen=True)
class KnownTree:
    """A tree, and how many tokens all ticks of some texts emitted with it, over how many ticks there were."""

    shape: TreeShape
    tokens_a_tick: float


def _chain(length: int) -> TreeShape:
    return TreeShape((1,) * length, drafted=0, lookup=LOOKUP_TRUST)


LOOKUP_TREES = tuple(KnownTree(_chain(length), tokens) for length, tokens in ((7, 1.81), (3, 1.65), (1, 1.36)))
"""Without a drafter, the best first: SmolLM2-135M's greedy answers (benchmarks/lookup.py of dd0098e). How often a text
repeats itself depends on the text more than on the model, so they stand for other models too."""

LOOKUP_TREE = LOOKUP_TREES[0].shape
"""8 rows, which many devices run about as fast as one."""

DRAFTED_TREES = tuple(
    KnownTree(TreeShape(widths, drafted, LOOKUP_TRUST), tokens)
    for widths, drafted, tokens in (
        ((2, 1), 2, 1.97),
        ((2, 2, 1, 1, 1), 3, 2.46),
        ((4, 3, 2, 2, 1, 1, 1, 1), 8, 2.82),
    )
)
"""With a trained drafter: counts on SmolLM2-135M's answers to held-out prompts, with the drafter that ships."""

OWN_LAYERS_TREES = tuple(
    KnownTree(TreeShape(widths, len(widths), LOOKUP_TRUST), tokens)
    for widths, tokens in (((2, 2, 1, 1, 1), 2.4), ((1, 1, 1), 2.0), ((4, 4, 3, 2, 1, 1), 2.7))
)
"""Of drafters with layers of their own, and what is taken to come of them before a tick has run: half of what EAGLE-3's
authors measured (arXiv 2503.01840, table 1: 4 to 6 tokens a round). Ticks choose how many of the rows they run."""
