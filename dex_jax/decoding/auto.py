"""What runs where nothing was asked for: AR or one explorer with drafts, what should be faster here; where a mesh has
several stages an explorer for each, whose ticks choose their rows.

Seconds a token are what steps take on this device (decoding/costs.py) over how many tokens come of a tick, which is
known of the drafter's trees:

  AR                   step(1)
  one explorer         (step(N) + overhead + drafted levels * drafting) / tokens a tick * slowest(B) / choosing

On one device, explorers side by side are not weighed: their stages all wait for the same memory, and K = 1 with drafts
runs every layer in one tick. What more rows take on a mesh is measured on one of its devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dex_jax.config import ModelConfig
from dex_jax.decoding.costs import StepCosts, forget, step_costs
from dex_jax.decoding.dex.drafters import GivenDrafter, fitted, known_trees
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.pace import Pace
from dex_jax.decoding.plan import GivenExits, Method, drafted_rows, find_exits, unmeasured, with_stages
from dex_jax.decoding.request import AR, Dex
from dex_jax.distributed import from_first
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.sharding import DATA, STAGE
from dex_jax.nn.transformer import Staged
from dex_jax.nn.weights import Packing

SMALLEST_GAIN = 1.02
"""What is expected to be ahead of AR by less is not worth its compilation, and may well be behind."""

COST_PARTS, CLEARLY_LESS = 32, 3
"""Costs are in parts of an AR step. Every row count that a tick may choose from is compiled: they must differ."""

CAUTION = 1.3
"""Ticks take further rows and drafting to cost so many times what was measured. How fast a device reads memory, which
is all that a step of one row waits for, changes while others use it too; too few rows lose less than too many do."""

CHOOSING = 1.1
"""Ticks that choose how many rows to run are so many times as fast as the best tree that always runs is expected to be.
Measured over AR (results/packed.md) were 1.63 on dense weights and 1.24 on packed ones, where that was 1.36 and 1.0 to
1.1."""

LONGEST_STEP = 3.0
"""AR steps that all rows of a tree may take, for ticks to choose from it. Drafts promise most where they are most
wrong, so a choice of rows that hardly ever pay does harm: on a CPU, of one sequence 16 rows take 2.0 to 2.6 steps and
the tree of so many is the fastest, of two they take 3.5 and it is slower than those of 4 and 8."""

SPREAD = 0.08
"""A batch ends with its slowest sequence, and how many tokens come of a tick differs from text to text: the slowest of
B takes 1 + SPREAD * log2(B) times as many ticks as one does on average (1.10, 1.18 and 1.24 of 2, 4 and 8, drawn from
20 prompts). AR is as fast on every text."""


class Candidate(NamedTuple):
    """A method and what it should take."""

    method: Method
    seconds: float  # expected of a token of each sequence
    what: str  # the method in words


def settle(
    method: Method,
    exits: GivenExits,
    config: ModelConfig,
    layout: Staged | None,
    dtype: Any,
    fingerprint: str,
    batch: int,
    length: int,
    mesh: Mesh | None = None,
    packing: Packing = (),
) -> tuple[Method, str | None]:
    """The method that runs, and one line that says why if it was chosen here.

    Of what the user gave as `method` only Dex() without any field is replaced. Exits at depths, which only several
    explorers can use, settle it. `batch` is B, `length` S, about as many cache positions as the generation will have. A
    DexError for exits that cannot be read.
    """
    if method != Dex():
        return with_stages(method, None if mesh is None else mesh.shape[STAGE]), None
    given, stages = find_exits(exits, fingerprint), 1 if mesh is None else mesh.shape[STAGE]
    drafter = given.drafter
    if drafter is not None and not isinstance(drafter, TrainedExits):
        drafter = fitted(drafter, config)  # before anything is measured
    if given.own == "exits" and mesh is None:
        why = f"several explorers, which the exits in {given.source} are for"
        return unmeasured(method, exits, fingerprint), why
    if mesh is not None:  # what one of its devices runs
        batch = -(-batch // mesh.shape[DATA])
    about = (config, dtype, batch, length, drafter, packing)
    if mesh is None:
        costs = step_costs(*about)
    else:  # processes that went by figures of their own would run different programs
        rows, seconds, *others = from_first(lambda: dataclasses.astuple(step_costs(*about)))
        costs = StepCosts(tuple(rows), tuple(seconds), *others)
    if stages > 1 and drafter is not None and not isinstance(drafter, TrainedExits):
        shape = known_trees(drafter)[0].shape
        return Dex(explorers=1, draft=shape), f"one explorer over all stages, as {given.drafter_source} drafts for one"
    if stages > 1:
        tree = _largest(costs, drafter)
        most = drafted_rows(stages, tree)
        shape = with_rungs(costs, tree, most)
        rows = _rows_a_tick(shape.counts if shape.rungs else (most,))
        assert layout is not None
        return Dex(depths=layout.depths, draft=shape), f"an explorer with drafts on each stage ({rows})"
    plain, drafting = candidates(costs, drafter, batch)
    gain = plain.seconds / drafting.seconds
    best, second = (plain, drafting) if gain < SMALLEST_GAIN else (drafting, plain)
    return best.method, f"{best.what}; {second.what} should take {second.seconds / best.seconds:.2f} times as long"


def reconsider(pace: Pace, config: ModelConfig, dtype: Any, batch: int, length: int, packing: Packing = ()) -> None:
    """Forgets costs that were measured beside other load, as the pace of what they chose shows."""
    if not np.isfinite(pace.fastest):
        return
    if pace.far_off(step_costs(config, dtype, batch, length, packing=packing).step(1)):
        forget(config, dtype, packing)


def candidates(costs: StepCosts, drafter: GivenDrafter | None, batch: int = 1) -> tuple[Candidate, Candidate]:
    """AR first, then one explorer with the best of the trees known for a drafter, None for the text alone."""
    plain = Candidate(AR(), costs.step(1), "AR")
    trees = known_trees(drafter)
    best = min(trees, key=lambda tree: tick_seconds(costs, tree.shape) / tree.tokens_a_tick)
    a_tick = tick_seconds(costs, best.shape)
    # A larger tree whose ticks choose how many rows to run is at least about as good: it holds the smaller one.
    largest = with_rungs(costs, max(best.shape, _largest(costs, drafter), key=lambda shape: shape.rows))
    shape = largest if largest.rungs else best.shape
    drafting = Candidate(
        Dex(explorers=1, draft=shape),
        a_tick / best.tokens_a_tick * _slowest(batch) / (CHOOSING if largest.rungs else 1),
        f"one explorer with drafts ({_rows_a_tick(shape.counts)})",
    )
    return plain, drafting


def _rows_a_tick(counts: Sequence[int]) -> str:
    *some, most = map(str, counts)
    return f"{', '.join(some)}{' or ' if some else ''}{most} rows a tick"


def tick_seconds(costs: StepCosts, shape: TreeShape) -> float:
    """What a tick should take: a step of N rows, its drafted levels and the rest."""
    return costs.step(shape.rows) + costs.overhead + shape.drafted * costs.drafting


def _largest(costs: StepCosts, drafter: GivenDrafter | None) -> TreeShape:
    """The largest known tree whose rows do not take too long."""
    shapes = sorted((tree.shape for tree in known_trees(drafter)), key=lambda shape: shape.rows)
    return [shapes[0], *(shape for shape in shapes if costs.step(shape.rows) <= LONGEST_STEP * costs.step(1))][-1]


def with_rungs(costs: StepCosts, shape: TreeShape, most: int | None = None) -> TreeShape:
    """The shape with the row counts that a tick may choose from: those that cost clearly less than the next larger.

    The largest is `most`, the rows of a stage; those of the shape unless given. Costs are in AR steps, with CAUTION,
    and rounded so that a program compiled for them serves another measurement too.
    """

    def parts(more: float) -> int:
        return round(CAUTION * more / costs.step(1) * COST_PARTS)

    found: list[tuple[int, int]] = []
    most = most or shape.rows
    for rows in sorted({*(rows for rows in costs.rows if rows < most), most}, reverse=True):
        cost = COST_PARTS + parts(costs.step(rows) - costs.step(1) + costs.overhead)
        if not found or cost <= found[-1][1] - CLEARLY_LESS:
            found.append((rows, cost))
    rungs = tuple((rows, cost / COST_PARTS) for rows, cost in reversed(found))
    if len(rungs) < 2:
        return dataclasses.replace(shape, rungs=(), drafting=0.0)
    share = max(1, parts(costs.drafting)) / COST_PARTS if shape.drafted else 0.0  # 0: levels are not chosen
    return dataclasses.replace(shape, rungs=rungs, drafting=share)


def _slowest(batch: int) -> float:
    """How many times as many ticks the slowest of B sequences takes as one does on average."""
    return 1 + SPREAD * math.log2(batch)
