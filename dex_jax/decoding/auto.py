"""What runs where nothing was asked for: AR or one explorer with drafts, what should be faster here; where a mesh has
several stages an explorer for each.

An explorer's ticks choose how many rows of a tree they run by what steps of so many take here (decoding/costs.py). On
one device, explorers side by side are not weighed: their stages all wait for the same memory, and K = 1 with drafts
runs every layer in one tick. What more rows take on a mesh is measured on one of its devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from dex_jax.config import ModelConfig
from dex_jax.decoding.costs import StepCosts, step_costs
from dex_jax.decoding.dex.drafters import GivenDrafter, fitted, known_trees
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.plan import GivenExits, Method, drafted_rows, find_exits, unmeasured, with_stages
from dex_jax.decoding.request import AR, Dex
from dex_jax.distributed import from_first
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.sharding import DATA, STAGE
from dex_jax.nn.transformer import Staged
from dex_jax.nn.weights import Packing

CHOOSING = 1.1
"""Ticks that choose their rows are so many times as fast as the best tree that always runs should be."""

LONGEST_STEP = 3.0
"""AR steps that all rows of a tree may take, for ticks to choose from it: drafts promise most where they are wrong."""

PARTS = 16
"""What rows take is told in such parts of a token, and counts that take as many are one, as each is compiled."""


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
        if stages > 1:
            shape, who = known_trees(drafter)[0].shape, given.drafter_source
            return Dex(explorers=1, draft=shape), f"one explorer over all stages, as {who} drafts for one"
    if given.own == "exits" and mesh is None:
        why = f"several explorers, which the exits in {given.source} are for"
        return unmeasured(method, exits, fingerprint), why
    if mesh is None:
        costs = step_costs(config, dtype, batch, length, drafter, packing)
    else:  # as one of its devices; processes that went by figures of their own would run different programs
        about = (config, dtype, -(-batch // mesh.shape[DATA]), length, drafter, packing)
        costs = StepCosts(*from_first(lambda: dataclasses.astuple(step_costs(*about))))
    if stages == 1:
        return choose(costs, drafter)
    tree = largest_tree(costs, drafter)
    shape = with_rungs(costs, tree, drafted_rows(stages, tree))
    assert layout is not None
    return Dex(depths=layout.depths, draft=shape), "an explorer with drafts on each stage"


def choose(costs: StepCosts, drafter: GivenDrafter | None) -> tuple[Method, str]:
    """AR, or one explorer with drafts, and why; a drafter of None is the text alone."""
    taken = min(
        (costs.step(tree.shape.rows) + tree.shape.drafted * costs.drafting) / tree.tokens_a_tick
        for tree in known_trees(drafter)
    )
    gain = costs.step(1) / taken
    shape = with_rungs(costs, largest_tree(costs, drafter), pace=max(1.0, CHOOSING * gain))
    gain *= CHOOSING if shape.rungs else 1
    drafts = "one explorer with drafts"
    if gain < 1:
        return AR(), f"AR; {drafts} should take {1 / gain:.2f} times as long"
    return Dex(explorers=1, draft=shape), f"{drafts}; AR should take {gain:.2f} times as long"


def largest_tree(costs: StepCosts, drafter: GivenDrafter | None) -> TreeShape:
    """The largest known tree whose rows do not take too long."""
    smallest, *shapes = sorted((tree.shape for tree in known_trees(drafter)), key=lambda shape: shape.rows)
    return [smallest, *(shape for shape in shapes if costs.step(shape.rows) <= LONGEST_STEP * costs.step(1))][-1]


def with_rungs(costs: StepCosts, shape: TreeShape, most: int | None = None, pace: float = 1.0) -> TreeShape:
    """The shape with the row counts that a tick may choose from, of those that take as long the largest.

    The largest of all is `most`, the rows of a stage; those of the shape unless given. Time is worth what all ticks
    should emit in it, `pace` tokens an AR step: that makes the most of all of them together.
    """

    def in_parts(seconds: float) -> int:
        return round(PARTS * pace * seconds / costs.step(1))

    most = most or shape.rows
    counts = {in_parts(costs.step(rows)): rows for rows in (*(each for each in costs.rows if each < most), most)}
    if len(counts) == 1:
        return shape
    rungs = tuple((rows, parts / PARTS) for parts, rows in counts.items())
    drafting = max(1, in_parts(costs.drafting)) / PARTS if shape.drafted else 0.0
    return dataclasses.replace(shape, rungs=rungs, drafting=drafting)
