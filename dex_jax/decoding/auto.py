"""schedule="auto": serial rounds, explorers side by side or plain AR, whichever should be fastest here.

Seconds a token are what steps take on this device (decoding/costs.py) over how many tokens come of them, which is known
from the exits: of a drafter, tokens a round with each of its trees; of exits at depths, the depth-side speedup.

  AR        step(1)
  serial    (step(N) + round + drafted levels * drafting) / tokens a round * slowest(B), for the best of the known trees
  parallel  (tick + heads) * K / speedup * slowest(B) + final

`parallel` is considered in the stacked layout only. In the unrolled one a tick runs its stages one after the other, and
a token's own way up is K of them, all L layers: on one device AR is never slower.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.decoding.costs import StepCosts, forget, head_bytes, step_costs
from dex_jax.decoding.drafts import TreeShape
from dex_jax.decoding.exits import default_exits, find_drafter
from dex_jax.decoding.known_trees import known_trees
from dex_jax.decoding.methods import AR, Dex, Method, is_auto
from dex_jax.decoding.pace import Pace
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.transformer import Layout, Stacked

SMALLEST_GAIN = 1.02
"""What is expected to be ahead of AR by less is not worth its compilation, and may well be behind."""

COST_PARTS, CLEARLY_LESS = 32, 3
"""Costs are in parts of an AR step. Every row count that a round may choose from is compiled: they must differ."""

CAUTION = 1.3
"""Rounds take further rows and drafting to cost so many times what was measured. How fast a device reads memory, which
is all that a step of one row waits for, changes while others use it too; too few rows lose less than too many do."""

LONGEST_STEP = 2.5
"""AR steps that all rows of a tree may take, for rounds to choose from it. Drafts promise most where they are most
wrong, so a choice of rows that hardly ever pay does harm: on a CPU, of one sequence 16 rows take 2.2 steps and the tree
of so many is the fastest, of two they take 3.5 and it is slower than those of 4 and 8."""

SPREAD = 0.08
"""A batch ends with its slowest sequence, and how many tokens come of a round differs from text to text: the slowest of
B takes 1 + SPREAD * log2(B) times as many rounds as one does on average (1.10, 1.18 and 1.24 of 2, 4 and 8, drawn from
the 20 prompts of results/serial/greedy_zen3.json). AR is as fast on every text."""


class Candidate(NamedTuple):
    """A method, what it should take and why.

    Attributes:
      seconds: expected of a token of each sequence.
      what: the method in words.
      why: what it rests on.
    """

    method: Method
    seconds: float
    what: str
    why: str


def settle(
    method: Method,
    exits: str | os.PathLike | TrainedExits,
    config: ModelConfig,
    layout: Layout,
    dtype: Any,
    fingerprint: str,
    batch: int,
    length: int,
) -> tuple[Method, str | None]:
    """The method that runs, and one line that says why if it was chosen here.

    Args:
      method: as the user gave it; only a Dex of kind "auto" is replaced.
      exits: as the user gave them; exits at depths, which only explorers side by side can use, settle it.
      config, layout, dtype, fingerprint: of the model.
      batch: B.
      length: S, about as many cache positions as the generation will have.

    Raises:
      DexError: exits that cannot be read.
    """
    if not is_auto(method):
        return method, None
    drafter, source = find_drafter(exits, fingerprint)
    if drafter is not None and not drafter.config.is_drafter:
        return Dex(schedule="parallel"), f"parallel, which the exits in {source} are for"
    costs = step_costs(config, layout, dtype, batch, length, drafter)
    at_depths = default_exits(fingerprint) if isinstance(exits, str) and exits == "default" else None
    found = candidates(costs, drafter, at_depths, config, layout, jnp.dtype(dtype), batch)
    plain = found[0]
    best = min(found, key=lambda each: each.seconds)
    gain = plain.seconds / best.seconds
    if gain < SMALLEST_GAIN:
        best = plain
    second = min((each for each in found if each is not best), key=lambda each: each.seconds)
    ratio = f"{second.what} should take {second.seconds / best.seconds:.2f} times as long"
    return best.method, f"{best.what}: {best.why}; {ratio}"


def reconsider(pace: Pace, config: ModelConfig, layout: Layout, dtype: Any, batch: int, length: int) -> None:
    """Forgets costs that were measured beside other load, as the pace of what they chose shows."""
    if np.isfinite(pace.fastest) and pace.far_off(step_costs(config, layout, dtype, batch, length).step(1)):
        forget(config, layout, dtype)


def candidates(
    costs: StepCosts,
    drafter: TrainedExits | None,
    exits: TrainedExits | None,
    config: ModelConfig,
    layout: Layout,
    dtype: np.dtype,
    batch: int = 1,
) -> list[Candidate]:
    """AR first, then the best tree of serial rounds, then explorers side by side where they can gain at all.

    Args:
      costs: of steps on this device.
      drafter: of serial rounds, None for the text alone.
      exits: at depths, with their profile; None for none.
      config, layout, dtype: of the model.
      batch: B.
    """
    a_step = costs.step(1)
    found = [Candidate(AR(), a_step, "AR", f"a step takes {1e3 * a_step:.1f} ms here")]
    trees = known_trees(drafter)
    best = min(trees, key=lambda tree: round_seconds(costs, tree.shape) / tree.tokens_per_round)
    a_round = round_seconds(costs, best.shape)
    # A larger tree whose rounds choose how many rows to run is at least about as good: it holds the smaller one.
    larger = [tree.shape for tree in trees if costs.step(tree.shape.rows) <= LONGEST_STEP * a_step]
    largest = with_rungs(costs, max([best.shape, *larger], key=lambda shape: shape.rows))
    shape = largest if largest.rungs else best.shape
    found.append(
        Candidate(
            Dex(schedule="serial", tree=shape),
            a_round / best.tokens_per_round * _slowest(batch),
            f"serial rounds of {' or '.join(map(str, shape.counts))} rows",
            f"{best.shape.rows} rows should emit {best.tokens_per_round:.2f} tokens in the time of "
            f"{a_round / a_step:.2f} AR steps",
        )
    )
    if isinstance(layout, Stacked) and costs.tick is not None and exits is not None:
        found += _side_by_side(costs, costs.tick, exits, config, layout, dtype, batch)
    return found


def round_seconds(costs: StepCosts, shape: TreeShape) -> float:
    """What a serial round should take: a step of N rows, its drafted levels and the rest."""
    return costs.step(shape.rows) + costs.round + shape.drafted * costs.drafting


def with_rungs(costs: StepCosts, shape: TreeShape) -> TreeShape:
    """The shape with the row counts that a round may choose from: those that cost clearly less than the next larger.

    Costs are in AR steps, with CAUTION, and rounded so that a program compiled for them serves another measurement too.
    """

    def parts(more: float) -> int:
        return round(CAUTION * more / costs.step(1) * COST_PARTS)

    found: list[tuple[int, int]] = []
    for rows in sorted({*(rows for rows in costs.rows if rows < shape.rows), shape.rows}, reverse=True):
        cost = COST_PARTS + parts(costs.step(rows) - costs.step(1) + costs.round)
        if not found or cost <= found[-1][1] - CLEARLY_LESS:
            found.append((rows, cost))
    rungs = tuple((rows, cost / COST_PARTS) for rows, cost in reversed(found))
    if len(rungs) < 2:
        return dataclasses.replace(shape, rungs=(), drafting=0.0)
    share = max(1, parts(costs.drafting)) / COST_PARTS if shape.drafted else 0.0  # 0: levels are not chosen
    return dataclasses.replace(shape, rungs=rungs, drafting=share)


def _slowest(batch: int) -> float:
    """How many times as many rounds or ticks the slowest of B sequences takes as one does on average."""
    return 1 + SPREAD * math.log2(batch)


def _side_by_side(
    costs: StepCosts,
    tick: float,
    exits: TrainedExits,
    config: ModelConfig,
    layout: Stacked,
    dtype: np.dtype,
    batch: int,
) -> list[Candidate]:
    stages = len(layout.depths)
    profile = exits.metadata.get("held_out", {}).get("mean", {}).get("grids", [])
    gain = next((grid["depth_side_speedup"] for grid in profile if grid["explorers"] == stages), None)
    if gain is None:
        return []
    final = costs.reading(config.vocab_size * config.width * dtype.itemsize)
    a_tick = tick + costs.reading(head_bytes(exits, config, dtype))
    return [
        Candidate(
            Dex(depths=layout.depths, schedule="parallel"),
            a_tick * stages / gain * _slowest(batch) + final,
            f"{stages} explorers side by side",
            f"a tick should take {a_tick / costs.step(1):.2f} AR steps, and a token {stages / gain:.2f} ticks",
        )
    ]
