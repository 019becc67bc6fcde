"""Which trees pay: tokens a round on some prompts, over what a round should take on the device at hand.

How many tokens a round emits does not depend on the device, so it is counted; what a round takes comes from the costs
by which schedule="auto" chooses (decoding/auto.py), and is not disturbed by other load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp

from dex_jax.decoding.auto import round_seconds
from dex_jax.decoding.costs import StepCosts, step_costs
from dex_jax.decoding.generate import generate
from dex_jax.decoding.known_trees import DRAFTED_TREE, LOOKUP_TREE, KnownTree
from dex_jax.decoding.methods import Dex
from dex_jax.decoding.serial import TreeShape
from dex_jax.decoding.session import capacity_for, prompt_bucket
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel

LONGEST_CHAIN = 12
MOST_ROWS = 16


@dataclasses.dataclass(frozen=True)
class TreeFigures:
    """What a tree comes to.

    Attributes:
      tree: with tokens a round, of all prompts together.
      round_seconds: that a round should take.
      speedup: over as many AR steps.
    """

    tree: KnownTree
    round_seconds: float
    speedup: float


def neighbours(shape: TreeShape, drafts: bool) -> list[TreeShape]:
    """Trees that differ by a row of one level, by the last level, or by whether one level is drafted."""
    widths, found = shape.widths, []

    def add(widths: Sequence[int], drafted: int) -> None:
        allowed = 1 + sum(widths) <= MOST_ROWS and 1 <= len(widths) <= LONGEST_CHAIN
        # Beyond the drafted levels there is one candidate at most.
        alone = all(width == 1 for width in widths[drafted:])
        if allowed and alone and 0 <= drafted <= (len(widths) if drafts else 0):
            found.append(dataclasses.replace(shape, widths=tuple(widths), drafted=drafted))

    for level in range(len(widths)):
        for change in (1, -1):
            if widths[level] + change >= 1:
                add([*widths[:level], widths[level] + change, *widths[level + 1 :]], shape.drafted)
    add([*widths, 1], shape.drafted)
    add(widths[:-1], min(shape.drafted, len(widths) - 1))
    add(widths, shape.drafted + 1)
    add(widths, shape.drafted - 1)
    return found


def search_trees(
    lm: LanguageModel,
    drafter: TrainedExits | None,
    prompts: Sequence[Sequence[int]],
    *,
    batches: Sequence[int] = (1, 4, 16),
    new_tokens: int = 96,
    steps: int = 6,
    tell: Callable[[int, TreeFigures], None] = lambda batch, figures: None,
) -> list[TreeFigures]:
    """For each batch size climbs to the neighbour with the largest speedup until none is faster.

    Args:
      lm: the model.
      drafter: None for trees of what the text said before.
      prompts: token ids of each; they are answered together.
      batches: the more sequences, the dearer a row; every climb begins where the one before it ended.
      new_tokens: of each prompt.
      steps: most moves of each climb.
      tell: called with the batch and each tree that was tried for it.

    Returns:
      The best tree for each batch, and all others that emit more tokens a round than any tried tree that is not larger;
      the best one for the first batch leads. Seconds and speedups are of the first batch.

    Raises:
      DexError: a drafter or prompts that do not fit, or answers of one token only.
    """
    counted: dict[TreeShape, KnownTree] = {}
    length = prompt_bucket(max(map(len, prompts))) + capacity_for(new_tokens)
    costs = {batch: step_costs(lm.config, lm.layout, lm.dtype, batch, length) for batch in batches}

    def figures(shape: TreeShape, batch: int) -> TreeFigures:
        new = shape not in counted
        if new:
            counted[shape] = KnownTree(shape, _tokens_per_round(lm, drafter, prompts, shape, new_tokens))
        found = _figures(lm, drafter, counted[shape], costs[batch])
        if new:
            tell(batch, found)
        return found

    at, winners = LOOKUP_TREE if drafter is None else DRAFTED_TREE, []
    for batch in batches:
        best = figures(at, batch)
        for _ in range(steps):
            around = [figures(shape, batch) for shape in neighbours(best.tree.shape, drafter is not None)]
            leader = max(around, key=lambda each: each.speedup, default=best)
            if leader.speedup <= best.speedup:
                break
            best = leader
        winners.append(best.tree)
        at = best.tree.shape
    kept = dict.fromkeys([*winners, *_unbeaten(counted.values())])
    return [_figures(lm, drafter, tree, costs[batches[0]]) for tree in kept]


def _unbeaten(trees: Iterable[KnownTree]) -> list[KnownTree]:
    """Those with more tokens a round than every other tree of no more rows and drafted levels, few rows first."""

    def beats(a: KnownTree, b: KnownTree) -> bool:
        smaller = a.shape.rows <= b.shape.rows and a.shape.drafted <= b.shape.drafted
        return a is not b and smaller and a.tokens_per_round >= b.tokens_per_round

    trees = list(trees)
    found = [tree for tree in trees if not any(beats(other, tree) for other in trees)]
    return sorted(found, key=lambda tree: (tree.shape.rows, tree.shape.drafted))


def _figures(lm: LanguageModel, drafter: TrainedExits | None, tree: KnownTree, costs: StepCosts) -> TreeFigures:
    a_round = round_seconds(costs, tree.shape, drafter, lm.config, jnp.dtype(lm.dtype))
    return TreeFigures(tree, a_round, tree.tokens_per_round * costs.step(1) / a_round)


def _tokens_per_round(
    lm: LanguageModel,
    drafter: TrainedExits | None,
    prompts: Sequence[Sequence[int]],
    shape: TreeShape,
    new_tokens: int,
) -> float:
    method, exits = Dex(schedule="serial", tree=shape), "shared" if drafter is None else drafter
    out = generate(lm, [list(prompt) for prompt in prompts], method=method, exits=exits, max_new_tokens=new_tokens)
    assert out.stats.rounds is not None
    rounds = int(out.stats.rounds.sum())
    if not rounds:
        raise DexError("no answer has more than one token, and rounds begin with the second: give other prompts")
    return int((out.lengths - 1).sum()) / rounds
