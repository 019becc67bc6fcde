"""The method that runs where none was asked for."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dex_jax.decoding.plan import GivenExits, Method, find_exits, with_stages
from dex_jax.decoding.request import AR, Dex
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.sharding import DATA, STAGE

FEWEST_STAGES = 3
"""Explorers on accelerators begin with so many stages. A tree waits for one stage after the other, which counts for
little with two of them."""

MANY = 4
"""A CPU decodes so many sequences and more plainly, as they are as many rows as pay. Drafts took 8% longer in batches
of 4, and 25% in batches of 16 (benchmarks/speed.py --batch, at commit 55b52f5)."""


class MethodChoice(NamedTuple):
    """A method, the exits that it uses, and why."""

    method: Method
    exits: GivenExits
    choice: str | None = None  # why, if it was chosen here


def choose_method(
    method: Method, exits: GivenExits, fingerprint: str, mesh: Mesh | None = None, sequences: int = 1
) -> MethodChoice:
    """The method that runs, with which exits, for so many `sequences`.

    What the user gave as `method` is replaced only if it is Dex() without any field. One explorer is never slower than
    AR by more than what it takes to see that drafts are wrong: its ticks choose their rows (decoding/dex/pace.py).
    Explorers side by side on one device take turns. A DexError for exits that cannot be read.
    """
    if method != Dex():
        return MethodChoice(with_stages(method, None if mesh is None else mesh.shape[STAGE]), exits)
    stages = 1 if mesh is None else mesh.shape[STAGE]
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    given, one = find_exits(exits, fingerprint), Dex(explorers=1)
    batch = -(-sequences // (1 if mesh is None else mesh.shape[DATA]))
    if batch >= MANY and device.platform == "cpu":
        return MethodChoice(AR(), exits, f"AR, as drafts bring nothing to batches of {batch} on a CPU")
    where = "one explorer with drafts" + (" over all stages" if stages > 1 else "")
    if stages >= FEWEST_STAGES and device.platform != "cpu":
        if given.drafter is None or isinstance(given.drafter, TrainedExits):
            return MethodChoice(Dex(explorers=stages), exits, "an explorer with drafts on each stage")
        return MethodChoice(one, exits, f"{where}, as {given.drafter_source} drafts for one")
    if given.own == "exits":
        turns = "several explorers, which take turns here" if stages == 1 else "an explorer on each stage"
        return MethodChoice(one, "default", f"{where}; {given.source} is for {turns}: --explorers asks for them")
    return MethodChoice(one, exits, where)
