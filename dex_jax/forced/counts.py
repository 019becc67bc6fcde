"""What DEX and LayerSkip would have counted on a text that is known, from what exits say at each of its positions.

An exit at depth d, asked about the token after a position, reads the state there, for some kinds also the features of
the position before, as deep as that has got (`source`), and the committed positions, of which the newest lies `lag`
back. Nothing else of a run matters to it, so a text is teacher-forced once for all such `Ask`s that can occur, and the
walks below look up which did. Exact for every kind of exits where rows never prune; `exit_forcing.measure` leaves the
lag out, and is an approximation for kind "attn".

Letters: n tokens of a text, K stages, L layers, P asks, C best tokens of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dex_jax.config import ExitsConfig
from dex_jax.decoding.record import PREFILL_EXIT


class Ask(NamedTuple):
    """What an exit reads beside the state of its own position.

    Attributes:
      depth: of the exit.
      source: depth whose features of the position before it reads; L: the true final ones.
      lag: how far back the newest committed position is.
    """

    depth: int
    source: int
    lag: int


@dataclasses.dataclass(frozen=True, eq=False)
class Forced:
    """What exits say along one text.

    Attributes:
      layers: L.
      exits: of which kind they are.
      asks: P, in the order of the arrays.
      tokens: [n] int32, the text.
      best: [n - 1, P, C] int32, the best tokens for what follows tokens 0 .. n - 2, best first.
      gap: [n - 1, P, C] float32, how far each is ahead of the next, over the largest |logit|.
    """

    layers: int
    exits: ExitsConfig
    asks: tuple[Ask, ...]
    tokens: np.ndarray
    best: np.ndarray
    gap: np.ndarray

    def place(self, ask: Ask) -> int:
        """Where an ask stands."""
        return self.asks.index(known_as(ask, self.exits, self.layers))


@dataclasses.dataclass(frozen=True)
class DexCount:
    """DEX on one text.

    Attributes:
      exits: [n] as Stats.exits.
      closest: [n] float, of the proposals that decided a token, how near the nearest was to another choice.
    """

    exits: np.ndarray
    closest: np.ndarray


@dataclasses.dataclass(frozen=True)
class LayerSkipCount:
    """LayerSkip on one text.

    Attributes:
      rounds: verifications.
      layer_steps: layers run one after the other. Drafts that follow a wrong one are counted as if none of them were
        an EOS, which would end the drafting: never less than the loop counts, and with rounds of g tokens nearly always
        the same.
      exits: [n] as Stats.exits, 1 for a drafted token and 2 for others.
      closest: [n] float as of DexCount.
    """

    rounds: int
    layer_steps: int
    exits: np.ndarray
    closest: np.ndarray


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


def layerskip_asks(depth: int, draft_length: int, exits: ExitsConfig, layers: int) -> tuple[Ask, ...]:
    """All that LayerSkip's exit can be asked: the row of the i-th draft lies i behind the root, at the same depth."""
    found = {Ask(depth, layers, 1)} | {Ask(depth, depth, lag) for lag in range(2, draft_length + 1)}
    return tuple(sorted({known_as(ask, exits, layers) for ask in found}))


def dex_count(forced: Forced, depths: Sequence[int]) -> DexCount:
    """DEX with DECS and rows that never prune.

    Args:
      forced: with the asks of `dex_asks`.
      depths: x_1 < ... < x_K = L.
    """
    stages, count = len(depths), len(forced.tokens)
    exits, closest = np.full(count, PREFILL_EXIT, np.int32), np.ones(count)
    born = [stages]
    for i in range(count - 1):
        target, here = int(forced.tokens[i + 1]), stages
        held: set[int] = set()
        for k in range(1, stages):
            column = forced.place(_ask_in_lattice(born, k, depths))
            token, gap = _first_free(forced.best[i, column], forced.gap[i, column], held)
            closest[i + 1] = min(closest[i + 1], gap)
            if token == target:
                here = k
                break
            held.add(token)
        exits[i + 1] = here
        born.append(here)
    return DexCount(exits, closest)


def _ask_in_lattice(born: Sequence[int], k: int, depths: Sequence[int]) -> Ask:
    """What exit k is asked under the last node of `born`, the exits that a path's nodes were born at."""
    stages, done, lag = len(depths), k + born[-1], 1
    parent = min(stages, done)
    while done < stages:
        lag += 1
        done += born[-lag]
    return Ask(depths[k - 1], depths[parent - 1], lag)


def _first_free(best: np.ndarray, gap: np.ndarray, held: set[int]) -> tuple[int, float]:
    """(the best token that is not held, how near another choice was); -1 where none of them is free."""
    for token, ahead in zip(best.tolist(), gap.tolist(), strict=True):
        if token not in held:
            return token, ahead
    return -1, 1.0


def layerskip_count(
    forced: Forced, depth: int, draft_length: int, max_new_tokens: int, eos_ids: Sequence[int]
) -> LayerSkipCount:
    """LayerSkip(depth, draft_length).

    Args:
      forced: with the asks of `layerskip_asks`.
      depth, draft_length: d, g.
      max_new_tokens: of the run: rounds near it draft less.
      eos_ids: what an exit gives of these is not drafted.
    """
    count, layers = len(forced.tokens), forced.layers
    exits, closest = np.full(count, PREFILL_EXIT, np.int32), np.ones(count)
    emitted, rounds, steps = 1, 0, 0
    while emitted < count:
        rounds += 1
        room = min(draft_length, max_new_tokens - emitted - 1)
        drafted = accepted = 0
        while drafted < room:
            at = emitted - 1 + drafted
            column = forced.place(Ask(depth, layers if drafted == 0 else depth, drafted + 1))
            token, gap = int(forced.best[at, column, 0]), float(forced.gap[at, column, 0])
            closest[at + 1] = gap
            if token in eos_ids:
                break
            drafted += 1
            if token != int(forced.tokens[at + 1]):
                drafted = room  # of what follows a wrong draft the text knows nothing
                break
            accepted += 1
            if at + 2 == count:
                drafted = room  # past the text's end likewise
                break
        exits[emitted : emitted + accepted] = 1
        exits[emitted + accepted : emitted + accepted + 1] = 2
        emitted += accepted + 1
        steps += drafted * depth + layers
    return LayerSkipCount(rounds, steps, exits, closest)
