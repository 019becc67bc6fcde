"""What DEX would have counted on texts that are known, from what exits say at each of their positions.

Exact for every kind of exits where rows never prune, if all lags were asked (`Forced.most_lag`).

Letters: N positions, n tokens of a text, K stages, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.errors import DexError
from dex_jax.forced.asks import Ask, asks_in_lattice, dex_asks
from dex_jax.forced.run import Forced, force, shared_exits
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.lattice import NO_TOKEN
from dex_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class DexCount:
    """DEX on one text."""

    exits: np.ndarray  # [n] as Stats.exits
    closest: np.ndarray  # [n] float, of the proposals that decided a token, how near the nearest was to another choice


def first_exits(forced: Forced, asks: Sequence[Ask], decs: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The first of exits 1 .. K-1, asked one after the other what `asks_in_lattice` gives, that gives each next token.

    With `decs` an exit passes over what the exits before it proposed. Gives ([N] int32: 1..K, K where none gives it;
    [N] float, how near the nearest proposal up to there was to another choice).
    """
    right, gaps, held = [], [], np.full((len(forced.target), len(asks)), NO_TOKEN, np.int32)
    for k, ask in enumerate(asks):
        place = forced.place(ask)
        best, gap = forced.said.best[:, place], forced.said.gap[:, place]
        free = ~(best[:, :, None] == held[:, None, : k if decs else 0]).any(axis=-1)
        at, left = free.argmax(axis=1)[:, None], free.any(axis=1)
        held[:, k] = np.where(left, np.take_along_axis(best, at, axis=1)[:, 0], NO_TOKEN)
        gaps.append(np.where(left, np.take_along_axis(gap, at, axis=1)[:, 0], 1.0))
        right.append(held[:, k] == forced.target)
    found = np.stack([*right, np.ones(len(forced.target), bool)]).argmax(axis=0)
    nearest = np.minimum.accumulate(np.stack(gaps), axis=0)
    closest = nearest[np.minimum(found, len(asks) - 1), np.arange(len(found))]
    return (found + 1).astype(np.int32), np.minimum(closest, 1.0)


def dex_counts(forced: Forced, depths: Sequence[int], decs: bool = True) -> list[DexCount]:
    """DEX with rows that never prune on each text, from the asks of `dex_asks` at x_1 < ... < x_K = L."""
    stages, start, counts = len(depths), 0, []
    known: dict[tuple[Ask, ...], tuple[np.ndarray, np.ndarray]] = {}
    for length in forced.lengths:
        exits, closest = np.full(length, PREFILL_EXIT, np.int32), np.ones(length)
        born = [stages]
        for i in range(1, length):
            asks = tuple(forced.known(ask) for ask in asks_in_lattice(born, depths))
            if asks and asks not in known:
                known[asks] = first_exits(forced, asks, decs)
            exits[i], closest[i] = (each[start + i] for each in known[asks]) if asks else (stages, 1.0)
            born.append(int(exits[i]))
        counts.append(DexCount(exits, closest))
        start += length
    return counts


def forced_exits(
    lm: LanguageModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    schedule: Schedule,
    sampling: Sampling | None = None,
    exits: TrainedExits | None = None,
) -> np.ndarray:
    """The exit that first gives each of the n tokens emitted after a prompt, teacher-forced: [n] int32 as Stats.exits.

    With rows that never prune, the loop's `exits` and ticks equal these counts exactly; with fewer rows they are never
    smaller.

    Args:
      lm: the model.
      prompt, tokens: token ids.
      schedule: depths and DECS.
      sampling: keys of one sequence and a temperature; None for greedy.
      exits: trained exits, x_1 .. x_{K-1} among their depths; None for the model's own head.

    Raises:
      DexError: a top_k or top_p: masks of DECS come before filters, so that what is left hangs on what was masked.
    """
    if sampling is not None and (sampling.top_k is not None or sampling.top_p is not None):
        raise DexError("exits are teacher-forced by temperature alone: leave top_k and top_p out")
    depths, stages = schedule.depths, schedule.stages
    if len(tokens) < 2 or stages == 1:
        return np.asarray([PREFILL_EXIT, *[stages] * (len(tokens) - 1)], np.int32)
    exits = shared_exits(lm, depths[:-1]) if exits is None else exits
    asks = dex_asks(depths, exits.config)
    forced = force(lm, exits, [(prompt, tokens)], asks, count=stages - 1, batch=1, sampling=sampling)
    return dex_counts(forced, depths, schedule.decs)[0].exits
