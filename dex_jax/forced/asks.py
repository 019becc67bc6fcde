"""What an exit reads when it is asked about the token after a position, and which of that can occur.

An exit at depth d reads the state there, for some kinds also the features of the position before, as deep as that has
got (`source`), and the committed positions, of which the newest lies `lag` back. Nothing else of a run matters to it.

Letters: K stages, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dex_jax.config import ExitsConfig


class Ask(NamedTuple):
    """What an exit reads beside the state of its own position."""

    depth: int  # of the exit
    source: int  # depth whose features of the position before it reads; L: the true final ones
    lag: int  # how far back the newest committed position is


def known_as(ask: Ask, exits: ExitsConfig, layers: int) -> Ask:
    """The ask without what exits of this kind do not read."""
    if not exits.needs_previous:
        return Ask(ask.depth, layers, 1)
    return ask if exits.kind == "attn" else Ask(ask.depth, ask.source, 1)


def dex_asks(depths: Sequence[int], exits: ExitsConfig) -> tuple[Ask, ...]:
    """All that the exits of a grid x_1 < ... < x_K = L can be asked where rows never prune."""
    stages, layers = len(depths), depths[-1]
    found = {Ask(depth, layers, 1) for depth in depths[:-1]}
    for k in range(1, stages):
        # A parent that has done p < K stages has uncommitted ancestors itself, each at least one stage ahead.
        for p in range(k + 1, stages):
            found |= {Ask(depths[k - 1], depths[p - 1], lag) for lag in range(2, stages - p + 2)}
    return tuple(sorted({known_as(ask, exits, layers) for ask in found}))


def asks_in_lattice(born: Sequence[int], depths: Sequence[int]) -> tuple[Ask, ...]:
    """What exits 1 .. K-1 are asked under the last node of a path whose nodes were `born` at these exits, 1 .. K."""
    stages, found = len(depths), []
    for k in range(1, stages):
        done, lag = k + born[-1], 1
        source = depths[min(stages, done) - 1]
        while done < stages:
            lag += 1
            done += born[-lag]
        found.append(Ask(depths[k - 1], source, lag))
    return tuple(found)
