"""Which tree pays: tokens a round on some prompts, over what a round takes on the device at hand.

How many tokens a round emits does not depend on the device, and what a round takes hardly on the text, so the two are
measured apart: the first as a mean over prompts, the second as the fastest of them, which other load disturbs least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import AR, Dex
from dex_jax.decoding.serial import TreeShape
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel

LONGEST_CHAIN = 12
MOST_ROWS = 16


@dataclasses.dataclass(frozen=True)
class TreeFigures:
    """What a tree comes to.

    Attributes:
      shape: of the tree.
      tokens_per_round: mean over prompts of (n - 1) / rounds.
      round_seconds: of the fastest prompt.
      speedup: tokens_per_round over what as many AR steps take.
    """

    shape: TreeShape
    tokens_per_round: float
    round_seconds: float
    speedup: float


def with_tree(drafter: TrainedExits, shape: TreeShape) -> TrainedExits:
    """The drafter with a tree of its own, which serial rounds take unless they are given another."""
    tree = {"widths": list(shape.widths), "drafted": shape.drafted, "lookup": list(shape.lookup)}
    return dataclasses.replace(drafter, metadata=drafter.metadata | {"tree": tree})


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


def search_tree(
    lm: LanguageModel,
    drafter: TrainedExits | None,
    prompts: Sequence[Sequence[int]],
    begin: TreeShape,
    *,
    new_tokens: int = 96,
    steps: int = 6,
    tell: Callable[[TreeFigures], None] = lambda figures: None,
) -> list[TreeFigures]:
    """Climbs from `begin` to the neighbour with the largest speedup until none is faster, at most `steps` times.

    Args:
      lm: the model.
      drafter: None for trees of what the text said before.
      prompts: token ids of each.
      begin: where to begin.
      new_tokens: of each prompt.
      steps: limit.
      tell: called with each tree that was tried.

    Returns:
      All that were tried, the fastest first.

    Raises:
      DexError: a drafter or prompts that do not fit, or answers of one token only.
    """
    plain = [
        generate(lm, [list(p)], method=AR(), exits="shared", max_new_tokens=new_tokens) for p in prompts for _ in "12"
    ]
    a_step = min(out.stats.decode_seconds / max(1, int(out.lengths[0]) - 1) for out in plain)
    tried: dict[TreeShape, TreeFigures] = {}

    def figures(shape: TreeShape) -> TreeFigures:
        if shape not in tried:
            tried[shape] = _measured(lm, drafter, prompts, shape, new_tokens, a_step)
            tell(tried[shape])
        return tried[shape]

    best = figures(begin)
    for _ in range(steps):
        around = [figures(shape) for shape in neighbours(best.shape, drafter is not None)]
        leader = max(around, key=lambda each: each.speedup, default=best)
        if leader.speedup <= best.speedup:
            break
        best = leader
    return sorted(tried.values(), key=lambda each: -each.speedup)


def _measured(
    lm: LanguageModel,
    drafter: TrainedExits | None,
    prompts: Sequence[Sequence[int]],
    shape: TreeShape,
    new_tokens: int,
    a_step: float,
) -> TreeFigures:
    method, exits = Dex(schedule="serial", tree=shape), "shared" if drafter is None else drafter
    per_round, seconds = [], []
    for prompt in prompts:
        out = generate(lm, [list(prompt)], method=method, exits=exits, max_new_tokens=new_tokens)
        if out.stats.rounds is not None and out.stats.rounds[0] > 0:
            per_round.append((int(out.lengths[0]) - 1) / int(out.stats.rounds[0]))
            seconds.append(out.stats.decode_seconds / int(out.stats.rounds[0]))
    if not seconds:
        raise DexError("no answer has more than one token, and rounds begin with the second: give other prompts")
    tokens, a_round = float(np.mean(per_round)), float(min(seconds))
    return TreeFigures(shape, tokens, a_round, tokens * a_step / a_round)
