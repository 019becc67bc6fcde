"""Which trees pay with one explorer: tokens a tick on some prompts, over what a tick should take on this device.

How many tokens a tick emits does not depend on the device, so it is counted; what a tick takes comes from the costs by
which Dex() chooses (decoding/auto.py), and is not disturbed by other load. The largest tree is not searched for: ticks
choose how many of its levels to draft and how many of its rows to run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from dex_jax.decoding.auto import tick_seconds
from dex_jax.decoding.costs import ROWS, step_costs
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.dex.trees import LOOKUP_TRUST, KnownTree
from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import SPARE, Dex
from dex_jax.decoding.sizes import cache_length_for
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel

LONGEST_CHAIN = 12


@dataclasses.dataclass(frozen=True)
class TreeFigures:
    """What a tree comes to."""

    tree: KnownTree  # with tokens a tick, of all prompts together
    tick_seconds: float  # that a tick should take
    speedup: float  # over as many AR steps


def neighbours(shape: TreeShape, drafts: bool) -> list[TreeShape]:
    """Trees of as many rows that differ by one row's level, or by whether one level is drafted."""
    widths, found = shape.widths, []

    def add(widths: Sequence[int], drafted: int) -> None:
        # Beyond the drafted levels there is one candidate at most.
        alone = all(width == 1 for width in widths[drafted:])
        if alone and len(widths) <= LONGEST_CHAIN and 0 <= drafted <= (len(widths) if drafts else 0):
            found.append(dataclasses.replace(shape, widths=tuple(widths), drafted=drafted))

    longer = (*widths, 0)
    for source, target in itertools.permutations(range(len(longer)), 2):
        if longer[source] > (1 if source < len(widths) - 1 else 0):
            moved = [width + (i == target) - (i == source) for i, width in enumerate(longer)]
            while moved[-1] == 0:
                moved.pop()
            if min(moved) > 0:
                add(moved, min(shape.drafted, len(moved)))
    add(widths, shape.drafted + 1)
    add(widths, shape.drafted - 1)
    return found


def large_tree(rows: int) -> TreeShape:
    """A tree for ticks that choose: all levels drafted, each 3/4 as wide as the one above."""
    widths, left, width = [], rows - 1, rows / 4
    while left:
        widths.append(min(left, max(1, round(width))))
        left, width = left - widths[-1], 0.75 * width
    return TreeShape(tuple(widths), len(widths), LOOKUP_TRUST)


def first_tree(rows: int, drafts: bool) -> TreeShape:
    """Where the search for trees of `rows` rows begins: two drafted levels, the first of two rows."""
    wide = drafts and rows > 2
    widths = (2, *(1,) * (rows - 3)) if wide else (1,) * (rows - 1)
    return TreeShape(widths[:LONGEST_CHAIN], min(2, len(widths)) if drafts else 0, LOOKUP_TRUST)


def search_trees(
    lm: LanguageModel,
    drafter: TrainedExits | None,
    prompts: Sequence[Sequence[int]],
    *,
    sizes: Sequence[int] = (4, 8),
    largest: int | None = 16,
    new_tokens: int = 96,
    steps: int = 4,
    tell: Callable[[TreeFigures], None] = lambda figures: None,
) -> list[TreeFigures]:
    """For each number of rows climbs to the neighbour with the largest speedup until none is faster.

    Args:
      lm: the model.
      drafter: None for trees of what the text said before.
      prompts: token ids of each; they are answered together.
      sizes: row counts, among those of `decoding.costs.ROWS`: what lies between them is not measured, and can be dearer
        than the next larger one.
      largest: rows of one tree more, that of `large_tree`; None for none. Only with a drafter.
      new_tokens: of each prompt.
      steps: most moves of each climb.
      tell: called with each tree that was tried.

    Returns:
      The best tree of each size at batch 1, the fastest first, and the largest one last.

    Raises:
      DexError: sizes, a drafter or prompts that do not fit, or answers of one token only.
    """
    asked = [*sizes, *([] if largest is None else [largest])]
    if not sizes or not set(asked) <= set(ROWS[1:]):
        raise DexError(f"sizes must be among {', '.join(map(str, ROWS[1:]))}, not {', '.join(map(str, asked))}")
    if largest is not None and largest <= max(sizes):
        raise DexError(f"the largest tree must have more rows than {max(sizes)}, not {largest}")
    length = cache_length_for(max(map(len, prompts)), new_tokens, SPARE, 1)
    costs = step_costs(lm.config, lm.layout, lm.dtype, 1, length, drafter, lm.packing)

    @functools.cache
    def figures(shape: TreeShape) -> TreeFigures:
        tokens, seconds = _tokens_a_tick(lm, drafter, prompts, shape, new_tokens), tick_seconds(costs, shape)
        tried = TreeFigures(KnownTree(shape, tokens), seconds, tokens * costs.step(1) / seconds)
        tell(tried)
        return tried

    found = []
    for rows in sizes:
        best = figures(first_tree(rows, drafter is not None))
        for _ in range(steps):
            around = [figures(shape) for shape in neighbours(best.tree.shape, drafter is not None)]
            leader = max(around, key=lambda each: each.speedup, default=best)
            if leader.speedup <= best.speedup:
                break
            best = leader
        found.append(best)
    found.sort(key=lambda each: -each.speedup)
    if largest is not None and drafter is not None:
        found.append(figures(large_tree(largest)))
    return found


def _tokens_a_tick(
    lm: LanguageModel, drafter: TrainedExits | None, prompts: Sequence[Sequence[int]], shape: TreeShape, new_tokens: int
) -> float:
    method, exits = Dex(explorers=1, draft=shape), "shared" if drafter is None else drafter
    out = generate(lm, [list(prompt) for prompt in prompts], method=method, exits=exits, max_new_tokens=new_tokens)
    assert out.stats.ticks is not None
    ticks = int(out.stats.ticks.sum())
    if not ticks:
        raise DexError("no answer has more than one token, and ticks begin with the second: give other prompts")
    return int((out.lengths - 1).sum()) / ticks
