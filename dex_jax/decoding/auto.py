"""The choice of a method where the user gave none."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dex_jax.decoding.plan import GivenExits, Method, find_exits, with_stages
from dex_jax.decoding.request import AR, Dex
from dex_jax.nn.sharding import DATA, STAGE

MANY = 4
"""The smallest batch that a CPU decodes by AR, as the sequences alone are as many rows as pay. Drafts took 8% longer in
batches of 4, and 25% in batches of 16 (benchmarks/speed.py --batch, at commit 55b52f5)."""


class MethodChoice(NamedTuple):
    """A method, the exits that it uses, and why it was chosen."""

    method: Method
    exits: GivenExits
    choice: str | None = None  # why, if it was chosen here


def choose_method(
    method: Method, exits: GivenExits, fingerprint: str, mesh: Mesh | None = None, sequences: int = 1
) -> MethodChoice:
    """Return the method to run on a batch of `sequences`, the exits that it uses, and why.

    Any `method` but Dex() without fields is kept; on a mesh it gets an explorer a stage unless it says how many. One
    explorer is slower than AR at most by the time that it takes to see that drafts are wrong: its ticks choose their
    rows (decoding/dex/row_choice.py). Explorers are never chosen here: on one device they take turns, and on several
    nothing measured so far shows them ahead of one explorer's trees. Raise DexError for unreadable exits.
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
    if given.own == "exits":
        turns = "several explorers, which take turns here" if stages == 1 else "an explorer on each stage"
        return MethodChoice(one, "default", f"{where}; {given.source} is for {turns}: --explorers asks for them")
    return MethodChoice(one, exits, where)
