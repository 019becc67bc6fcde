"""Trees whose worth with one explorer is known: without a drafter, with a trained one, and with one of more layers.

How many tokens a tick emits does not depend on the device, so it is measured once and kept; what a tick takes does,
and is not kept.
"""

from __future__ import annotations

import dataclasses

from dex_jax.decoding.dex.drafters import GivenDrafter
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.io.exits_file import TrainedExits

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


def known_trees(drafter: GivenDrafter | None) -> tuple[KnownTree, ...]:
    """The trees to choose from, the one that always runs all of its rows first."""
    if drafter is None:
        return LOOKUP_TREES
    return DRAFTED_TREES if isinstance(drafter, TrainedExits) else OWN_LAYERS_TREES
