"""What one decoding by the lattice carries from tick to tick.

Letters: B sequences, W rows a cohort, N rows of one while it grows, K stages, H heads, E numbers that a drafter reads
of the position before, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from dex_jax.decoding.dex.drafts import Drafting
from dex_jax.decoding.noise import Noise
from dex_jax.decoding.record import Record
from dex_jax.lattice import Lattice


class Seeds(NamedTuple):
    """A cohort's heads, fields [B, N] as in Cohort."""

    token: jax.Array
    position: jax.Array
    parent: jax.Array
    born_at: jax.Array
    score: jax.Array


class Waiting(NamedTuple):
    """A cohort of heads that is not in the lattice yet."""

    fresh: jax.Array  # [B] bool, whether it is a fresh root
    token: jax.Array | None = None  # [B] int32, of the fresh root where K = 1
    seeds: Seeds | None = None  # where K > 1, a fresh root among them
    before: jax.Array | None = None  # [B, H, E], what a drafter reads of the position before each head, where K > 1


class DexState(NamedTuple):
    """All that one decoding carries from tick to tick.

    Attributes:
      tick: int32, ticks since the start, the same for all sequences.
      lattice: every field with a leading axis B.
      hidden: [K, B, W, D], states of the cohorts by the stage they have just run.
      prefix: [B] int32, committed positions.
      memory: the network's own.
      noise: None when greedy.
      record: what has been emitted.
      drafting: what exit 0 goes by, None when it is silent.
      waiting: the cohort that the next tick begins with, None where it is in the lattice already.
    """

    tick: jax.Array
    lattice: Lattice
    hidden: jax.Array
    prefix: jax.Array
    memory: Any
    noise: Noise | None
    record: Record
    drafting: Drafting | None = None
    waiting: Waiting | None = None

    @property
    def stages(self) -> int:
        """K."""
        return self.lattice.token.shape[1]

    @property
    def rows(self) -> int:
        """W."""
        return self.lattice.token.shape[2]
