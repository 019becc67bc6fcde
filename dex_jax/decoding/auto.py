"""What runs where nothing was asked for: one explorer with drafts, or on a mesh of accelerators one on each stage."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from dex_jax.decoding.plan import GivenExits, Method, find_exits, with_stages
from dex_jax.decoding.request import Dex
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.sharding import STAGE

FEWEST_STAGES = 3
"""On accelerators, from so many stages on, explorers need fewer ticks than a tree that waits for one stage after the
other: 1.26 times fewer with 5, 1.07 with 2 (docs/results_exits.md)."""


class Settled(NamedTuple):
    """What runs."""

    method: Method
    exits: GivenExits
    choice: str | None = None  # why, if it was chosen here


def settle(method: Method, exits: GivenExits, fingerprint: str, mesh: Mesh | None = None) -> Settled:
    """The method that runs, with which exits.

    What the user gave as `method` is replaced only if it is Dex() without any field. One explorer is never slower than
    AR by more than what it takes to see that drafts are wrong: its ticks choose their rows (decoding/dex/pace.py).
    Explorers side by side on one device take turns. A DexError for exits that cannot be read.
    """
    if method != Dex():
        return Settled(with_stages(method, None if mesh is None else mesh.shape[STAGE]), exits)
    stages = 1 if mesh is None else mesh.shape[STAGE]
    given, one = find_exits(exits, fingerprint), Dex(explorers=1)
    where = "one explorer with drafts" + (" over all stages" if stages > 1 else "")
    if mesh is not None and stages >= FEWEST_STAGES and mesh.devices.flat[0].platform != "cpu":
        if given.drafter is None or isinstance(given.drafter, TrainedExits):
            return Settled(Dex(explorers=stages), exits, "an explorer with drafts on each stage")
        return Settled(one, exits, f"{where}, as {given.drafter_source} drafts for one")
    if given.own == "exits":
        turns = "several explorers, which take turns here" if stages == 1 else "an explorer on each stage"
        return Settled(one, "default", f"{where}; {given.source} is for {turns}: --explorers asks for them")
    return Settled(one, exits, where)
